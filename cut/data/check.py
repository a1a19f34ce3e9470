"""Check: open every file of a published data set and list all that is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cut.data.cityscapes import Cityscapes
from cut.data.files import Example, Layout, detect, repeats
from cut.data.nyuv2 import NYUv2
from cut.data.published import Published
from cut.data.taskonomy import Taskonomy, class_weights

Progress = Callable[[list[Example]], Iterable[Example]]
SETS: dict[str, type[Published]] = {loader.name: loader for loader in (NYUv2, Cityscapes, Taskonomy)}


@dataclass
class Report:
    """What a set holds and what is wrong with it.

    Attributes:
        name: ``nyuv2``, ``cityscapes`` or ``taskonomy``.
        layout: The layout's name.
        size: Height and width of its pictures.
        published: Height and width as published.
        pictures: Pictures per split, validation apart.
        classes: How many of the segmentation's classes occur.
        of_classes: How many there are.
        wrong: One line for each thing that is wrong, with the file's name.
        warnings: One line for each thing that the published protocol takes as it is.
    """

    name: str
    layout: str
    size: tuple[int, int] | None
    published: tuple[int, int]
    pictures: dict[str, int]
    classes: int
    of_classes: int
    wrong: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """One line."""
        size = "no readable picture" if self.size is None else "{}x{}".format(*self.size)
        if self.size not in (None, self.published):
            size += " (published: {}x{})".format(*self.published)
        counts = ", ".join(f"{n} {split}" for split, n in self.pictures.items())
        return (
            f"{SETS[self.name].title} in {self.layout}'s layout: {counts} pictures of {size}, "
            f"{self.classes} of {self.of_classes} classes seen"
        )


def which(root: Path, name: str | None = None) -> tuple[str, Layout]:
    """The set, and the layout, that a folder holds.

    Args:
        root: The folder.
        name: The set, if it is known.

    Raises:
        ValueError: If it is none, or the name is unknown.
    """
    if name is not None and name not in SETS:
        raise ValueError(f"set {name!r}; allowed: {', '.join(SETS)}")
    for known in SETS if name is None else (name,):
        for layout in SETS[known].layouts:
            if layout.there(root):
                return known, layout
    if name is not None:
        detect(root, SETS[name].layouts, SETS[name].title, SETS[name].source)
    found = sorted(p.name for p in root.iterdir())[:5] if root.is_dir() else []
    kinds = "; or ".join(layout.expected for loader in SETS.values() for layout in loader.layouts)
    held = ", ".join(found) or "nothing"
    raise ValueError(f"{root} is no data set that is known here: it holds {held}; known: {kinds}")


def check(root: str | Path, name: str | None = None, progress: Progress = list, legacy: bool = False) -> Report:
    """Open every file of a set, and compare its lists.

    Args:
        root: Its folder.
        name: ``nyuv2``, ``cityscapes`` or ``taskonomy``; None finds out.
        progress: Wraps the examples.
        legacy: For the published protocol: what its index lists more than once is a warning.

    Returns:
        What it holds, and everything that is wrong.

    Raises:
        ValueError: If it is no such set, or its index cannot be read.
    """
    root = Path(root)
    name, layout = which(root, name)
    listed = {split: layout.examples(root, split) for split in ("train", "test")}
    val = sum(e.is_validation for e in listed["train"])
    pictures = {"train": len(listed["train"]) - val, "val": val, "test": len(listed["test"])}
    report = Report(name, type(layout).__name__, None, layout.size, pictures, 0, len(layout.classes))
    report.wrong += [f"{root}: no pictures for split {split!r}" for split, count in pictures.items() if not count]
    within, across = repeats(root / layout.marker, listed)
    (report.warnings if legacy else report.wrong).extend(across + within)
    if name == Taskonomy.name:
        report.wrong += _messages(lambda: class_weights(root))
    seen = torch.zeros(len(layout.classes), dtype=torch.bool)
    examples = [e for part in listed.values() for e in part]
    for example in progress(examples):
        for key in ("image", *SETS[name].lambdas):
            report.wrong += _messages(partial(_check_file, report, layout, example, key, seen))
    report.classes = int(seen.sum())
    return report


def _messages(action: Callable[[], Any]) -> list[str]:
    """What an action complains about."""
    try:
        action()
    except ValueError as error:
        return [str(error)]
    return []


def _check_file(report: Report, layout: Layout, example: Example, key: str, seen: Tensor) -> None:
    """One file: readable, of the set's size, with values that the set can have.

    Raises:
        ValueError: Naming the file and what is wrong.
    """
    path = example.files[key]
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    array = layout.array(example, key)
    size = (int(array.shape[0]), int(array.shape[1]))
    report.size = report.size or size
    if size != report.size:
        raise ValueError(f"{path} is {size[0]}x{size[1]}; the others are {report.size[0]}x{report.size[1]}")
    if key == "image":
        return
    try:
        label = layout.label(key, array, False, False)
    except ValueError as error:
        raise ValueError(f"{path} holds {error}") from error
    if key == "seg":
        present = label.unique()
        seen[present[present < len(seen)]] = True
    known = (label != 255) if key == "seg" else (label != 0).any(0) if key == "normal" else label > 0
    if key in ("seg", "normal", "depth") and not known.any():
        raise ValueError(f"{path} has no pixel with a known label")
