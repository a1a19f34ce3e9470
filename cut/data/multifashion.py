"""Multi-Fashion+MNIST: a garment and a digit in one picture, each to be told by a task of its own.

As in Multi-MNIST, two 28x28 pictures lie in opposite corners of a 36x36 canvas, the garment top left and the digit
bottom right, and every pixel is the brighter of the two. Pairs are made from Fashion-MNIST and MNIST
(:mod:`cut.data.mnist`) and depend on a seed of their own only. A picture of one set belongs to one pair, and pairs of
training, validation and test have no picture in common.

References: Sabour et al., 2017, https://arxiv.org/abs/1710.09829 (MultiMNIST); Sener and Koltun, 2018,
https://arxiv.org/abs/1810.04650 (as two tasks); Lin et al., 2019, https://arxiv.org/abs/1912.12854 (Multi-Fashion and
Multi-(Fashion+MNIST)). Theirs are other pairs, and more of them: numbers are not to be compared with theirs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cut.data.base import IMAGENET_MEAN, IMAGENET_STD, MultiTaskData, Split
from cut.data.mnist import DIGITS, GARMENTS, SIDE, SPLITS, read
from cut.data.pictures import Pictures
from cut.tasks import classification

CANVAS = 36
TASKS = {"garment": GARMENTS, "digit": DIGITS}


def overlay(garment: np.ndarray, digit: np.ndarray) -> np.ndarray:
    """The two pictures, uint8 [28, 28], on one canvas, uint8 [36, 36]: the brighter pixel of the two.

    Example:
        >>> both = overlay(np.full((28, 28), 5, np.uint8), np.full((28, 28), 9, np.uint8))
        >>> both[0, 0], both[20, 20], both[35, 35], both[0, 35]
        (np.uint8(5), np.uint8(9), np.uint8(9), np.uint8(0))
    """
    canvas = np.zeros((CANVAS, CANVAS), np.uint8)
    canvas[:SIDE, :SIDE] = garment
    corner = canvas[CANVAS - SIDE :, CANVAS - SIDE :]
    np.maximum(corner, digit, out=corner)
    return canvas


def pairs(garments: int, digits: int, seed: Sequence[int]) -> np.ndarray:
    """Which garment goes with which digit, int64 [N, 2]: each at most once, as many pairs as there can be.

    Example:
        >>> pairs(2, 3, (0,)).shape
        (2, 2)
    """
    # RandomState's numbers are the same in every NumPy for ever.
    random = np.random.RandomState(list(seed))
    count = min(garments, digits)
    return np.stack([random.permutation(total)[:count] for total in (garments, digits)], 1).astype(np.int64)


def _pair(garments: np.ndarray, digits: np.ndarray, found: np.ndarray, index: int) -> np.ndarray:
    garment, digit = found[index]
    return overlay(garments[garment], digits[digit])


class MultiFashion(MultiTaskData):
    """The Multi-Fashion+MNIST data module.

    Training pictures are not changed: a mirrored digit is none.

    Args:
        root: Folder that holds ``fashion-mnist`` and ``mnist``; None = the cache (``make fashion-mnist``).
        tasks: Which of garment, digit.
        side: Height and width of the pictures; the canvas has 36.
        pairing: Seed of the pairs.
        held: Use the first so many validation and test pictures only; None = all.
        batch_size: Pictures per batch and process.
        num_workers: Loader processes.
        seed: Seed of order and scoring batches.
        mean: Mean of the input normalisation.
        std: Standard deviation of it.
        subset: Use the first so many training pictures only; None = all.

    Raises:
        ValueError: If an argument is not allowed.
    """

    name = "multifashion"

    def __init__(
        self,
        root: str | Path | None = None,
        tasks: Sequence[str] = tuple(TASKS),
        side: int = CANVAS,
        pairing: int = 0,
        held: int | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        subset: int | None = None,
    ) -> None:
        unknown = [task for task in tasks if task not in TASKS]
        if unknown:
            raise ValueError(f"Multi-Fashion+MNIST has no task {unknown[0]!r}; allowed: {', '.join(TASKS)}")
        if side < 1:
            raise ValueError(f"side {side}; allowed: at least 1")
        if held is not None and held < 1:
            raise ValueError(f"held {held}; allowed: None or at least 1")
        if not 0 <= pairing < 2**32:
            raise ValueError(f"pairing {pairing}; allowed: 0 to {2**32 - 1}")
        self.root, self.side, self.pairing, self.held = root, side, pairing, held
        self.digest = ""
        found = [classification(TASKS[task].classes, task) for task in tasks]
        super().__init__(found, batch_size, num_workers, seed, mean, std, subset)

    def load(self) -> dict[str, Split]:
        """The pairs of each split.

        Raises:
            ValueError: If a file is missing or damaged.
        """
        digest, found = hashlib.sha256(), {}
        for number, split in enumerate(SPLITS):
            (garments, kinds), (digits, values) = (read(each, split, self.root) for each in TASKS.values())
            chosen = pairs(len(garments), len(digits), (self.pairing, number))
            if split != "train":
                chosen = chosen[: self.held]
            for array in (garments, kinds, digits, values, chosen):
                digest.update(array.tobytes())
            every = {"garment": kinds[chosen[:, 0]], "digit": values[chosen[:, 1]]}
            labels = {task.name: every[task.name] for task in self.tasks}
            make = partial(_pair, garments, digits, chosen)
            found[split] = Pictures(make, labels, self.side, self.mean, self.std)
        self.digest = digest.hexdigest()[:12]
        return {**found, "plain": found["train"]}

    @property
    def description(self) -> dict[str, Any]:
        """Name, seed, pictures per split, side, seed and hash of the pairs with pictures and labels, for records."""
        facts = super().description
        return facts | {"side": self.side, "pairing": self.pairing, "hash": self.digest}
