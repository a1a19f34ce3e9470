"""NYU-v2: indoor pictures with segmentation, surface normals and depth, as AdaShare or LibMTL lay them out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cut.data.decoding import classes_label, depths, float_label, planes, read_npy, read_png, to_bytes, unit_label
from cut.data.files import Example, Layout, inside, numbered, read_index
from cut.data.published import Published
from cut.tasks import Task, depth, normals, segmentation

# The papers' lambdas.
WEIGHTS = {"seg": 1.0, "normal": 20.0, "depth": 3.0}
TASKS = tuple(WEIGHTS)
SOURCE = (
    "NYU-v2 is obtained from AdaShare's repository (sunxm2357/AdaShare links the prepared files) or from LibMTL's "
    "(median-research-group/LibMTL); docs/datasets.md has the details"
)
CLASSES40 = (
    *("wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf", "picture"),
    *("counter", "blinds", "desk", "shelves", "curtain", "dresser", "pillow", "mirror", "floor mat", "clothes"),
    *("ceiling", "books", "refrigerator", "television", "paper", "towel", "shower curtain", "box", "whiteboard"),
    *("person", "night stand", "toilet", "sink", "lamp", "bathtub", "bag", "other structure", "other furniture"),
    "other prop",
)
CLASSES13 = (
    *("bed", "books", "ceiling", "chair", "floor", "furniture", "objects", "picture", "sofa", "table", "tv"),
    *("wall", "window"),
)
LARGEST = 1.001  # component of a vector in a file
DEEPEST = 100.0  # metres; the camera sees ten
INVALID = 255  # the largest channel of a normal that is not known


class AdaShare(Layout):
    """An index of png and npy files at 480x640; normals as colours, x right, y into the picture, z up."""

    marker = "nyu_v2_3task.json"
    expected = "AdaShare's nyu_v2_3task.json beside nyu_train_val/{training,testing}/{img,seg,normal_mask,depth}"
    size = (480, 640)
    classes = CLASSES40
    columns = ("image", "seg", "normal", "depth")

    def examples(self, root: Path, split: str) -> list[Example]:
        """The rows of the index."""
        rows = read_index(root / self.marker, len(self.columns))[split]
        return [Example(row[0], {k: inside(root, p) for k, p in zip(self.columns, row, strict=True)}) for row in rows]

    def array(self, example: Example, key: str) -> np.ndarray:
        """A decoded file; normals as uint8 [H, W, 3]."""
        path = example.files[key]
        if key == "depth":
            return depths(path, read_npy(path, 1), DEEPEST, "metres")
        return read_png(path, 1 if key == "seg" else 3)

    def label(self, key: str, array: np.ndarray, mirrored: bool, legacy: bool) -> Tensor:
        """A label; normals of the legacy protocol are directions of raw colours, the same in a mirrored picture."""
        if key == "seg":
            return classes_label(array, len(self.classes))
        if key == "depth":
            return depth_label(array)
        colours = planes(array)
        known = colours.amax(0) != INVALID
        if legacy:
            return unit_label(colours, known, False)
        right, into, up = colours / 127.5 - 1
        return unit_label(torch.stack([right, up, -into]), known, mirrored)


class LibMTL(Layout):
    """Numbered npy files at 288x384, 13 classes; its ``val`` is the test set."""

    marker = "train/normal"
    expected = "LibMTL's {train,val}/{image,label,depth,normal}/<number>.npy"
    size = (288, 384)
    classes = CLASSES13
    columns = ("image", "label", "depth", "normal")

    def examples(self, root: Path, split: str) -> list[Example]:
        """The numbered files of a split."""
        return numbered(root, split, dict(zip(("image", "seg", "depth", "normal"), self.columns, strict=True)))

    def array(self, example: Example, key: str) -> np.ndarray:
        """A decoded file; normals as vectors."""
        path = example.files[key]
        found = read_npy(path, 3 if key in ("image", "normal") else 1)
        if key == "depth":
            return depths(path, found, DEEPEST, "metres")
        return to_bytes(path, found) if key == "image" else found

    def label(self, key: str, array: np.ndarray, mirrored: bool, legacy: bool) -> Tensor:
        """A label; the legacy protocol has raw colour directions, made from the vectors."""
        if key == "seg":
            return classes_label(array, len(self.classes))
        if key == "depth":
            return depth_label(array)
        vectors = planes(array)
        known = (vectors != 0).any(0)
        if not vectors.abs().max() <= LARGEST:
            raise ValueError(f"a component of {vectors.abs().max():g}; allowed: -1 to 1")
        if legacy:
            return unit_label((vectors + 1) / 2, known, False)
        return unit_label(vectors, known, mirrored)


def depth_label(array: np.ndarray) -> Tensor:
    """Depth in metres, float32 [1, H, W]; what is not above 0 is unknown."""
    return float_label(array).clamp_min(0)


class NYUv2(Published):
    """The NYU-v2 data module.

    Args:
        root: Folder of the set, in AdaShare's layout (40 classes) or LibMTL's (13).
        tasks: Which of seg, normal, depth.
        legacy: The published protocol: BGR minus a mean colour, raw colours as normals, which do not change their sign
            in a mirrored picture. A model trained so takes BGR.
        **kwargs: Those of :class:`cut.data.published.Published`.

    Raises:
        ValueError: If there is no such set, or an argument is not allowed.
    """

    name, title, source = "nyuv2", "NYU-v2", SOURCE
    layouts, lambdas = (AdaShare(), LibMTL()), WEIGHTS

    def __init__(
        self, root: str | Path | None = None, tasks: Sequence[str] = TASKS, legacy: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(root, tasks, legacy=legacy, **kwargs)

    def task(self, name: str, weight: float) -> Task:
        """One of the set's tasks; normals of the legacy protocol are raw colours."""
        if name == "seg":
            return segmentation(self.layout.classes, weight=weight)
        return normals(weight=weight, raw=self.legacy) if name == "normal" else depth(weight=weight)
