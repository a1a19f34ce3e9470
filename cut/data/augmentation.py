"""Augmentation: changes of a training picture that keep every label exact."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from cut.data.filters import FILTERS

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Augmentation:
    """What may change. A zoom is a longer lens: normals and depth stay what they are.

    Attributes:
        mirror: Mirror half of the pictures; the normals' x changes sign.
        scale: Zoom by a factor between these two, drawn on a logarithmic scale.
        crop: Height and width of a random crop after zooming; None is the picture's own size.

    Raises:
        ValueError: If a number is out of range.
    """

    mirror: bool = True
    scale: tuple[float, float] = (1.0, 1.0)
    crop: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale {self.scale}; allowed: two positive numbers, the smaller one first")
        if self.crop is not None and min(self.crop) < 1:
            raise ValueError(f"crop {self.crop}; allowed: None or two sides of at least 1")

    def check(self, size: tuple[int, int]) -> None:
        """Compare the crop with the smallest picture that it can be asked of.

        Raises:
            ValueError: If it does not fit into a zoomed picture.
        """
        height, width = _zoomed(size, self.scale[0])
        crop = self.crop or size
        if crop[0] > height or crop[1] > width:
            zoomed = f"pictures of {size[0]}x{size[1]} zoomed by {self.scale[0]:g}"
            raise ValueError(f"crop {crop[0]}x{crop[1]} is larger than {zoomed}")

    def __call__(self, arrays: Arrays, rng: np.random.Generator) -> tuple[Arrays, bool]:
        """Change a picture and its labels alike.

        Args:
            arrays: ``image``, uint8 [H, W, 3], and labels [H, W] or [H, W, C] by name. Edges and keypoints,
                being functions of the picture, are computed anew (as float32) from a zoomed one.
            rng: Where all randomness comes from.

        Returns:
            The new arrays (views where possible), and whether they are mirrored: the sign of the vectors' x
            is left to the caller.
        """
        size = arrays["image"].shape[:2]
        crop = self.crop or size
        mirrored = bool(rng.random() < 0.5) and self.mirror
        low, high = np.log(self.scale)
        height, width = _zoomed(size, float(np.exp(rng.uniform(low, high))))
        top, left = int(rng.integers(height - crop[0] + 1)), int(rng.integers(width - crop[1] + 1))
        if (height, width) != size:
            arrays = _zoom(arrays, height, width)
        found = {key: array[top : top + crop[0], left : left + crop[1]] for key, array in arrays.items()}
        return {key: array[:, ::-1] if mirrored else array for key, array in found.items()}, mirrored


def _zoomed(size: tuple[int, int], factor: float) -> tuple[int, int]:
    return round(size[0] * factor), round(size[1] * factor)


def _zoom(arrays: Arrays, height: int, width: int) -> Arrays:
    """Resize the picture bilinearly and its labels by the nearest pixel, so that no label is a mixture."""
    old = arrays["image"].shape[:2]
    rows = ((np.arange(height) + 0.5) * old[0] / height).astype(np.intp)
    columns = ((np.arange(width) + 0.5) * old[1] / width).astype(np.intp)
    resized = Image.fromarray(arrays["image"]).resize((width, height), Image.Resampling.BILINEAR)
    picture = np.asarray(resized)
    found = {"image": picture}
    for key, array in arrays.items():
        if key != "image":
            found[key] = FILTERS[key](picture) if key in FILTERS else array[rows[:, None], columns]
    return found
