"""Pictures: a split whose pictures are in memory or made on demand, with labels of the whole picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cut.data.base import Split
from cut.data.batch import normalise


def square(picture: np.ndarray, side: int) -> np.ndarray:
    """A picture with three channels and equal sides: uint8 [side, side, 3].

    Args:
        picture: uint8 [H, W], grey, or [H, W, 3].
        side: In pixels; another size is reached bilinearly, by the mean of what falls together where it shrinks.

    Example:
        >>> square(np.full((28, 28), 7, np.uint8), 32).shape
        (32, 32, 3)
    """
    if picture.shape[:2] != (side, side):
        picture = np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BILINEAR))
    return np.repeat(picture[:, :, None], 3, 2) if picture.ndim == 2 else picture


class Pictures(Split):
    """Pictures that a function makes; the epoch changes nothing.

    Args:
        make: Index to picture, uint8 [H, W] or [H, W, 3]: the same one whenever it is asked for.
        labels: Label key to the classes of all pictures, int64 [N].
        side: Height and width to resize to.
        mean: Of the input normalisation.
        std: Of the input normalisation.
    """

    def __init__(
        self,
        make: Callable[[int], np.ndarray],
        labels: Mapping[str, np.ndarray],
        side: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self.make, self.labels, self.side, self.mean, self.std = make, dict(labels), side, mean, std

    def __len__(self) -> int:
        """Number of pictures."""
        return min(map(len, self.labels.values()))

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        """Picture and labels, as :mod:`cut.data.batch` documents them.

        Raises:
            IndexError: If there is no such picture.
        """
        if not 0 <= key[1] < len(self):
            raise IndexError(f"picture {key[1]}; there are {len(self)}")
        item = {"image": normalise(square(self.make(key[1]), self.side), self.mean, self.std)}
        return item | {name: torch.tensor(int(labels[key[1]])) for name, labels in self.labels.items()}
