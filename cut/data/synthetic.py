"""Synthetic: coloured shapes with consistent labels, made from a seed. For tests, not for claims."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cut.data.base import IMAGENET_MEAN, IMAGENET_STD, MultiTaskData, Split
from cut.data.batch import normalise
from cut.data.filters import FILTERS
from cut.tasks import Task, classification, depth, normals, regression_map, segmentation

CLASSES = ("background", "disc", "box", "stripe")
SCENES = ("few", "many")
TASKS = ("seg", "normal", "depth", "edge", "keypoint", "scene")
COLOURS = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200]], float)


def shapes(rng: np.random.Generator, height: int, width: int) -> dict[str, np.ndarray]:
    """One picture with its labels: tilted flat shapes, later ones in front of earlier ones.

    All labels can be read off the picture: hue shows the class, brightness the depth, tint the tilt, and the
    scene is whether there are more than three shapes.

    Returns:
        ``image`` uint8 [H, W, 3], ``seg`` int64 [H, W], ``normal`` [H, W, 3], ``depth`` [H, W], ``scene`` [].
    """
    longer = max(height, width)
    y, x = np.mgrid[0:height, 0:width] / longer
    seg = np.zeros((height, width), np.int64)
    far = 4 - y
    normal = np.broadcast_to(np.array([0.0, 0.0, 1.0]), (height, width, 3)).copy()
    colour = np.full((height, width, 3), 90.0)
    number = int(rng.integers(1, 6))
    for _ in range(number):
        kind = int(rng.integers(1, len(CLASSES)))
        size = rng.uniform(0.1, 0.25)
        dx = x - rng.uniform(0.1, 0.9) * width / longer
        dy = y - rng.uniform(0.1, 0.9) * height / longer
        distance = (np.hypot(dx, dy), np.maximum(abs(dx), abs(dy)), abs(dx + dy) * 2)[kind - 1]
        inside = distance < size
        tilt, near = rng.uniform(-0.5, 0.5, 2), rng.uniform(1, 3)
        seg[inside], far[inside] = kind, near
        normal[inside] = np.array([*tilt, 1.0]) / np.sqrt(1 + (tilt**2).sum())
        colour[inside] = COLOURS[kind - 1] * (1.3 - near / 4) + 40 * np.array([*tilt, 0])
    picture = (colour + rng.normal(0, 4, colour.shape)).clip(0, 255).astype(np.uint8)
    scene = np.array(int(number > 3))
    return {"image": picture, "seg": seg, "normal": normal, "depth": far, "scene": scene}


class Shapes(Split):
    """Pictures made on demand; the epoch changes nothing.

    Args:
        tasks: Label keys.
        size: Height and width.
        count: Number of pictures.
        seeds: Seed of the set and of the split.
    """

    def __init__(self, tasks: Sequence[str], size: tuple[int, int], count: int, seeds: tuple[int, int]) -> None:
        self.tasks, self.size, self.count, self.seeds = tuple(tasks), size, count, seeds

    def __len__(self) -> int:
        """Number of pictures."""
        return self.count

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        """Picture and labels, as :mod:`cut.data.batch` documents them."""
        if not 0 <= key[1] < self.count:
            raise IndexError(f"picture {key[1]}; there are {self.count}")
        found = shapes(np.random.default_rng((*self.seeds, key[1])), *self.size)
        item = {"image": normalise(found["image"], IMAGENET_MEAN, IMAGENET_STD)}
        for task in self.tasks:
            if task in FILTERS:
                item[task] = torch.from_numpy(FILTERS[task](found["image"]))[None]
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

    Raises:
        ValueError: If an argument is not allowed.
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
        unknown = [task for task in tasks if task not in TASKS]
        if unknown:
            raise ValueError(f"the synthetic set has no task {unknown[0]!r}; allowed: {', '.join(TASKS)}")
        if min(size) < 2 or num < 1:
            raise ValueError(f"size {tuple(size)}, num {num}; allowed: sides of at least 2, num of at least 1")
        super().__init__([self._task(task) for task in tasks], batch_size, num_workers, seed)
        self.size, self.num = (int(size[0]), int(size[1])), num

    @staticmethod
    def _task(name: str) -> Task:
        simple = {
            "seg": segmentation(CLASSES),
            "normal": normals(),
            "depth": depth(),
            "scene": classification(SCENES),
        }
        return simple.get(name) or regression_map(name)

    def load(self) -> dict[str, Split]:
        """Splits whose pictures differ."""
        names = [task.name for task in self.tasks]
        counts = {"train": self.num, "val": max(1, self.num // 4), "test": max(1, self.num // 4)}
        found: dict[str, Split] = {
            split: Shapes(names, self.size, count, (self.seed, number))
            for number, (split, count) in enumerate(counts.items())
        }
        return found | {"plain": found["train"]}
