"""Merging: one network out of several that were each trained for one task from one common start.

All functions are pure and work on states, ``{name: Tensor}``. What a training changed, ``theta_t - theta_0``, is its
*task vector*; a rule makes one change of all of them, and the merged state is ``theta_0 + scale x change``. At scale 0
that is the start. Only entries of floating point are merged; others (a norm's counter) are those of the start.

Rules: the average; the sum, which is task arithmetic (arXiv 2212.04089); TIES (arXiv 2306.01708): the baselines that
arXiv 2310.04742 compares itself with. The scale is chosen on validation data only, by :func:`choose_scale`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from cut.selection import Mask

State = Mapping[str, Tensor]
Combine = Literal["union", "intersection"]
SCALES = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)


def _same_names(first: State, other: State, what: str) -> None:
    different = sorted(first.keys() ^ other.keys())
    if different:
        raise ValueError(f"{what} is of another network: {len(different)} names differ, the first is {different[0]!r}")
    for name, value in first.items():
        if value.shape != other[name].shape:
            shapes = f"{tuple(other[name].shape)}, not {tuple(value.shape)}"
            raise ValueError(f"{what} is of another network: {name!r} has shape {shapes}")


def common_start(starts: Mapping[str, State]) -> dict[str, Tensor]:
    """The one state that all trainings started from.

    Args:
        starts: Task to the state before its training.

    Raises:
        ValueError: If there is none, or two differ in a name, a shape or a number; task vectors of different starts do
            not add up.
    """
    if not starts:
        raise ValueError("no models to merge; allowed: at least one")
    (task, first), *others = starts.items()
    for other, state in others:
        _same_names(first, state, f"the start of {other!r}")
        wrong = next((n for n, v in first.items() if not torch.equal(v, state[n])), None)
        if wrong is not None:
            raise ValueError(f"{task!r} and {other!r} did not start from the same weights: {wrong!r} differs")
    return dict(first)


def task_vectors(start: State, models: Mapping[str, State]) -> dict[str, dict[str, Tensor]]:
    """Task to what its training changed, in double precision; entries of floating point only.

    Raises:
        ValueError: If there are no models, or names or shapes differ.
    """
    if not models:
        raise ValueError("no models to merge; allowed: at least one")
    for task, model in models.items():
        _same_names(start, model, f"the model of {task!r}")
    names = [n for n, v in start.items() if v.is_floating_point()]
    return {t: {n: model[n].double() - start[n].double() for n in names} for t, model in models.items()}


class Rule(Protocol):
    """A callable that makes one change of several."""

    def __call__(self, vectors: Mapping[str, State]) -> dict[str, Tensor]:
        """Task to its task vector -> the merged change, before any scale."""
        ...


class Average:
    """The mean of the task vectors: at scale 1 the mean of the models."""

    def __call__(self, vectors: Mapping[str, State]) -> dict[str, Tensor]:
        """Name to mean."""
        return {n: torch.stack([v[n] for v in vectors.values()]).mean(0) for n in next(iter(vectors.values()))}


class Arithmetic:
    """The sum of the task vectors (task arithmetic)."""

    def __call__(self, vectors: Mapping[str, State]) -> dict[str, Tensor]:
        """Name to sum."""
        return {n: torch.stack([v[n] for v in vectors.values()]).sum(0) for n in next(iter(vectors.values()))}


class Ties:
    """Trim, elect signs, merge: of each task vector only the largest entries, and of these only those that agree.

    Every task keeps its entries of largest magnitude, over all names together; among equal ones the first. An entry's
    sign is that of the sum over tasks; the merged change is the mean over the tasks whose kept entry has this sign,
    zero where the sum is zero.

    Args:
        share: Share of each task vector's entries that is kept, in (0, 1].
    """

    def __init__(self, share: float = 0.2) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"share {share}; allowed: above 0, up to 1 (a share of each task's changes)")
        self.share = share

    def __call__(self, vectors: Mapping[str, State]) -> dict[str, Tensor]:
        """Name to merged change."""
        first = next(iter(vectors.values()))
        flat = torch.stack([self._trim(torch.cat([v[n].flatten() for n in first])) for v in vectors.values()])
        sign = flat.sum(0).sign()
        agree = (flat.sign() == sign) & (flat != 0)
        merged = torch.where(agree, flat, 0).sum(0) / agree.sum(0).clamp_min(1)
        parts = merged.split([v.numel() for v in first.values()])
        return {n: part.view_as(v) for (n, v), part in zip(first.items(), parts, strict=True)}

    def _trim(self, vector: Tensor) -> Tensor:
        count = max(1, round(self.share * vector.numel())) if vector.numel() else 0
        kept = vector.abs().argsort(descending=True, stable=True)[:count]
        return torch.zeros_like(vector).index_copy(0, kept, vector[kept])


def merge(
    start: State,
    models: Mapping[str, State],
    rule: Rule,
    scale: float = 1.0,
    averaged: Collection[str] = (),
) -> dict[str, Tensor]:
    """``start + scale x rule(task vectors)``, in the start's types.

    Args:
        start: What all models were trained from, see :func:`common_start`.
        models: Task to its state, of the same names and shapes.
        rule: How the changes become one.
        scale: At least 0; 0 gives the start to the bit.
        averaged: Names that lie between start and models whatever the rule: ``start + min(scale, 1) x mean change``.
            For a norm's running statistics: a sum of changes could make a variance negative.

    Raises:
        ValueError: If the scale is negative or not finite, there are no models, or names or shapes differ.
    """
    if not 0 <= scale < math.inf:
        raise ValueError(f"scale {scale}; allowed: a number of at least 0")
    vectors = task_vectors(start, models)
    unknown = sorted(set(averaged) - set(start))
    if unknown:
        raise ValueError(f"averaged names {unknown[0]!r}, which the models lack")
    first = next(iter(vectors.values()))
    plain = [n for n in first if n not in averaged]
    change = rule({t: {n: v[n] for n in plain} for t, v in vectors.items()}) if plain else {}
    change = {n: scale * v for n, v in change.items()}
    mean = Average()({t: {n: v[n] for n in first if n in averaged} for t, v in vectors.items()})
    change |= {n: min(scale, 1.0) * v for n, v in mean.items()}
    return {n: (v.double() + change[n]).to(v.dtype) if n in change else v.clone() for n, v in start.items()}


def choose_scale(
    merged: Callable[[float], State], quality: Callable[[State], float], scales: Sequence[float] = SCALES
) -> tuple[float, State]:
    """The scale whose merged model is best, and that model; of equally good scales the smallest.

    Args:
        merged: Scale to merged state.
        quality: Larger is better; on validation data, never on test data. A quality that is not a number is never best.
        scales: At least one.

    Raises:
        ValueError: If there are no scales, or no quality is a number.
    """
    if not scales:
        raise ValueError("no scales to choose from; allowed: at least one")
    best: tuple[float, float, State] | None = None
    for scale in sorted(scales):
        state = merged(scale)
        found = quality(state)
        if not math.isnan(found) and (best is None or found > best[0]):
            best = (found, scale, state)
    if best is None:
        raise ValueError(f"no merged model has a quality that is a number; the scales were {list(scales)}")
    return best[1:]


def masked(state: State, mask: Mask) -> dict[str, Tensor]:
    """A state with what the mask cuts set to zero; entries that the mask does not name stay.

    Raises:
        ValueError: If the mask names an entry that the state lacks or has another shape.
    """
    for name, kept in mask.items():
        if name not in state or state[name].shape != kept.shape:
            raise ValueError(f"the mask is of another network: {name!r} is missing there or has another shape")
    return {n: torch.where(mask[n], v, torch.zeros_like(v)) if n in mask else v.clone() for n, v in state.items()}


def combined(masks: Mapping[str, Mask], combine: Combine = "union") -> Mask:
    """One mask of several of the same names: kept is what any (union) or every (intersection) task keeps.

    Raises:
        ValueError: If there are no masks, their names or shapes differ, or for another way to combine.
    """
    if combine not in get_args(Combine):
        raise ValueError(f"combine {combine!r}; allowed: {', '.join(map(repr, get_args(Combine)))}")
    if not masks:
        raise ValueError("no masks to combine; allowed: at least one")
    first = next(iter(masks.values()))
    for task, mask in masks.items():
        _same_names(first, mask, f"the mask of {task!r}")
    stacked = {n: torch.stack([m[n] for m in masks.values()]) for n in first}
    return {n: s.any(0) if combine == "union" else s.all(0) for n, s in stacked.items()}


def merge_then_cut(
    start: State,
    models: Mapping[str, State],
    rule: Rule,
    cut: Callable[[State], Mask],
    scale: float = 1.0,
    averaged: Collection[str] = (),
) -> tuple[dict[str, Tensor], Mask]:
    """Merge the models, then cut what came out.

    Args:
        start: See :func:`merge`, as for all but ``cut``.
        models: Task to its state.
        rule: How the changes become one.
        cut: The merged state to a mask, True = kept.
        scale: Of the change.
        averaged: Names that are averaged whatever the rule.

    Returns:
        The cut state and its mask.
    """
    state = merge(start, models, rule, scale, averaged)
    mask = cut(state)
    return masked(state, mask), mask


def cut_then_merge(
    start: State,
    models: Mapping[str, State],
    masks: Mapping[str, Mask],
    rule: Rule,
    scale: float = 1.0,
    combine: Combine = "union",
    averaged: Collection[str] = (),
) -> tuple[dict[str, Tensor], Mask]:
    """Merge models that were each cut by a mask of their own.

    A model has no say on a weight that it cut: its change there counts as zero. In the end the masks' union or
    intersection is kept, all else is zero. A union keeps more than each model does, an intersection less: only equal
    masks keep the size.

    Args:
        start: See :func:`merge`, as for all but ``masks`` and ``combine``.
        models: Task to its state.
        masks: Task to its mask, of the same tasks.
        rule: How the changes become one.
        scale: Of the change.
        combine: What the merged model keeps.
        averaged: Names that are averaged whatever the rule.

    Returns:
        The cut state and its mask.

    Raises:
        ValueError: If the tasks differ, or see :func:`merge`, :func:`combined` and :func:`masked`.
    """
    if set(masks) != set(models):
        raise ValueError(f"masks are of {sorted(masks)}, models of {sorted(models)}; allowed: the same tasks")
    mask = combined(masks, combine)
    masked(start, mask)  # refuses a mask of another network
    own: dict[str, dict[str, Tensor]] = {}
    for task, model in models.items():
        _same_names(start, model, f"the model of {task!r}")
        kept = masks[task]
        own[task] = {n: torch.where(kept[n], v, start[n]) if n in kept else v for n, v in model.items()}
    return masked(merge(start, own, rule, scale, averaged), mask), mask
