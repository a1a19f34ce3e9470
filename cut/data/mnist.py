"""MNIST and Fashion-MNIST: 28x28 grey pictures of 10 digits and of 10 kinds of garments.

Both have 60,000 pictures for training and 10,000 for test, in IDX files of the same names. ``make fashion-mnist``
(:mod:`cut.data.fetch`) puts them into ``mnist`` and ``fashion-mnist`` in the cache of data sets (``~/.cache/cut/data``,
or the folder named by ``CUT_DATA``); a folder of one's own with those two folders will do too.

One in ten training pictures is for validation, by the hash of its place in the file: for ever, whatever is asked for.

References: LeCun et al., Gradient-based learning applied to document recognition, 1998; Xiao et al., Fashion-MNIST,
2017, https://arxiv.org/abs/1708.07747.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cut.data.files import Example
from cut.data.idx import read_idx

SIDE = 28
# Pictures and labels of a split.
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class GreySet:
    """One of the sets.

    Attributes:
        name: Its folder.
        title: Its name in messages.
        classes: Names of its classes, by label.
        hashes: SHA-256 of each file, not compressed.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    hashes: Mapping[str, str]


DIGITS = GreySet(
    "mnist",
    "MNIST",
    ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    {
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
)
GARMENTS = GreySet(
    "fashion-mnist",
    "Fashion-MNIST",
    ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
    {
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
)
GREY_SETS = {found.name: found for found in (GARMENTS, DIGITS)}


def cache() -> Path:
    """The folder of fetched data sets."""
    return Path(os.environ.get("CUT_DATA") or Path.home() / ".cache" / "cut" / "data")


def read(found: GreySet, split: str, root: str | Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Pictures, uint8 [N, 28, 28], and labels, int64 [N], of one split.

    Args:
        found: Which set.
        split: ``train``, ``val`` or ``test``.
        root: Folder that holds the set's folder; None = the cache.

    Raises:
        ValueError: If there is no such split, or a file is missing or damaged.
    """
    if split not in SPLITS:
        raise ValueError(f"{found.title} has no split {split!r}; allowed: {', '.join(SPLITS)}")
    folder = (cache() if root is None else Path(root)) / found.name
    first, second = (folder / name for name in FILES["test" if split == "test" else "train"])
    pictures, labels = _read(first, found, 3), _read(second, found, 1)
    if pictures.shape[1:] != (SIDE, SIDE):
        size = "x".join(map(str, pictures.shape[1:]))
        raise ValueError(f"{first} has pictures of {size}; {found.title} has {SIDE}x{SIDE}")
    if len(pictures) != len(labels):
        raise ValueError(f"{first} has {len(pictures)} pictures, {second} has {len(labels)} labels")
    if not len(labels):
        raise ValueError(f"{first} has no pictures")
    if labels.max() >= len(found.classes):
        raise ValueError(f"{second} has label {labels.max()}; allowed: 0 to {len(found.classes) - 1}")
    if split == "test":
        return pictures, labels.astype(np.int64)
    chosen = held_out(found.name, len(labels)) == (split == "val")
    return pictures[chosen], labels[chosen].astype(np.int64)


def held_out(name: str, count: int) -> np.ndarray:
    """Which of a set's training pictures are for validation, bool [count]: by the hash of name and place.

    Example:
        >>> held_out("mnist", 10).nonzero()[0].tolist()
        [4]
    """
    return np.array([Example(f"{name}/train/{i}", {}).is_validation for i in range(count)], bool)


def _read(path: Path, found: GreySet, dimensions: int) -> np.ndarray:
    """One file.

    Raises:
        ValueError: If it is missing or damaged.
    """
    advice = f"make fashion-mnist fetches {found.title}"
    try:
        return read_idx(path, dimensions)
    except FileNotFoundError as error:
        raise ValueError(f"no file {path}; {advice}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}; {advice}") from error
    except ValueError as error:
        raise ValueError(f"{error}; {advice}") from error
