"""NYU-v2: indoor pictures with segmentation, surface normals and depth, as AdaShare or LibMTL lay them out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cut.data.augmentation import Augmentation
from cut.data.base import IMAGENET_MEAN, IMAGENET_STD
from cut.data.files import (
    Example,
    FileData,
    Layout,
    chosen,
    classes_label,
    detect,
    float_label,
    inside,
    loss_weights,
    numbered,
    planes,
    read_index,
    read_npy,
    read_png,
    to_bytes,
    unit_label,
)
from cut.tasks import Task, depth, normals, segmentation

TASKS = ("seg", "normal", "depth")
# The papers' lambdas.
WEIGHTS = {"seg": 1.0, "normal": 20.0, "depth": 3.0}
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
        return read_npy(path, 1) if key == "depth" else read_png(path, 1 if key == "seg" else 3)

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


class NYUv2(FileData):
    """The NYU-v2 data module.

    Args:
        root: Folder of the set, in AdaShare's layout (40 classes) or LibMTL's (13).
        tasks: Which of seg, normal, depth.
        batch_size: Pictures per batch and process.
        num_workers: Loader processes.
        seed: Seed of order, augmentation and scoring batches.
        mean: Mean of the input normalisation.
        std: Standard deviation of it.
        augmentation: Of training pictures; None mirrors half of them.
        subset: Use the first so many training pictures only; None = all.
        legacy: The published protocol: BGR minus a mean colour, raw colours as normals, which do not change their sign
            in a mirrored picture. A model trained so takes BGR.
        weights: Loss weights by task; default the papers'.

    Raises:
        ValueError: If there is no such set, or an argument is not allowed.
    """

    name = "nyuv2"

    def __init__(
        self,
        root: str | Path | None = None,
        tasks: Sequence[str] = TASKS,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        augmentation: Augmentation | None = None,
        subset: int | None = None,
        legacy: bool = False,
        weights: dict[str, float] | None = None,
    ) -> None:
        names, by = chosen("NYU-v2", tasks, TASKS), loss_weights(weights, WEIGHTS)
        folder, layout = detect(root, (AdaShare(), LibMTL()), "NYU-v2", SOURCE)
        known: dict[str, Task] = {
            "seg": segmentation(layout.classes, weight=by["seg"]),
            "normal": normals(weight=by["normal"], raw=legacy),
            "depth": depth(weight=by["depth"]),
        }
        super().__init__(
            folder,
            layout,
            [known[name] for name in names],
            batch_size,
            num_workers,
            seed,
            mean,
            std,
            augmentation,
            subset,
            legacy,
        )
