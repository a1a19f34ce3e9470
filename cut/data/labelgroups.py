"""Label groups: one image set as many small classification tasks, for a library of tasks and tasks unlike them.

A group is a few classes of an image set; its task is to tell them apart, with labels 0, 1, ... in the order of the
group. :func:`groups` lists a fixed number of *library* tasks and of *unseen* tasks that share no class with any
library task, nor with the *base* task, which tells all classes of the library apart and can train a backbone that has
never met an unseen class.

===============  ===========================================================================  =======  ======
source           groups                                                                       library  unseen
===============  ===========================================================================  =======  ======
fashion-mnist    three of 6 garments; unseen: three of the other 4, and all 4                 16       5
mnist            the same with digits                                                         16       5
both             the first groups of the two above: 9 + 9, and 3 of garments + 2 of digits    18       5
cifar100         superclasses of five classes                                                 15       5
===============  ===========================================================================  =======  ======

A name such as ``fashion-3`` (library), ``fashion-new-1`` (unseen) or ``fashion-base`` means the same group in every
source that lists it. Which classes are unseen depends on the seed only. In ``both`` some library tasks are like a new
one (garments for garments) and some are not, so a measure of likeness has something to find.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from cut.data import cifar, mnist
from cut.data.base import IMAGENET_MEAN, IMAGENET_STD, MultiTaskData, Split
from cut.data.mnist import SPLITS
from cut.data.pictures import Pictures
from cut.tasks import classification

SOURCES = ("fashion-mnist", "mnist", "both", "cifar100")
GREY = {"fashion": mnist.GARMENTS, "mnist": mnist.DIGITS}
LIBRARY_CLASSES = 6  # of ten
GROUP = 3  # classes of a group of garments or digits
LIBRARY = {"fashion-mnist": 16, "mnist": 16, "cifar100": 15}
UNSEEN = 5
BOTH = {"fashion": (9, 3), "mnist": (9, 2)}  # library and unseen groups of each set


@dataclass(frozen=True)
class LabelGroup:
    """A few classes to tell apart.

    Attributes:
        name: The task's name.
        classes: (image set, class) of each label, by name.
    """

    name: str
    classes: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Groups:
    """The groups of a source.

    Attributes:
        library: Tasks whose pruned models are known.
        unseen: Tasks that share no class with any of them.
        base: All classes of the library in one task.
    """

    library: tuple[LabelGroup, ...]
    unseen: tuple[LabelGroup, ...]
    base: LabelGroup

    def __iter__(self) -> Iterator[LabelGroup]:
        """All of them."""
        return iter((*self.library, *self.unseen, self.base))


def groups(source: str = "both", seed: int = 0) -> Groups:
    """The groups of a source; needs no pictures.

    Args:
        source: One of :data:`SOURCES`.
        seed: Says which classes are unseen and in which order groups are listed.

    Raises:
        ValueError: If there is no such source.

    Example:
        >>> found = groups("fashion-mnist")
        >>> [name for _, name in found.library[0].classes]
        ['pullover', 'bag', 'trouser']
        >>> [name for _, name in found.unseen[0].classes]
        ['sneaker', 'dress', 'sandal']
    """
    if source not in SOURCES:
        raise ValueError(f"source {source!r}; allowed: {', '.join(SOURCES)}")
    if source == "cifar100":
        return _superclasses(seed)
    if source == "both":
        parts = {prefix: _of_ten(prefix, seed) for prefix in GREY}
        library = [g for prefix, part in parts.items() for g in part.library[: BOTH[prefix][0]]]
        unseen = [g for prefix, part in parts.items() for g in part.unseen[: BOTH[prefix][1]]]
        base = sum((part.base.classes for part in parts.values()), ())
        return Groups(tuple(library), tuple(unseen), LabelGroup("both-base", base))
    return _of_ten(next(prefix for prefix, found in GREY.items() if found.name == source), seed)


def find(name: str, seed: int = 0) -> LabelGroup:
    """The group of a name, as :func:`groups` lists it.

    Raises:
        ValueError: If there is none.
    """
    known = {found.name: found for source in SOURCES for found in groups(source, seed)}
    if name not in known:
        raise ValueError(f"no label group {name!r}; allowed: {', '.join(known)}")
    return known[name]


def _of_ten(prefix: str, seed: int) -> Groups:
    """Groups of a set of ten classes: of three, and the last unseen one of all that are unseen."""
    found = GREY[prefix]
    # RandomState's numbers are the same in every NumPy for ever.
    random = np.random.RandomState(seed)
    classes = [(found.name, found.classes[i]) for i in random.permutation(len(found.classes))]
    seen, unseen = classes[:LIBRARY_CLASSES], classes[LIBRARY_CLASSES:]
    library, new = ([*combinations(part, GROUP)] for part in (seen, unseen))
    library, new = ([part[i] for i in random.permutation(len(part))] for part in (library, new))
    return Groups(
        tuple(LabelGroup(f"{prefix}-{i}", c) for i, c in enumerate(library[: LIBRARY[found.name]])),
        tuple(LabelGroup(f"{prefix}-new-{i}", c) for i, c in enumerate([*new, tuple(unseen)][:UNSEEN])),
        LabelGroup(f"{prefix}-base", tuple(seen)),
    )


def _superclasses(seed: int) -> Groups:
    """Groups of CIFAR-100: each superclass is one."""
    names = list(cifar.SUPERCLASSES)
    order = [names[i] for i in np.random.RandomState(seed).permutation(len(names))]
    classes = [tuple(("cifar100", name) for name in cifar.SUPERCLASSES[superclass]) for superclass in order]
    count = LIBRARY["cifar100"]
    return Groups(
        tuple(LabelGroup(f"cifar-{i}", c) for i, c in enumerate(classes[:count])),
        tuple(LabelGroup(f"cifar-new-{i}", c) for i, c in enumerate(classes[count:])),
        LabelGroup("cifar-base", sum(classes[:count], ())),
    )


def select(
    found: LabelGroup, split: str, count: int | None, root: str | Path | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Pictures, uint8 [N, H, W] or [N, H, W, 3], and labels, int64 [N], of a group, in the order of the sets' files.

    Args:
        found: The group.
        split: ``train``, ``val`` or ``test``.
        count: Pictures per class, the first ones of it; None = all.
        root: Folder of the sets; None = the cache.

    Raises:
        ValueError: If a file is missing or damaged, or the split has no picture of a class.
    """
    parts, places, labels = [], [], []
    sets = {name: _read(name, split, root) for name in dict.fromkeys(name for name, _ in found.classes)}
    for label, (name, title) in enumerate(found.classes):
        pictures, classes = sets[name]
        names = cifar.CLASSES if name == "cifar100" else mnist.GREY_SETS[name].classes
        mine = (classes == names.index(title)).nonzero()[0][:count]
        if not mine.size:
            raise ValueError(f"the {split} pictures of {name} have none of class {title!r} (group {found.name!r})")
        parts.append(pictures[mine])
        places.append(mine)
        labels.append(np.full(len(mine), label, np.int64))
    order = np.argsort(np.concatenate(places), kind="stable")
    return np.concatenate(parts)[order], np.concatenate(labels)[order]


