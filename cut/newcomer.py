"""Newcomer: a new task with a few labelled pictures, and its labels as classes or as numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cut.decomposition import Inputs, Loss
from cut.library import Entry
from cut.scores import Scores

IGNORE = 255  # of a class: not labelled, as in cut.metrics
GRID = 4  # cells a side that a dense label is averaged over


@dataclass(frozen=True)
class Newcomer:
    """A new task, and the library that it is compared with.

    Attributes:
        model: The pre-trained model with the new task's head (and those of library tasks, where a measure needs them).
        batches: A few labelled batches of the new task, on the model's device.
        losses: Task to loss; the new task's, and those of library tasks, where a measure needs them.
        task: The new task's name.
        entries: The library's entries.
        scores: The new task's scores of weights, if a cheap first mask is at hand.
        inputs: How to get the network's input from a batch.
    """

    model: nn.Module
    batches: Sequence[Any]
    losses: Mapping[str, Loss]
    task: str
    entries: Sequence[Entry]
    scores: Scores | None = None
    inputs: Inputs | None = None


@contextmanager
def running(model: nn.Module) -> Iterator[None]:
    """Run the block with all heads of a model of ours running, whatever is selected; others are left as they are."""
    heads, active, select = (getattr(model, name, None) for name in ("heads", "active", "select"))
    if not (isinstance(heads, nn.ModuleDict) and isinstance(active, list) and callable(select)):
        yield
        return
    select(list(heads))
    try:
        yield
    finally:
        select(active)


def label_of(batch: Any, task: str) -> Tensor:
    """A batch's label of a task: ``batch[task]``, or of a pair ``batch[1][task]`` or ``batch[1]``.

    Raises:
        ValueError: If there is none.
    """
    labels = batch if isinstance(batch, Mapping) else batch[1] if isinstance(batch, Sequence) and len(batch) > 1 else {}
    label = labels.get(task) if isinstance(labels, Mapping) else labels
    if not isinstance(label, Tensor) or not label.dim():
        kinds = sorted(labels) if isinstance(labels, Mapping) else type(labels).__name__
        raise ValueError(f"the batch has no label {task!r}; found {kinds}, expected a tensor with a row a picture")
    return label


def class_labels(batch: Any, task: str) -> Tensor:
    """Labels that are classes, int64 [n] or [n, h, w].

    Raises:
        ValueError: If there are none, or they are of another kind.
    """
    label = label_of(batch, task)
    if label.is_floating_point() or label.is_complex() or label.dtype == torch.bool:
        raise ValueError(
            f"labels of task {task!r} are {label.dtype}; allowed: whole numbers, one class a picture or pixel. "
            "For other labels use CKA, MaskOverlap or GradientCosine"
        )
    return label.long()


def label_matrix(label: Tensor, task: str = "") -> Tensor:
    """Labels as numbers [n, q]: classes one-hot, 255 and below 0 as zeros; dense labels averaged over 4 x 4 cells.

    Raises:
        ValueError: If they are neither classes nor real numbers, or have more than four dimensions.
    """
    if label.is_complex() or label.dim() > 4:
        raise ValueError(
            f"labels of task {task!r} are {label.dtype} of shape {tuple(label.shape)}; "
            "allowed: classes or numbers, [n], [n, q], [n, h, w] or [n, c, h, w]"
        )
    if label.is_floating_point() or label.dtype == torch.bool:
        values = label.double().nan_to_num(0.0, 0.0, 0.0)
        values = values.unsqueeze(1) if values.dim() == 3 else values
    else:
        classes = label.long()
        known = (classes >= 0) & (classes != IGNORE)
        hot = F.one_hot(classes.where(known, torch.zeros_like(classes))).double() * known.unsqueeze(-1)
        values = hot.movedim(-1, 1)
        values = values.flatten(1, 2) if values.dim() == 5 else values
    return F.adaptive_avg_pool2d(values, GRID).flatten(1) if values.dim() == 4 else values.reshape(len(values), -1)


def aligned(parts: Sequence[Tensor]) -> list[Tensor]:
    """One-hot parts of batches that saw other highest classes, filled up with zeros to the same width."""
    widest = max(p.shape[1] for p in parts)
    return [F.pad(p, (0, widest - p.shape[1])) for p in parts]
