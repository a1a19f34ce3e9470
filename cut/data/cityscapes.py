"""Cityscapes: street pictures with segmentation and inverse depth, as AdaShare or LibMTL lay them out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from cut.data.decoding import classes_label, depths, float_label, read_npy, to_bytes
from cut.data.files import Example, Layout, inside, numbered, read_index
from cut.data.published import Published
from cut.tasks import Task, depth, segmentation

# The papers' lambdas.
WEIGHTS = {"seg": 1.0, "depth": 20.0}
TASKS = tuple(WEIGHTS)
SOURCE = (
    "Cityscapes is obtained from AdaShare's repository (sunxm2357/AdaShare links the prepared files) or from LibMTL's "
    "(median-research-group/LibMTL); docs/datasets.md has the details"
)
CLASSES19 = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation"),
    *("terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
)
CLASSES7 = ("flat", "construction", "object", "nature", "sky", "human", "vehicle")
UNIT = "inverse depth, as stored"
DEEPEST = 1000.0  # in this unit
NEAREST = 3e-5  # an inverse depth that is not larger is not known


class _Npy(Layout):
    """What both layouts share: pictures and labels are npy files."""

    def array(self, example: Example, key: str) -> np.ndarray:
        """A decoded file."""
        path = example.files[key]
        if key == "image":
            return to_bytes(path, read_npy(path, 3))
        return depths(path, read_npy(path, 1), DEEPEST, UNIT) if key == "depth" else read_npy(path, 1)

    def label(self, key: str, array: np.ndarray, mirrored: bool, legacy: bool) -> Tensor:
        """A label; an inverse depth of at most 3e-5 is unknown."""
        if key == "seg":
            return classes_label(array, len(self.classes))
        found = float_label(array)
        return found.where(found > NEAREST, 0.0)


class AdaShare(_Npy):
    """An index of npy files at 256x512, 19 classes."""

    marker = "cityscape.json"
    expected = "AdaShare's cityscape.json with rows of [image, depth, label_2, label_7, label_19] npy files"
    size = (256, 512)
    classes = CLASSES19

    def examples(self, root: Path, split: str) -> list[Example]:
        """The rows of the index."""
        rows = read_index(root / self.marker, 5)[split]
        columns = {"image": 0, "depth": 1, "seg": 4}
        return [Example(row[0], {k: inside(root, row[i]) for k, i in columns.items()}) for row in rows]


class LibMTL(_Npy):
    """Numbered npy files at 128x256, 7 classes; its ``val`` is the test set."""

    marker = "train/label"
    expected = "LibMTL's {train,val}/{image,label,depth}/<number>.npy"
    size = (128, 256)
    classes = CLASSES7

    def examples(self, root: Path, split: str) -> list[Example]:
        """The numbered files of a split."""
        return numbered(root, split, {"image": "image", "seg": "label", "depth": "depth"})

    def there(self, root: Path) -> bool:
        """Whether a folder has this layout; with normals it is NYU-v2."""
        return super().there(root) and not (root / "train" / "normal").exists()


class Cityscapes(Published):
    """The Cityscapes data module.

    Args:
        root: Folder of the set, in AdaShare's layout (19 classes) or LibMTL's (7).
        tasks: Which of seg, depth.
        legacy: The published protocol: BGR minus a mean colour, void counted as wrong. A model trained so takes BGR.
        **kwargs: Those of :class:`cut.data.published.Published`.

    Raises:
        ValueError: If there is no such set, or an argument is not allowed.
    """

    name, title, source = "cityscapes", "Cityscapes", SOURCE
    layouts, lambdas = (AdaShare(), LibMTL()), WEIGHTS

    def __init__(
        self, root: str | Path | None = None, tasks: Sequence[str] = TASKS, legacy: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(root, tasks, legacy=legacy, **kwargs)

    def task(self, name: str, weight: float) -> Task:
        """One of the set's tasks; void counts as wrong in the legacy protocol."""
        if name == "seg":
            return segmentation(self.layout.classes, weight=weight, void_is_wrong=self.legacy)
        return depth(weight=weight, unit=UNIT)
