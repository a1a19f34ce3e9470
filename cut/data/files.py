"""Files: how a published set lies in its folder: which layout it has, what its index lists, where each file is.

Nothing is decoded here; that is :mod:`cut.data.decoding`. A file that is missing is named; nothing is ever put in its
place.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

VAL_PARTS = 10  # one in so many training pictures is for validation, for ever


@dataclass(frozen=True)
class Example:
    """One picture with its labels, as files.

    Attributes:
        name: How the set's index calls the picture; says whether it is for validation.
        files: ``image`` and labels by key.
    """

    name: str
    files: dict[str, Path]

    @property
    def is_validation(self) -> bool:
        """Whether this training picture is for validation: by the hash of its name.

        Example:
            >>> [Example(f"{i}.png", {}).is_validation for i in range(20)].count(True)
            1
        """
        return int(hashlib.sha256(self.name.encode()).hexdigest()[:8], 16) % VAL_PARTS == 0


class Layout(ABC):
    """How a set lies in its folder and what its files hold.

    Attributes:
        marker: File or folder below the root that only this layout has.
        expected: What a folder of this layout looks like, for messages.
        size: Height and width as published.
        classes: Names of the segmentation's classes.
    """

    marker: str
    expected: str
    size: tuple[int, int]
    classes: tuple[str, ...]

    @abstractmethod
    def examples(self, root: Path, split: str) -> list[Example]:
        """The examples of ``train`` or ``test``, in the set's order.

        Raises:
            ValueError: If the index is damaged.
        """

    @abstractmethod
    def array(self, example: Example, key: str) -> np.ndarray:
        """``image`` (uint8 [H, W, 3], RGB) or a label [H, W] or [H, W, C], as the file holds it.

        Raises:
            ValueError: Naming a file that is damaged or has a wrong shape.
        """

    @abstractmethod
    def label(self, key: str, array: np.ndarray, mirrored: bool, legacy: bool) -> Tensor:
        """A label of :meth:`array`, perhaps a part of it, as :mod:`cut.data.batch` documents it.

        Raises:
            ValueError: If a value is not one that the set has.
        """

    def there(self, root: Path) -> bool:
        """Whether a folder has this layout."""
        return (root / self.marker).exists()


def detect(root: str | Path | None, layouts: Sequence[Layout], title: str, source: str) -> tuple[Path, Layout]:
    """The folder, and which layout it has.

    Args:
        root: Folder of the set.
        layouts: Those that the set is published in.
        title: The set's name.
        source: Where the set is obtained.

    Raises:
        ValueError: If it has none of them: what was found, what was expected and where the set is obtained.
    """
    expected = "; or ".join(layout.expected for layout in layouts)
    if root is None:
        raise ValueError(f"no folder of {title} given (data.init_args.root); expected {expected}. {source}")
    path = Path(root)
    for layout in layouts:
        if layout.there(path):
            return path, layout
    if not path.is_dir():
        found = "no such folder"
    else:
        names = sorted(p.name for p in path.iterdir())
        found = f"it holds {', '.join(names[:5]) or 'nothing'}{', ...' * (len(names) > 5)}"
    raise ValueError(f"{path} is not {title}: {found}; expected {expected}. {source}")


def read_index(path: Path, columns: int) -> dict[str, list[list[str]]]:
    """An index: split to rows of paths.

    Raises:
        ValueError: If it is damaged, a split is missing or empty, or a row has another number of paths.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = {split: content[split] for split in ("train", "test")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}; expected a JSON object with 'train' and 'test'") from error
    for split, rows in found.items():
        if not isinstance(rows, list) or not rows:
            raise ValueError(f"{path} lists no pictures of split {split!r}")
        for number, row in enumerate(rows):
            if not isinstance(row, list) or len(row) != columns or not all(isinstance(p, str) for p in row):
                raise ValueError(f"{path}: row {number} of split {split!r} is {row!r}; expected {columns} paths")
    return found


def numbered(root: Path, split: str, folders: dict[str, str]) -> list[Example]:
    """Examples of a layout with a folder per label and numbered npy files.

    Args:
        root: Folder of the set.
        split: ``train`` or ``test``, which these sets call ``val``.
        folders: Label key to folder.

    Raises:
        ValueError: If a split has no pictures, or a file's name is not a number.
    """
    part = {"train": "train", "test": "val"}[split]
    paths = sorted((root / part / folders["image"]).glob("*.npy"), key=lambda p: (len(p.stem), p.stem))
    if not paths:
        raise ValueError(f"{root / part / folders['image']} holds no pictures")
    odd = [p for p in paths if not p.stem.isdigit()]
    if odd:
        raise ValueError(f"{odd[0]} is not numbered; expected <number>.npy")
    return [
        Example(f"{part}/{path.stem}", {k: root / part / folder / path.name for k, folder in folders.items()})
        for path in paths
    ]


def inside(root: Path, path: str) -> Path:
    """A path of an index below the root.

    Raises:
        ValueError: If it leads out of the root.
    """
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise ValueError(f"the index of {root} names {path!r}, which is outside of it")
    return root / path


def digest(listed: dict[str, list[Example]], keys: Sequence[str]) -> str:
    """A hash of the names and sizes of all files, for records.

    Args:
        listed: Examples by split.
        keys: ``image`` and labels whose files count.

    Raises:
        ValueError: Naming the first file that is missing.
    """
    found = hashlib.sha256()
    for split, examples in listed.items():
        for example in examples:
            for key in keys:
                try:
                    size = example.files[key].stat().st_size
                except OSError as error:
                    raise ValueError(f"{example.files[key]} is missing; the index names it in {split!r}") from error
                found.update(f"{split} {example.name} {key} {size}\n".encode())
    return found.hexdigest()[:12]


def repeats(index: Path, listed: dict[str, list[Example]]) -> tuple[list[str], list[str]]:
    """Pictures that are listed more than once, by where their files are: a copy under another name is another picture.

    Args:
        index: What lists them, for messages.
        listed: Examples of ``train`` and ``test``.

    Returns:
        A line for each that is repeated within one part of the set (train, val or test), and for each that is in two,
        so that what is measured on one was seen in the other.

    Example:
        >>> a, b = (Example(name, {"image": Path(name)}) for name in ("0.png", "1.png"))
        >>> repeats(Path("i.json"), {"train": [a, b, b], "test": [a]})[1]
        ["i.json lists 0.png for train (row 0 of split 'train') and for test (row 0 of split 'test')"]
    """
    seen: dict[Path, tuple[str, str]] = {}
    within: list[str] = []
    across: list[str] = []
    for split, examples in listed.items():
        for number, example in enumerate(examples):
            path, row = example.files["image"], f"row {number} of split {split!r}"
            part = "val" if split == "train" and example.is_validation else split
            first, first_row = seen.setdefault(path, (part, row))
            if first_row == row:
                continue
            if first == part:
                within.append(f"{index} lists {path} twice for {part} ({first_row} and {row})")
            else:
                across.append(f"{index} lists {path} for {first} ({first_row}) and for {part} ({row})")
    return within, across
