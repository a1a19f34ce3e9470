"""Poll: neighbours vote on what a new task needs of the pre-trained model.

A unit's vote is the weighted share of the neighbours whose masks keep it; equal votes are ordered by a second key of
the new task. That is one ranking of all units, so one pass serves every size, and a smaller sub-network lies within a
larger one. See :mod:`cut.neighbours` for where the neighbours come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from cut.fusion import FUSED, Ranking, Vote, percentiles
from cut.scores import Scores

HeadRank = Literal["apart", "joint"]
_START = "neighbour"
STEPS = 1 << 20  # of a vote's weight


@dataclass(frozen=True)
class Neighbour:
    """Whose mask votes and how; scores are kept by text, so :attr:`key` writes it down and :meth:`of` reads it.

    Attributes:
        name: Of the neighbour, without a colon.
        weight: Of its vote, above 0. Weights are rounded to :data:`STEPS`, so that sums of them are exact and no order
            of neighbours matters.
        whole: Whether its mask cuts whole units, so that a unit with any weight left is a kept one.
        soft: Whether its values are 1 - percentile instead of a mask's 0 and 1.

    Example:
        >>> Neighbour("seg-1", 0.5, whole=True).key, Neighbour.of("all")
        ('neighbour:seg-1:0.5:units', None)
        >>> Neighbour.of("neighbour:seg-1:0.5:units")
        Neighbour(name='seg-1', weight=0.5, whole=True, soft=False)
    """

    name: str
    weight: float = 1.0
    whole: bool = False
    soft: bool = False

    @property
    def key(self) -> str:
        """The key of its scores."""
        kind = "+".join(k for k, on in (("units", self.whole), ("ranks", self.soft)) if on) or "weights"
        return f"{_START}:{self.name}:{max(1, round(self.weight * STEPS)) / STEPS!r}:{kind}"

    @classmethod
    def of(cls, key: str) -> Neighbour | None:
        """The neighbour of a key; None for the key of a task."""
        start, *rest = key.split(":")
        if start != _START or len(rest) != 3:
            return None
        return cls(rest[0], float(rest[1]), "units" in rest[2], "ranks" in rest[2])


def votes(entries: Mapping[str, Scores], weights: Mapping[str, float], share: float | None = None) -> dict[str, Tensor]:
    """The vote on every unit, float64; larger = more wanted.

    Args:
        entries: Neighbour to parameter (or group) name to a value in [0, 1], 1 = kept.
        weights: Neighbour to the weight of its vote, above 0; they need not sum to 1.
        share: None: the weighted mean of the values, which for masks is the chance that a neighbour keeps the unit.
            Else the largest value that neighbours of at least this share of the weight reach, which for percentiles is
            CUT's vote (:mod:`cut.fusion`).

    Returns:
        Name to votes. Neighbours that have no value for a name do not count there.
    """
    names = sorted({n for per in entries.values() for n in per})
    result = {}
    for name in names:
        mine = [k for k in entries if name in entries[k]]
        stacked = torch.stack([entries[k][name].double() for k in mine])
        column = torch.tensor([weights[k] for k in mine], dtype=torch.float64, device=stacked.device)
        total = column.sum()
        column = column.view(-1, *[1] * (stacked.dim() - 1))
        if share is None:
            result[name] = (stacked * column).sum(0) / total
        else:
            values, order = stacked.sort(0, descending=True)
            reached = column.expand_as(stacked).gather(0, order).cumsum(0) >= (share - 1e-9) * total
            reached[-1] = True  # whatever rounding says
            result[name] = values.gather(0, reached.to(torch.uint8).argmax(0, keepdim=True))[0]
    return result


def ordered(first: Mapping[str, Tensor], second: Mapping[str, Tensor] | None = None) -> Scores:
    """One score for every unit, no two alike: by the first key, then the second, then the index.

    Args:
        first: Name to values, larger = better.
        second: Likewise, of the same names; None for none.

    Returns:
        Name to int32 places, the best has the highest and the last one 0; not to be summed. A selection compares them
        as float32, so beyond 2^24 units neighbours in the order may be taken in the order of their index instead.

    Example:
        >>> ordered({"w": torch.tensor([1.0, 2.0, 1.0])}, {"w": torch.tensor([3.0, 0.0, 4.0])})["w"].tolist()
        [0, 2, 1]
    """
    names = sorted(first)
    flat = torch.cat([first[n].flatten().double() for n in names])
    order = torch.arange(len(flat), device=flat.device)
    if second is not None:
        ties = torch.cat([second[n].flatten() for n in names]).to(flat.device)
        order = ties.sort(descending=True, stable=True).indices
    order = order[flat[order].sort(descending=True, stable=True).indices]
    place = torch.empty(len(flat), dtype=torch.int32, device=flat.device)
    place[order] = torch.arange(len(flat) - 1, -1, -1, dtype=torch.int32, device=flat.device)
    parts = place.split([first[n].numel() for n in names])
    return {n: part.view(first[n].shape) for n, part in zip(names, parts, strict=True)}


def score_mask(
    entries: Mapping[str, Scores],
    weights: Mapping[str, float],
    tie: Mapping[str, Tensor] | None = None,
    share: float | None = None,
) -> Scores:
    """The score mask: one ranking of all units by the neighbours' vote, equal votes by a second key.

    Args:
        entries: See :func:`votes`.
        weights: Likewise.
        tie: Name to the second key, larger = better; None breaks ties by index.
        share: See :func:`votes`.

    Returns:
        Name to int32, see :func:`ordered`.
    """
    return ordered(votes(entries, weights, share), tie)


class Poll:
    """The fusion of :class:`SimilarTasks`: neighbours vote, the new task's own scores break ties and rank its head.

    Units that no neighbour knows (the new head's) have no votes. They get what a neighbour's own head would have got:
    the best of them by the new task's scores count as kept, as large a share as the neighbour keeps of what it knows;
    or, where neighbours vote by percentiles, their own percentiles.

    Scores without a neighbour are fused by CUT's vote, so that the same fusion serves the cuts after a first one.

    Args:
        share: See :func:`votes`; for a neighbour's vote by mask None is the natural choice.
        tie: Whether the new task's scores break ties; else the index does.
        head: Whether units that no neighbour knows are ranked among themselves (``"apart"``) or among all that the new
            task uses (``"joint"``, as CUT does).

    Raises:
        ValueError: For a share outside [0, 1] or another ``head``.
    """

    def __init__(self, share: float | None = None, tie: bool = True, head: HeadRank = "apart") -> None:
        if share is not None and not 0 <= share <= 1:
            raise ValueError(f"vote share {share}; allowed: None (the mean vote) or 0 to 1")
        if head not in get_args(HeadRank):
            raise ValueError(f"head {head!r}; allowed: {', '.join(map(repr, get_args(HeadRank)))}")
        self.share, self.tie, self.head = share, tie, head

    def __call__(self, scores: Mapping[str, Scores]) -> Ranking:
        """The ranking by vote, then by the new task's own scores, then by index.

        A value below zero marks a unit that is cut already; it comes after all others.
        """
        neighbours = {k: v for k in scores if scores[k] and (v := Neighbour.of(k)) is not None}
        own = {k: per for k, per in scores.items() if per and Neighbour.of(k) is None}
        chosen = Vote(0.5 if self.share is None else self.share)
        if not neighbours:
            return chosen(own)
        known = {n for k in neighbours for n in scores[k]}
        ballots = {k: _ballot(scores[k], v) for k, v in neighbours.items()}
        new = sorted({n for per in own.values() for n in per} - known)
        # Percentiles take a sort, and a single task's raw scores break ties as well as they do.
        several = len(own) > 1 and self.tie
        ranks = chosen(own).values() if several or (new and self.head == "joint") else {}
        if self.head == "apart" and new:
            apart = {t: {n: s for n, s in per.items() if n not in known} for t, per in own.items()}
            ranks |= chosen({t: per for t, per in apart.items() if per}).values()
        for key, voter in neighbours.items():
            density = _density(ballots[key])
            soft = _is_soft(voter, scores[key])
            for name in new:
                ballots[key][name] = 1 - ranks[name] if soft else (ranks[name] <= density).double()
        first = votes(ballots, {k: v.weight for k, v in neighbours.items()}, self.share)
        gone = _gone(scores)
        first = {n: v.masked_fill(gone[n], -1.0) if n in gone else v for n, v in first.items()}
        if not (self.tie and own):
            return Ranking({FUSED: ordered(first)})
        second = {n: -q for n, q in ranks.items()} if several else next(iter(own.values()))
        # What a neighbour knows and the new task does not use comes last among equals.
        ties = {n: second[n] if n in second else torch.full_like(v, -torch.inf) for n, v in first.items()}
        return Ranking({FUSED: ordered(first, ties)})


def _is_soft(voter: Neighbour, values: Scores) -> bool:
    """Whether a neighbour votes by percentiles: as asked, or of masks over weights whose units are counted."""
    reduced = all(v.dim() == 1 for v in values.values())  # units are; weights have rows and columns
    return voter.soft or (reduced and not voter.whole)


def _ballot(values: Scores, voter: Neighbour) -> Scores:
    """A neighbour's values in [0, 1] of weights or, reduced within them, of units."""
    if not all(v.dim() == 1 for v in values.values()):
        return {n: v.double().clamp_min(0) for n, v in values.items()}
    if voter.whole and not voter.soft:
        return {n: (v > 0).double() for n, v in values.items()}
    return {n: 1 - q for n, q in percentiles(values).items()}


def _density(ballot: Scores) -> float:
    """The share that a ballot keeps."""
    return sum(float(v.sum()) for v in ballot.values()) / max(1, sum(v.numel() for v in ballot.values()))


def _gone(scores: Mapping[str, Scores]) -> dict[str, Tensor]:
    """Units with a score below zero: they are cut already."""
    found: dict[str, Tensor] = {}
    for per in scores.values():
        for name, value in per.items():
            found[name] = (found[name] | (value < 0)) if name in found else value < 0
    return found
