"""Rooms: furnished rooms with exact labels, five dense tasks and one image-level task.

A small set ships with the package; its files are those of :mod:`cut.data.shards`. Edges and keypoints are
computed from the picture (:mod:`cut.data.filters`). Test rooms hold furniture that no training room has.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cut.data.augmentation import Augmentation
from cut.data.base import IMAGENET_MEAN, IMAGENET_STD, MultiTaskData, Split
from cut.data.batch import normalise
from cut.data.shards import SPLITS, UNKNOWN_NORMAL, Shards, check_files, read_meta
from cut.tasks import Task, classification, depth, normals, regression_map, segmentation

EMBEDDED = Path(__file__).parent / "embedded"
TASKS = ("seg", "normal", "depth", "edge", "keypoint", "scene")
# Loss weights that bring the tasks' losses to one order of magnitude on this set.
WEIGHTS = {"seg": 1.0, "normal": 3.0, "depth": 1.0, "edge": 5.0, "keypoint": 5.0, "scene": 0.3}


class RoomsSplit(Split):
    """One split of a Rooms set.

    Args:
        shards: Where the rooms come from.
        tasks: Label keys.
        mean: Of the input normalisation.
        std: Of the input normalisation.
        augmentation: For training pictures; None changes nothing.
        seed: Of the augmentation.
    """

    def __init__(
        self,
        shards: Shards,
        tasks: Sequence[str],
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        self.shards, self.tasks, self.mean, self.std = shards, tuple(tasks), mean, std
        self.augmentation, self.seed = augmentation, seed

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.shards)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        """Picture and labels, as :mod:`cut.data.batch` documents them."""
        epoch, index = key
        room = self.shards.room(index)
        arrays, mirrored = {"image": room.picture, **room.labels}, False
        if self.augmentation is not None:
            arrays, mirrored = self.augmentation(arrays, np.random.default_rng((self.seed, epoch, index)))
        item = {"image": normalise(arrays["image"], self.mean, self.std)}
        for task in self.tasks:
            if task == "scene":
                item[task] = torch.tensor(room.scene)
            else:
                item[task] = _tensor(task, np.ascontiguousarray(arrays[task]), mirrored)
        return item


def _tensor(task: str, array: np.ndarray, mirrored: bool) -> Tensor:
    """A label as :mod:`cut.data.batch` documents it."""
    if task == "seg":
        return torch.from_numpy(array).long()
    if task == "normal":
        return unit_vectors(array, mirrored)
    full = {np.dtype(np.uint16): 1000 if task == "depth" else 65535}.get(array.dtype, 1)
    return torch.from_numpy(array.astype(np.float32))[None] / full


def unit_vectors(pixels: np.ndarray, mirrored: bool = False) -> Tensor:
    """Unit vectors, float32 [3, H, W], from a picture of normals, uint8 [H, W, 3].

    Args:
        pixels: (n + 1) / 2 * 255; 128, 128, 128 is unknown and gives zero.
        mirrored: The picture is a mirrored one: x points the other way.

    Example:
        >>> pixels = np.array([[[255, 128, 128], [128, 128, 128]]], np.uint8)
        >>> unit_vectors(pixels)[:, 0].round(decimals=2).tolist()
        [[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    """
    raw = torch.from_numpy(pixels).permute(2, 0, 1)
    vectors = raw.float() / 127.5 - 1
    vectors /= (vectors * vectors).sum(0).sqrt()
    if mirrored:
        vectors[0] *= -1
    return vectors * (raw != UNKNOWN_NORMAL).any(0)


class Rooms(MultiTaskData):
    """The Rooms data module.

    Args:
        root: Folder of a set; None is the embedded one.
        tasks: Which of seg, normal, depth, edge, keypoint, scene.
        batch_size: Pictures per batch and process.
        num_workers: Loader processes.
        seed: Seed of order, augmentation and scoring batches.
        mean: Mean of the input normalisation.
        std: Standard deviation of it.
        augmentation: Of training pictures; None mirrors half of them.
        subset: Use the first so many training pictures only; None = all.

    Raises:
        ValueError: If there is no set, or an argument is not allowed.
    """

    name = "rooms"

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
    ) -> None:
        unknown = [task for task in tasks if task not in TASKS]
        if unknown:
            raise ValueError(f"Rooms has no task {unknown[0]!r}; allowed: {', '.join(TASKS)}")
        self.root = EMBEDDED if root is None else Path(root)
        self.meta = read_meta(self.root)
        self.augmentation = Augmentation() if augmentation is None else augmentation
        self.augmentation.check(tuple(self.meta["size"]))
        found = [self._task(task) for task in tasks]
        super().__init__(found, batch_size, num_workers, seed, mean, std, subset)

    def _task(self, name: str) -> Task:
        weight = WEIGHTS[name]
        if name == "seg":
            return segmentation(self.meta["classes"], weight=weight)
        if name == "scene":
            return classification(self.meta["room_types"], weight=weight)
        if name == "normal":
            return normals(weight=weight)
        return depth(weight=weight) if name == "depth" else regression_map(name, weight)

    def load(self) -> dict[str, Split]:
        """Check all files and open the splits.

        Raises:
            ValueError: If a file is missing or damaged.
        """
        check_files(self.root, self.meta)
        names = [task.name for task in self.tasks]
        shards = {split: Shards(self.root, split, self.meta, names) for split in SPLITS}
        plain = {split: RoomsSplit(shards[split], names, self.mean, self.std) for split in SPLITS}
        train = RoomsSplit(shards["train"], names, self.mean, self.std, self.augmentation, self.seed)
        return {"train": train, "val": plain["val"], "test": plain["test"], "plain": plain["train"]}

    @property
    def description(self) -> dict[str, Any]:
        """Name, seed, pictures per split, size, version and hash of the set's ``meta.json``, for records."""
        digest = hashlib.sha256(json.dumps(self.meta, sort_keys=True).encode()).hexdigest()[:12]
        facts = {"size": list(self.meta["size"]), "version": self.meta.get("version"), "hash": digest}
        return super().description | facts
