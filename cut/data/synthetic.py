"""Synthetic: pictures of coloured shapes with consistent labels, made from a seed. For tests and smoke runs, not for claims."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cut.data.base import IMAGENET_MEAN, IMAGENET_STD, MultiTaskData
from cut.data.batch import normalise
from cut.data.filters import edge_strength, keypoint_response
from cut.tasks import Task, classification, depth, normals, regression_map, segmentation

CLASSES = ("background", "disc", "box", "stripe")
SCENES = ("few", "many")
TASKS = ("seg", "normal", "depth", "edge", "keypoint", "scene")


def shapes(rng: np.random.Generator, height: int, width: int) -> dict[str, np.ndarray]:
    """One picture with its labels: shapes of a class each, tilted planes at a depth that their brightness shows."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    seg = np.zeros((height, width), np.int64)
    far = 4 - y
    normal = np.broadcast_to(np.array([0.0, 0.0, 1.0]), (height, width, 3)).copy()
    colour = np.full((height, width, 3), 90.0)
    number = int(rng.integers(1, 6))
    for _ in range(number):
        kind = int(rng.integers(1, len(CLASSES)))
        cx, cy, size = rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.9) * height / max(height, width), rng.uniform(0.1, 0.25)
        dx, dy = x - cx, y - cy
        inside = [np.hypot(dx, dy) < size, np.maximum(abs(dx), abs(dy)) < size, abs(dx + dy) < size / 2][kind - 1]
        tilt = rng.uniform(-0.5, 0.5, 2)
        near = rng.uniform(1, 3)
        seg[inside] = kind
        far[inside] = near
        normal[inside] = np.array([*tilt, 1.0]) / np.sqrt(1 + (tilt**2).sum())
        base = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200]][kind - 1], float) * (1.3 - near / 4)
        colour[inside] = base + 40 * np.array([tilt[0], tilt[1], 0])
    picture = (colour + rng.normal(0, 4, colour.shape)).clip(0, 255).astype(np.uint8)
    return {"image": picture, "seg": seg, "normal": normal, "depth": far, "scene": np.array(int(number > 3))}


class Shapes(Dataset[dict[str, Tensor]]):
    """Pictures made on demand; items are asked for as (epoch, index), the epoch changes nothing."""

    def __init__(
        self, tasks: Sequence[str], size: tuple[int, int], count: int, seed: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self.tasks, self.size, self.count, self.seed, self.mean, self.std = tasks, size, count, seed, mean, std

    def __len__(self) -> int:
        """Number of pictures."""
        return self.count

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        """Picture and labels, as :mod:`cut.data.batch` documents them."""
        found = shapes(np.random.default_rng((self.seed, key[1])), *self.size)
        item = {"image": normalise(found["image"], self.mean, self.std)}
        for task in self.tasks:
            if task in ("edge", "keypoint"):
                filter_ = edge_strength if task == "edge" else keypoint_response
                item[task] = torch.from_numpy(filter_(found["image"]))[None]
            elif task == "normal":
                item[task] = torch.from_numpy(found[task]).permute(2, 0, 1).float()
            elif task == "depth":
                item[task] = torch.from_numpy(found[task])[None].float()
            else:
                item[task] = torch.from_numpy(found[task])
        return item


class Synthetic(MultiTaskData):
    """The synthetic data module.

    Args:
        tasks: Which of seg, normal, depth, edge, keypoint, scene.
        size: Height and width.
        num: Training pictures; validation and test have a quarter each.
        batch_size: Pictures per batch and process.
        num_workers: Loader processes.
        seed: Seed of pictures, order and scoring batches.
    """

    name = "synthetic"

    def __init__(
        self,
        tasks: Sequence[str] = ("seg", "normal", "depth", "edge"),
        size: tuple[int, int] = (32, 32),
        num: int = 64,
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        unknown = [t for t in tasks if t not in TASKS]
        if unknown or not tasks:
            raise ValueError(f"synthetic tasks {list(tasks)}; allowed: some of {list(TASKS)}")
        super().__init__([self._task(t) for t in tasks], batch_size, num_workers, seed, IMAGENET_MEAN, IMAGENET_STD)
        self.size, self.num = tuple(size), num

    @staticmethod
    def _task(name: str) -> Task:
        simple = {"seg": segmentation(CLASSES), "normal": normals(), "depth": depth(), "scene": classification(SCENES)}
        return simple.get(name) or regression_map(name)

    def setup(self, stage: str | None = None) -> None:
        """Make the splits; their pictures differ."""
        if self.splits:
            return
        names = [t.name for t in self.tasks]
        counts = {"train": self.num, "val": max(1, self.num // 4), "test": max(1, self.num // 4)}
        for i, (split, count) in enumerate(counts.items()):
            size = (int(self.size[0]), int(self.size[1]))
            self.splits[split] = Shapes(names, size, count, 1_000_003 * self.seed + i, self.mean, self.std)
        self.splits["plain"] = self.splits["train"]
