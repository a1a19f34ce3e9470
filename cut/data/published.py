"""Published: the base of the published sets, whose pictures and labels are files in a folder.

A set's own module says which layouts it has (:class:`cut.data.files.Layout`), which tasks, and how its files are
decoded; all else is here.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from cut.data.augmentation import Arrays, Augmentation
from cut.data.base import IMAGENET_MEAN, IMAGENET_STD, MultiTaskData, Split
from cut.data.batch import normalise
from cut.data.files import Example, Layout, detect, digest, repeats
from cut.tasks import Task

UNKNOWN = {"segmentation": 255.0, "normals": 0.0, "depth": 0.0, "map": float("nan")}
# The published preprocessing: BGR minus these, not divided by 255.
LEGACY_MEAN = tuple(v / 255 for v in (122.67891434, 116.66876762, 104.00698793))
LEGACY_STD = (1 / 255,) * 3


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


class Published(MultiTaskData):
    """A published data set in a folder; a subclass says which layouts and tasks it has.

    Validation is carved from train by the hash of a picture's name; test is what the set calls so. Scoring batches are
    training pictures: crops of the training's size without other changes; in the legacy protocol augmented ones.

    Args:
        root: Folder of the set.
        tasks: Names of those to read.
        mean: Mean of the input normalisation; the legacy protocol has its own.
        std: Standard deviation of it.
        augmentation: Of training pictures; None mirrors half of them.
        legacy: The published preprocessing: BGR minus a mean colour, labels as the published code has them.
        weights: Loss weights by task; default the papers'.
        **kwargs: Those of :class:`cut.data.base.MultiTaskData`.

    Attributes:
        title: The set's name, for messages.
        source: Where it is obtained.
        layouts: Those that it is published in.
        lambdas: The papers' loss weights; its keys are the set's tasks.

    Raises:
        ValueError: If there is no such set, or an argument is not allowed.
    """

    title: str
    source: str
    layouts: tuple[Layout, ...]
    lambdas: ClassVar[dict[str, float]]

    def __init__(
        self,
        root: str | Path | None,
        tasks: Sequence[str],
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        augmentation: Augmentation | None = None,
        legacy: bool = False,
        weights: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        names, by = chosen(self.title, tasks, tuple(self.lambdas)), loss_weights(weights, self.lambdas)
        self.root, self.layout = detect(root, self.layouts, self.title, self.source)
        self.legacy = legacy
        if legacy:
            mean, std = LEGACY_MEAN, LEGACY_STD
        super().__init__([self.task(name, by[name]) for name in names], mean=mean, std=std, **kwargs)
        self.augmentation = augmentation if augmentation is not None else Augmentation()
        self._digest = ""

    def task(self, name: str, weight: float) -> Task:
        """One of the set's tasks, as ``layout`` and ``legacy`` say.

        Args:
            name: A key of ``lambdas``.
            weight: Of its loss.

        Raises:
            ValueError: If a file that the task needs is missing or damaged.
        """
        raise NotImplementedError

    def load(self) -> dict[str, Split]:
        """The splits; the index and the existence of every file are checked.

        A picture that is listed twice gives a warning; so does one in two splits in the legacy protocol.

        Raises:
            ValueError: Naming the file that is missing, the split that is empty, or the picture that is in two splits.
        """
        listed = {split: self.layout.examples(self.root, split) for split in ("train", "test")}
        keys = ["image", *(t.name for t in self.tasks)]
        self._digest = digest(listed, keys)
        parts = {
            "train": [e for e in listed["train"] if not e.is_validation],
            "val": [e for e in listed["train"] if e.is_validation],
            "test": listed["test"],
        }
        for name, examples in parts.items():
            if not examples:
                raise ValueError(f"{self.root} has no pictures for split {name!r}: too few training pictures")
        self._check_repeats(listed)
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

    def _check_repeats(self, listed: dict[str, list[Example]]) -> None:
        """Say what is listed more than once.

        Raises:
            ValueError: If a picture is in two splits and the protocol is the corrected one.
        """
        within, across = repeats(self.root / self.layout.marker, listed)
        if across and not self.legacy:
            raise ValueError(f"{across[0]}{_more(across)}; allowed: each picture in one split (legacy takes it)")
        for lines in filter(None, (within, across)):
            warnings.warn(f"{lines[0]}{_more(lines)}", stacklevel=2)

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


def _more(lines: Sequence[str]) -> str:
    return f" and {len(lines) - 1} more" if len(lines) > 1 else ""


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