def _read(name: str, split: str, root: str | Path | None) -> tuple[np.ndarray, np.ndarray]:
    return cifar.read(split, root) if name == "cifar100" else mnist.read(mnist.GREY_SETS[name], split, root)


class LabelGroups(MultiTaskData):
    """The data module of one label group: one classification task, named as the group.

    Training pictures are not changed: a mirrored digit is none.

    Args:
        group: Name of a group, such as ``fashion-3``, ``mnist-new-0`` or ``both-base``; :func:`groups` lists them.
        root: Folder that holds the folders of the image sets; None = the cache (``make fashion-mnist``).
        groups_seed: Which groups there are.
        side: Height and width of the pictures.
        per_class: Training pictures of each class; None = all.
        held_per_class: Validation and test pictures of each class; None = all.
        batch_size: Pictures per batch and process.
        num_workers: Loader processes.
        seed: Seed of order and scoring batches.
        mean: Mean of the input normalisation.
        std: Standard deviation of it.
        subset: Use the first so many training pictures only; None = all.

    Raises:
        ValueError: If there is no such group, or an argument is not allowed.
    """

    name = "labelgroups"

    def __init__(
        self,
        group: str = "fashion-0",
        root: str | Path | None = None,
        groups_seed: int = 0,
        side: int = 32,
        per_class: int | None = 300,
        held_per_class: int | None = 200,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        subset: int | None = None,
    ) -> None:
        self.group = find(group, groups_seed)
        for key, value in (("side", side), ("per_class", per_class), ("held_per_class", held_per_class)):
            if value is not None and value < 1:
                allowed = "at least 1" if key == "side" else "None or at least 1"
                raise ValueError(f"{key} {value}; allowed: {allowed}")
        self.root, self.groups_seed, self.side = root, groups_seed, side
        self.counts = {"train": per_class, "val": held_per_class, "test": held_per_class}
        self.digest = ""
        task = classification([title for _, title in self.group.classes], self.group.name)
        super().__init__([task], batch_size, num_workers, seed, mean, std, subset)

    def load(self) -> dict[str, Split]:
        """The group's pictures of each split.

        Raises:
            ValueError: If a file is missing or damaged.
        """
        digest, found = hashlib.sha256(), {}
        for split in SPLITS:
            pictures, labels = select(self.group, split, self.counts[split], self.root)
            digest.update(pictures.tobytes())
            digest.update(labels.tobytes())
            found[split] = Pictures(pictures.__getitem__, {self.group.name: labels}, self.side, self.mean, self.std)
        self.digest = digest.hexdigest()[:12]
        return {**found, "plain": found["train"]}

    @property
    def description(self) -> dict[str, Any]:
        """Name, seed, pictures per split, group, its classes, side and hash of pictures and labels, for records."""
        facts = super().description
        classes = ["/".join(pair) for pair in self.group.classes]
        return facts | {"group": self.group.name, "classes": classes, "side": self.side, "hash": self.digest}
