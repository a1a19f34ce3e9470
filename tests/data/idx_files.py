"""Tiny sets in IDX files, written byte by byte as the format says, without the code under test."""

import struct
from pathlib import Path

import numpy as np

NAMES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def idx(array: np.ndarray) -> bytes:
    """An array of bytes as an IDX file."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(struct.pack(">I", n) for n in array.shape)
    return header + array.tobytes()


def write_set(folder: Path, seed: int, counts: tuple[int, int] = (120, 40)) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """One set of ten classes in a folder; returns what is in it: split of the files to pictures and labels.

    Every picture is random, so that it can be recognised.
    """
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    found = {}
    for split, count in zip(NAMES, counts, strict=True):
        pictures = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) * 7 % 10).astype(np.uint8)
        for name, array in zip(NAMES[split], (pictures, labels), strict=True):
            (folder / name).write_bytes(idx(array))
        found[split] = (pictures, labels.astype(np.int64))
    return found


def write_sets(root: Path, times: int = 1) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Both sets below a root, not of the same size, and so many times larger."""
    return {
        "fashion-mnist": write_set(root / "fashion-mnist", 1, (120 * times, 40 * times)),
        "mnist": write_set(root / "mnist", 2, (150 * times, 50 * times)),
    }
