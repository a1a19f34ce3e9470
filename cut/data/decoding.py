"""Decoding: pictures and labels from picture files (png, jpg) and npy files, with every value checked.

Whatever a file cannot hold is a ValueError; those of functions that get a path name the file.
"""

from __future__ import annotations

from pathlib import Path
from tokenize import TokenError

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def read_png(path: Path, channels: int) -> np.ndarray:
    """A picture file as uint8 or uint16 [H, W] or [H, W, 3].

    Raises:
        ValueError: If it is missing, damaged or has another number of channels.
    """
    try:
        with Image.open(path) as picture:
            mode = picture.mode
            colours = channels == 3 and (mode.startswith("RGB") or picture.getbands() == ("P",))
            array = np.array(picture.convert("RGB") if colours and mode != "RGB" else picture)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if array.ndim != (2 if channels == 1 else 3):
        found, wanted = list(array.shape), "[H, W]" if channels == 1 else "[H, W, 3]"
        raise ValueError(f"{path} holds a picture {found} of mode {mode}; expected {wanted}")
    return array.astype(np.uint16 if mode.startswith("I") else np.uint8, copy=False)


def load_npy(path: Path) -> np.ndarray:
    """An npy file.

    Raises:
        ValueError: If it is missing, damaged or no such file.
    """
    try:
        with path.open("rb") as file:  # np.load would take a zip file, too
            array: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing") from error
    except (OSError, ValueError, EOFError, MemoryError, OverflowError, TypeError, SyntaxError, TokenError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return array


def read_npy(path: Path, channels: int) -> np.ndarray:
    """An npy file of numbers, [H, W] or [H, W, channels]; a single channel loses its dimension.

    Raises:
        ValueError: If it is missing, damaged or has another shape.
    """
    array = load_npy(path)
    if channels == 1 and array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    wanted = array.ndim == 2 if channels == 1 else array.ndim == 3 and array.shape[-1] == channels
    if not wanted or array.dtype.kind not in "iuf":
        raise ValueError(
            f"{path} holds {array.dtype} {list(array.shape)}; expected numbers [H, W{f', {channels}' * (channels > 1)}]"
        )
    return array


def to_bytes(path: Path, picture: np.ndarray) -> np.ndarray:
    """A picture of fractions, [H, W, 3] in [0, 1], as uint8.

    Raises:
        ValueError: If a value is outside.
    """
    if picture.dtype == np.uint8:
        return picture
    low, high = float(picture.min(initial=0)), float(picture.max(initial=0))
    if not (low >= -1e-3 and high <= 1.001):
        raise ValueError(f"{path} holds values from {low:g} to {high:g}; expected 0 to 1")
    return (picture * 255).round().clip(0, 255).astype(np.uint8)


def depths(path: Path, array: np.ndarray, deepest: float, unit: str) -> np.ndarray:
    """A depth map as it is, if its largest value can be one; millimetres where metres are expected cannot.

    Args:
        path: Its file, for the message.
        array: Numbers of any shape. What is not finite is left to :func:`float_label`.
        deepest: The largest value that the set can have.
        unit: Of the values.

    Raises:
        ValueError: Naming the file, the range of its values and the unit.
    """
    high = float(array.max(initial=0))
    if deepest < high < np.inf:
        low = float(array.min())
        raise ValueError(f"{path} holds depths from {low:g} to {high:g}; expected {unit}, up to {deepest:g}")
    return array


def classes_label(array: np.ndarray, classes: int) -> Tensor:
    """A segmentation, int64 [H, W], of stored classes; negative ones and 255 are unknown.

    Raises:
        ValueError: If a value is no class.
    """
    if array.dtype.kind == "f" and not (array == np.rint(array)).all():
        raise ValueError(f"class {array[array != np.rint(array)][0]:g}; allowed: whole numbers")
    found = torch.from_numpy(np.ascontiguousarray(array)).long()
    found = torch.where(found < 0, 255, found)
    highest = int(found.masked_fill(found == 255, 0).max()) if found.numel() else 0
    if highest >= classes:
        raise ValueError(f"class {highest}; allowed: 0 to {classes - 1}, and unknown")
    return found


def planes(array: np.ndarray) -> Tensor:
    """Colours or vectors [H, W, 3] as float32 [3, H, W], contiguous, which is several times faster to work on."""
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1))).float()


def unit_label(vectors: Tensor, known: Tensor, mirrored: bool) -> Tensor:
    """Unit vectors, float32 [3, H, W], zero where not known; x points the other way in a mirrored picture.

    Args:
        vectors: Of any length, float32 [3, H, W].
        known: [H, W].
        mirrored: Whether the picture is.

    Raises:
        ValueError: If a value is not finite.
    """
    length = (vectors * vectors).sum(0).sqrt()
    if not length.max().isfinite():  # which is NaN if one is
        raise ValueError("a value that is not finite")
    found = vectors / length.clamp_min(1e-12) * (known & (length > 0))
    if mirrored:
        found[0] *= -1
    return found


def float_label(array: np.ndarray) -> Tensor:
    """A map of numbers, float32 [1, H, W].

    Raises:
        ValueError: If a value is not finite.
    """
    found = torch.from_numpy(np.ascontiguousarray(array)).float()[None]
    if not found.isfinite().all():
        raise ValueError("a value that is not finite")
    return found
