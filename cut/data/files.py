"""Files: data sets whose pictures and labels are files of their own, as published sets come.

A set knows its layout from its folder (:class:`Layout`), lists its examples, and decodes one when it is asked for. A
file that is missing, truncated or of a wrong shape is named; nothing is ever put in its place.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cut.data.augmentation import Arrays, Augmentation
from cut.data.base import IMAGENET_MEAN, IMAGENET_STD, MultiTaskData, Split
from cut.data.batch import normalise
from cut.tasks import Task

VAL_PARTS = 10  # one in so many training pictures is for validation, for ever
UNKNOWN = {"segmentation": 255.0, "normals": 0.0, "depth": 0.0, "map": float("nan")}
# The published preprocessing: BGR minus these, not divided by 255.
LEGACY_MEAN = tuple(v / 255 for v in (122.67891434, 116.66876762, 104.00698793))
LEGACY_STD = (1 / 255,) * 3


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


class FileSplit(Split):
    """Examples of one layout.

    Args:
        layout: Decodes them.
        examples: At least one.
        tasks: Whose labels to read.
        mean: Of the input normalisation.
        std: Of the input normalisation.
        legacy: The published preprocessing.
        augmentation: None changes nothing.
        seed: Of the augmentation.
        fixed: Every epoch sees the first one's augmentation.
        size: Height and width that all pictures must have; None asks for none.
    """

    def __init__(
        self,
        layout: Layout,
        examples: Sequence[Example],
        tasks: Sequence[Task],
        mean: Sequence[float],
        std: Sequence[float],
        legacy: bool = False,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        fixed: bool = False,
        size: tuple[int, int] | None = None,
    ) -> None:
        self.layout, self.examples, self.kinds = layout, list(examples), {t.name: t.kind for t in tasks}
        self.mean, self.std, self.legacy = mean, std, legacy
        # Labels are files: none is computed anew from a zoomed picture. Where no padding is needed, this adds none.
        self.augmentation = None if augmentation is None else replace(augmentation, pad=True)
        self.seed, self.fixed, self.size = seed, fixed, size

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.examples)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        """Picture and labels, as :mod:`cut.data.batch` documents them; padding is the mean colour and unknown.

        Raises:
            ValueError: Naming the file that is missing, damaged or holds a value that is not allowed.
        """
        epoch, index = (0 if self.fixed else key[0]), key[1]
        example = self.examples[index]
        arrays, mirrored = self.read(example), False
        size = arrays["image"].shape[:2]
        if self.augmentation is not None:
            size = self.augmentation.crop or size
            arrays, mirrored = self.augmentation(arrays, np.random.default_rng((self.seed, epoch, index)))
        image = normalise(np.ascontiguousarray(arrays["image"]), self.mean, self.std)
        item = {"image": image.flip(0) if self.legacy else image}
        for name in self.kinds:
            try:
                item[name] = self.layout.label(name, arrays[name], mirrored, self.legacy)
            except ValueError as error:
                raise ValueError(f"{example.files[name]} holds {error}") from error
        return self._padded(item, size)

    def read(self, example: Example) -> Arrays:
        """One example's arrays, all of one size.

        Raises:
            ValueError: Naming the file that is missing, damaged or of another size than the set's, or its picture.
        """
        arrays = {key: self.layout.array(example, key) for key in ("image", *self.kinds)}
        size = arrays["image"].shape[:2]
        if self.size is not None and size != self.size:
            raise ValueError(f"{example.files['image']} is {_by(size)}; the set's first picture is {_by(self.size)}")
        for name, array in arrays.items():
            if array.shape[:2] != size:
                picture = f"its picture {example.files['image']} is {_by(size)}"
                raise ValueError(f"{example.files[name]} is {_by(array.shape)}; {picture}")
        return arrays

    def _padded(self, item: dict[str, Tensor], size: Sequence[int]) -> dict[str, Tensor]:
        """The item, as large as asked for: what is missing below and to the right is unknown."""
        height, width = item["image"].shape[-2:]
        if (height, width) == tuple(size):
            return item
        room = (0, size[1] - width, 0, size[0] - height)
        values = {"image": 0.0, **{name: UNKNOWN[kind] for name, kind in self.kinds.items()}}
        return {name: F.pad(value, room, value=values[name]) for name, value in item.items()}


def _by(shape: Sequence[int]) -> str:
    return f"{shape[0]}x{shape[1]}"


class FileData(MultiTaskData):
    """A published data set in a folder; a subclass says which layouts and tasks it has.

    Validation is carved from train by the hash of a picture's name; test is what the set calls so. Scoring batches are
    training pictures: crops of the training's size without other changes; in the legacy protocol augmented ones.

    Args:
        root: Folder of the set.
        layout: Its layout.
        tasks: Those to read, with their losses and metrics.
        batch_size: Pictures per batch and process.
        num_workers: Loader processes.
        seed: Seed of order, augmentation and scoring batches.
        mean: Mean of the input normalisation; the legacy protocol has its own.
        std: Standard deviation of it.
        augmentation: Of training pictures; None mirrors half of them.
        subset: Use the first so many training pictures only; None = all.
        legacy: The published preprocessing: BGR minus a mean colour, labels as the published code has them.
    """

    def __init__(
        self,
        root: Path,
        layout: Layout,
        tasks: Sequence[Task],
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        augmentation: Augmentation | None = None,
        subset: int | None = None,
        legacy: bool = False,
    ) -> None:
        if legacy:
            mean, std = LEGACY_MEAN, LEGACY_STD
        super().__init__(tasks, batch_size, num_workers, seed, mean, std, subset)
        self.root, self.layout, self.legacy = root, layout, legacy
        self.augmentation = augmentation if augmentation is not None else Augmentation()
        self._digest = ""

    def load(self) -> dict[str, Split]:
        """The splits; the index and the existence of every file are checked.

        Raises:
            ValueError: Naming the file that is missing, or the split that is empty.
        """
        listed = {split: self.layout.examples(self.root, split) for split in ("train", "test")}
        keys = ["image", *(t.name for t in self.tasks)]
        self._digest = _digest(listed, keys)
        parts = {
            "train": [e for e in listed["train"] if not e.is_validation],
            "val": [e for e in listed["train"] if e.is_validation],
            "test": listed["test"],
        }
        for name, examples in parts.items():
            if not examples:
                raise ValueError(f"{self.root} has no pictures for split {name!r}: too few training pictures")
        first = self.layout.array(parts["train"][0], "image").shape
        size = (int(first[0]), int(first[1]))
        self.augmentation.check(size)
        same = self.augmentation if self.legacy else Augmentation(False, crop=self.augmentation.crop, pad=True)
        return {
            "train": self._split(parts["train"], size, self.augmentation),
            "val": self._split(parts["val"], size),
            "test": self._split(parts["test"], size),
            "plain": self._split(parts["train"], size, same, fixed=True),
        }

    def _split(
        self,
        examples: Sequence[Example],
        size: tuple[int, int],
        augmentation: Augmentation | None = None,
        fixed: bool = False,
    ) -> Split:
        settings = self.mean, self.std, self.legacy, augmentation, self.seed, fixed, size
        return FileSplit(self.layout, examples, self.tasks, *settings)

    @property
    def description(self) -> dict[str, Any]:
        """Name, seed, pictures per split, layout, and a hash of the files' names and sizes, for records."""
        found = super().description
        return found | {"layout": type(self.layout).__name__, "hash": self._digest, "legacy": self.legacy}


def _digest(listed: dict[str, list[Example]], keys: Sequence[str]) -> str:
    """A hash of the names and sizes of all files.

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


def chosen(name: str, tasks: Sequence[str], known: Sequence[str]) -> list[str]:
    """Tasks of a set, checked.

    Raises:
        ValueError: If one is unknown.
    """
    unknown = [t for t in tasks if t not in known]
    if unknown:
        raise ValueError(f"{name} has no task {unknown[0]!r}; allowed: {', '.join(known)}")
    return list(tasks)


def loss_weights(given: dict[str, float] | None, published: dict[str, float]) -> dict[str, float]:
    """The published loss weights with one's own on top.

    Raises:
        ValueError: If a task is unknown or a weight not positive.
    """
    wrong = {t: w for t, w in (given or {}).items() if t not in published or not w > 0}
    if wrong:
        raise ValueError(f"loss weights {wrong}; allowed: positive numbers for {', '.join(published)}")
    return {**published, **(given or {})}
