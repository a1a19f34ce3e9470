"""Fusion: the scores of several tasks become one ranking over all units.

For task t over the N_t units that it uses, q_t(u) = (descending position of u) / N_t, 1/N_t = best; equal scores share
the worse position. The fused value of a unit is the k-th *smallest* q over the n tasks that use it, with
k = max(1, ceil(share x n)). Cutting at "fused <= r" is exactly voting with per-task masks of keep ratio r:

=========  ==============================================================
share      meaning
=========  ==============================================================
0          union: one task is enough (DiSparse's rule)
0.5        at least half of the tasks (CUT as its figure draws it)
0.51       strict majority
1          intersection: all tasks
=========  ==============================================================

A fusion rule gives a :class:`Ranking`, which is never sorted as a whole: :mod:`cut.budget` finds its best units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cut.scores import Scores

FUSED = "fused"


@dataclass(frozen=True)
class Ranking:
    """One order over all units, best first: by fused value, then by index.

    Attributes:
        scores: Task to parameter name to score. Units of one parameter are used by the same tasks.
        share: The vote share in [0, 1] that orders the units which several tasks use.
    """

    scores: dict[str, Scores]
    share: float = 0.0

    def __post_init__(self) -> None:
        if not self.scores or not any(self.scores.values()):
            raise ValueError(f"no scores to rank: got tasks {sorted(self.scores)}")
        for task, scores in self.scores.items():
            for name, value in scores.items():
                if not torch.isfinite(value).all():
                    raise ValueError(f"score of task {task!r}, parameter {name!r}, holds a number that is not finite")

    def tasks_of(self) -> dict[str, tuple[str, ...]]:
        """Parameter name to the tasks that use it, in a fixed order of parameters that no order of tasks changes."""
        names = {name: None for task in sorted(self.scores) for name in self.scores[task]}
        by_name = {n: tuple(t for t in sorted(self.scores) if n in self.scores[t]) for n in names}
        # The order of units breaks ties, so it must not depend on how the tasks are called or listed.
        return {n: by_name[n] for n in sorted(by_name)}

    def votes_needed(self, tasks: int) -> int:
        """How many of ``tasks`` must want a unit: k = max(1, ceil(share x n - 1e-9)).

        Example:
            >>> r = Ranking({"a": {"w": torch.ones(1)}}, share=0.5)
            >>> [r.votes_needed(n) for n in (1, 2, 3, 4, 5)]
            [1, 1, 2, 2, 3]
        """
        return max(1, math.ceil(self.share * tasks - 1e-9))

    def values(self) -> dict[str, Tensor]:
        """The fused value of every unit, float64 in (0, 1], smaller = better. Sorts everything: for analysis."""
        ranks = {task: percentiles(scores) for task, scores in self.scores.items()}
        fused = {}
        for name, tasks in self.tasks_of().items():
            stacked = torch.stack([ranks[t][name] for t in tasks])
            fused[name] = stacked.kthvalue(self.votes_needed(len(tasks)), dim=0).values
        return fused


def percentiles(scores: Scores) -> dict[str, Tensor]:
    """The q of every unit of one task: its descending position / the number of units, float64; ties share the worse.

    Example:
        >>> percentiles({"w": torch.tensor([3.0, 1.0, 2.0, 2.0])})["w"].tolist()
        [0.25, 1.0, 0.75, 0.75]
    """
    flat = torch.cat([s.flatten().float() for s in scores.values()])
    ascending = flat.sort().values
    position = len(flat) - torch.searchsorted(ascending, flat, side="left")
    q = position.double() / len(flat)
    parts = q.split([s.numel() for s in scores.values()])
    return {name: part.reshape(s.shape) for (name, s), part in zip(scores.items(), parts, strict=True)}


def normalised(scores: Scores) -> Scores:
    """One task's scores divided by their sum.

    A score below zero marks a unit that is cut already; it is not counted and stays below zero.
    """
    total = sum(float(s.double().clamp_min(0).sum()) for s in scores.values()) or 1.0
    return {n: (s.double() / total).float() for n, s in scores.items()}


class Fusion(Protocol):
    """A callable that turns the scores of several tasks into one ranking."""

    def __call__(self, scores: Mapping[str, Scores]) -> Ranking:
        """One ranking over all units of all tasks."""
        ...


class Vote:
    """Order statistics of percentile ranks: voting among the tasks without a tuned keep ratio.

    Args:
        share: The share of the tasks that must want a unit; 0 = union, 0.5 = at least half, 1 = intersection.
    """

    def __init__(self, share: float = 0.5) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"vote share {share}; allowed: 0 to 1")
        self.share = share

    def __call__(self, scores: Mapping[str, Scores]) -> Ranking:
        """The ranking by the k-th smallest percentile over the tasks that use a unit."""
        return Ranking(dict(scores), self.share)


class FallingVote:
    """A vote share that falls with the sparsity: few weights left are not shared out by majority.

    Args:
        start: The share at sparsity 0.
        end: The share at sparsity 1; in between it changes linearly.

    Example:
        >>> FallingVote(1.0, 0.0).at(0.75).share
        0.25
    """

    def __init__(self, start: float = 1.0, end: float = 0.0) -> None:
        for share in (start, end):
            if not 0 <= share <= 1:
                raise ValueError(f"vote share {share}; allowed: 0 to 1")
        self.start, self.end = start, end

    def at(self, sparsity: float | None) -> Vote:
        """The vote at a sparsity; without one, at the end of the fall."""
        progress = 1.0 if sparsity is None or not 0 <= sparsity <= 1 else sparsity
        return Vote(self.start + (self.end - self.start) * progress)

    def __call__(self, scores: Mapping[str, Scores]) -> Ranking:
        """The ranking at the end of the fall."""
        return self.at(None)(scores)


def _gathered(scores: Mapping[str, Scores]) -> dict[str, list[tuple[str, Tensor]]]:
    """Parameter name to the normalised scores of each task that uses it."""
    by_name: dict[str, list[tuple[str, Tensor]]] = {}
    for task in sorted(scores):
        for name, value in normalised(scores[task]).items():
            by_name.setdefault(name, []).append((task, value))
    return by_name


class Mean:
    """The mean of the normalised scores over the tasks that use a unit."""

    def __call__(self, scores: Mapping[str, Scores]) -> Ranking:
        """The ranking by mean normalised score."""
        fused = {n: torch.stack([v for _, v in vs]).mean(0) for n, vs in _gathered(scores).items()}
        return Ranking({FUSED: fused})


class Max:
    """The largest of the normalised scores over the tasks that use a unit."""

    def __call__(self, scores: Mapping[str, Scores]) -> Ranking:
        """The ranking by largest normalised score."""
        return Ranking({FUSED: {n: torch.stack([v for _, v in vs]).amax(0) for n, vs in _gathered(scores).items()}})


class Weighted:
    """The weighted sum of the normalised scores over the tasks that use a unit.

    Args:
        weights: Task to its weight, for instance its loss weight; all positive.
    """

    def __init__(self, weights: dict[str, float]) -> None:
        bad = {t: w for t, w in weights.items() if w <= 0}
        if bad:
            raise ValueError(f"task weights must be positive; got {bad}")
        self.weights = dict(weights)

    def __call__(self, scores: Mapping[str, Scores]) -> Ranking:
        """The ranking by weighted sum of normalised scores.

        Raises:
            ValueError: If a task has no weight.
        """
        missing = sorted(set(scores) - set(self.weights))
        if missing:
            raise ValueError(f"no weight for task {missing[0]!r}; there are weights for {sorted(self.weights)}")
        fused = {n: torch.stack([v * self.weights[t] for t, v in vs]).sum(0) for n, vs in _gathered(scores).items()}
        return Ranking({FUSED: fused})
