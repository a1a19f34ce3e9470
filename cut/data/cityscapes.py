"""Cityscapes: street pictures with segmentation and inverse depth, as AdaShare or LibMTL lay them out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
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
    read_index,
    read_npy,
    to_bytes,
)
from cut.tasks import Task, depth, segmentation

TASKS = ("seg", "depth")
# The papers' lambdas.
WEIGHTS = {"seg": 1.0, "depth": 20.0}
SOURCE = (
    "Cityscapes is obtained from AdaShare's repository (sunxm2357/AdaShare links the prepared files) or from LibMTL's "
    "(median-research-group/LibMTL); docs/datasets.md has the details"
)
CLASSES19 = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation"),
    *("terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
)
CLASSES7 = ("flat", "construction", "object", "nature", "sky", "human", "vehicle")
NEAREST = 3e-5  # an inverse depth that is not larger is not known


class _Npy(Layout):
    """What both layouts share: pictures and labels are npy files."""

    def array(self, example: Example, key: str) -> np.ndarray:
        """A decoded file."""
        path = example.files[key]
        return to_bytes(path, read_npy(path, 3)) if key == "image" else read_npy(path, 1)

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


class Cityscapes(FileData):
    """The Cityscapes data module.

    Args:
        root: Folder of the set, in AdaShare's layout (19 classes) or LibMTL's (7).
        tasks: Which of seg, depth.
        batch_size: Pictures per batch and process.
        num_workers: Loader processes.
        seed: Seed of order, augmentation and scoring batches.
        mean: Mean of the input normalisation.
        std: Standard deviation of it.
        augmentation: Of training pictures; None mirrors half of them.
        subset: Use the first so many training pictures only; None = all.
        legacy: The published protocol: BGR minus a mean colour, void counted as wrong. A model trained so takes BGR.
        weights: Loss weights by task; default the papers'.

    Raises:
        ValueError: If there is no such set, or an argument is not allowed.
    """

    name = "cityscapes"

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
        names, by = chosen("Cityscapes", tasks, TASKS), loss_weights(weights, WEIGHTS)
        folder, layout = detect(root, (AdaShare(), LibMTL()), "Cityscapes", SOURCE)
        known: dict[str, Task] = {
            "seg": segmentation(layout.classes, weight=by["seg"], void_is_wrong=legacy),
            "depth": depth(weight=by["depth"], unit="inverse depth, as stored"),
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
