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
        pad: A zoomed picture may be smaller than the crop: it is left so, for the data set to fill up with what is
            unknown. Only the part that is asked for is zoomed, and all labels by the nearest pixel, edges and keypoints
            too: for sets whose labels are files.
        uniform: Draw the zoom uniformly instead.
        divide_depth: Divide depth by the zoom: a nearer camera instead of a longer lens.

    Raises:
        ValueError: If a number is out of range.
    """

    mirror: bool = True
    scale: tuple[float, float] = (1.0, 1.0)
    crop: tuple[int, int] | None = None
    pad: bool = False
    uniform: bool = False
    divide_depth: bool = False

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
        if self.pad:
            return
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
        factor = self._factor(rng)
        height, width = _zoomed(size, factor)
        down, right = height - crop[0], width - crop[1]
        if self.pad:
            down, right = max(0, down), max(0, right)
        top, left = int(rng.integers(down + 1)), int(rng.integers(right + 1))
        if self.pad:
            box = (top, left, min(height, top + crop[0]), min(width, left + crop[1]))
            found = _window(arrays, (height, width), box)
        else:
            zoomed = _zoom(arrays, height, width) if (height, width) != size else arrays
            found = {key: array[top : top + crop[0], left : left + crop[1]] for key, array in zoomed.items()}
        if self.divide_depth and "depth" in found:
            found["depth"] = (found["depth"] / factor).astype(found["depth"].dtype)
        return {key: array[:, ::-1] if mirrored else array for key, array in found.items()}, mirrored

    def _factor(self, rng: np.random.Generator) -> float:
        """A zoom."""
        if self.uniform:
            return float(rng.uniform(*self.scale))
        low, high = np.log(self.scale)
        return float(np.exp(rng.uniform(low, high)))


def _window(arrays: Arrays, zoomed: tuple[int, int], box: tuple[int, int, int, int]) -> Arrays:
    """A part (top, left, bottom, right) of the zoomed picture and labels; the rest is never computed."""
    height, width = arrays["image"].shape[:2]
    top, left, bottom, right = box
    if zoomed == (height, width):
        return {key: array[top:bottom, left:right] for key, array in arrays.items()}
    rows = ((np.arange(top, bottom) + 0.5) * height / zoomed[0]).astype(np.intp)
    columns = ((np.arange(left, right) + 0.5) * width / zoomed[1]).astype(np.intp)
    down, along = height / zoomed[0], width / zoomed[1]
    part = (left * along, top * down, min(width, right * along), min(height, bottom * down))
    size = (right - left, bottom - top)
    picture = Image.fromarray(arrays["image"]).resize(size, Image.Resampling.BILINEAR, part)
    # Rows first, then columns: several times faster than both at once.
    found = {key: array.take(rows, 0).take(columns, 1) for key, array in arrays.items() if key != "image"}
    return {"image": np.array(picture), **found}


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
