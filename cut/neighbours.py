"""Neighbours: a task that the model was never trained for is pruned by the masks of similar tasks.

Similar-task voting, after the abstracts of arXiv 2307.04365 and 2301.11560; their formulas are not public, so every
choice here is ours. Of a library of masks over the pre-trained model, those of the K tasks most similar to the new one
vote on every unit; one cut along that ranking gives a sub-network of any size, with the pre-trained weights.

Two parts work together: the scorer :class:`SimilarTasks` finds the neighbours and hands on their masks with the new
task's own scores, the fusion :class:`cut.poll.Poll` lets them vote. Between the two, scores are reduced within units
where whole units are cut, so the vote is over whatever is cut: weights, channels, attention heads or neurons.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, Literal, get_args

import torch
from torch import nn

from cut.decomposition import Inputs, Loss, check_tasks, prunable
from cut.library import Entry, Library, check_base
from cut.masks import apply_mask, make_mask
from cut.newcomer import Newcomer
from cut.poll import Neighbour, Poll
from cut.scores import JOINT, Scores, sensitivity
from cut.selection import Mask
from cut.similarity import MaskOverlap, Similarity
from cut.structured import Channels, chosen_units, make_unit_mask

Tie = Literal["magnitude", "taylor"]


def nearest(
    entries: Sequence[Entry], similarities: Mapping[str, float], k: int | None = None, temperature: float | None = None
) -> list[tuple[Entry, float]]:
    """The K nearest entries with the weights of their votes, which sum to 1.

    Args:
        entries: All there are.
        similarities: Entry name to similarity; those that are not finite are left out.
        k: How many; None = all. Where there are fewer, those vote. Equal ones are told apart by content.
        temperature: None: all weigh the same. Else the softmax of similarity / temperature.

    Raises:
        ValueError: If no similarity is finite, or all are the same so that there are no K *nearest*.
    """
    usable = [e for e in entries if math.isfinite(similarities[e.name])]
    if not usable:
        raise ValueError(f"no similar task: no similarity is finite: {dict(similarities)}")
    values = {similarities[e.name] for e in usable}
    if k is not None and k < len(usable) and len(values) == 1:
        raise ValueError(
            f"no similar task: all {len(usable)} similarities are {values.pop():g}, so no {k} are nearest; "
            "let all vote (k=None), or choose another similarity"
        )
    usable.sort(key=lambda e: (-similarities[e.name], e.digest, e.name))
    chosen = usable[: k if k is not None else len(usable)]
    if temperature is None:
        return [(e, 1 / len(chosen)) for e in chosen]
    top = similarities[chosen[0].name]
    parts = [math.exp((similarities[e.name] - top) / temperature) for e in chosen]
    return [(e, p / sum(parts)) for e, p in zip(chosen, parts, strict=True)]


class SimilarTasks:
    """A scorer for a task that the model was never trained for: the masks of the most similar library tasks.

    Use it with the fusion :class:`cut.poll.Poll`.

    Args:
        library: Folder of a :class:`cut.library.Library`, or one.
        similarity: How near a library task is; default :class:`cut.similarity.MaskOverlap`.
        k: Number of neighbours that vote; None = all.
        temperature: See :func:`nearest`.
        soft: Let the neighbours' percentile ranks vote instead of their masks; all must have been kept with scores.
        tie: The new task's own scores, which order equal votes and its head: ``"magnitude"`` of the pre-trained
            weights, or ``"taylor"``, CUT's score on the few batches.
        batches: Number of batches that similarity and Taylor scores see.
        check: Refuse a library of another pre-trained model. Without it the weights may have been trained since.

    Attributes:
        similarities: Of the last call: entry name to similarity, the mean over tasks where several are new.
        weights: Of the last call: name of each neighbour to the weight of its vote.

    Raises:
        ValueError: For a number or word that is not allowed.
    """

    def __init__(
        self,
        library: str | Library,
        similarity: Similarity | None = None,
        k: int | None = 3,
        temperature: float | None = None,
        soft: bool = False,
        tie: Tie = "magnitude",
        batches: int = 1,
        check: bool = True,
    ) -> None:
        if k is not None and k < 1:
            raise ValueError(f"k {k}; allowed: None (all) or at least 1 neighbour")
        if temperature is not None and not 0 < temperature < math.inf:
            raise ValueError(f"temperature {temperature}; allowed: None (equal weights) or above 0")
        if tie not in get_args(Tie):
            raise ValueError(f"tie {tie!r}; allowed: {', '.join(map(repr, get_args(Tie)))}")
        if batches < 1:
            raise ValueError(f"batches {batches}; allowed: at least 1")
        self.library = library if isinstance(library, Library) else Library(library)
        self.similarity: Similarity = similarity or MaskOverlap()
        self.k, self.temperature, self.soft = k, temperature, soft
        self.tie, self.batches, self.check = tie, batches, check
        self.similarities: dict[str, float] = {}
        self.weights: dict[str, float] = {}

    def __call__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        losses: Mapping[str, Loss],
        tasks: Sequence[str],
        inputs: Inputs | None = None,
    ) -> dict[str, Scores]:
        """The neighbours' masks (or ranks, 1 - percentile) by :attr:`cut.poll.Neighbour.key`, and the new tasks' own.

        Raises:
            ValueError: If the library is empty, of another model or without the scores that are asked for, no task is
                similar, or there are no batches.
        """
        tasks = check_tasks(tasks, losses)
        entries = self.library.entries()
        if self.check:
            check_base(model, entries)
        bare = [e.name for e in entries if e.places is None]
        if self.soft and bare:
            raise ValueError(f"soft votes need scores, but entry {bare[0]} of {self.library.folder} has none")
        few = list(islice(batches, self.batches))
        if not few:
            raise ValueError("no batches of the new task were given; one is needed at least")
        # One pass over the first batch says which weights the tasks use, and is the cheap first mask of a similarity.
        seen = few if self.tie == "taylor" else few[:1]
        taylor = sensitivity(model, seen, losses, tasks, inputs)
        own = taylor if self.tie == "taylor" else {JOINT: _magnitudes(model, taylor)}
        self.similarities = self._similarities(
            [Newcomer(model, few, losses, t, entries, taylor[t], inputs) for t in tasks]
        )
        chosen = nearest(entries, self.similarities, self.k, self.temperature)
        self.weights = {e.name: w for e, w in chosen}
        used = {n: s.device for per in own.values() for n, s in per.items()}
        return {**{self._voter(e, w).key: self._values(e, used) for e, w in chosen}, **own}

    def _similarities(self, newcomers: Sequence[Newcomer]) -> dict[str, float]:
        """Entry name to the mean similarity over the new tasks."""
        each = [self.similarity(newcomer) for newcomer in newcomers]
        return {name: sum(found[name] for found in each) / len(each) for name in each[0]}

    def _voter(self, entry: Entry, weight: float) -> Neighbour:
        return Neighbour(entry.name, weight, entry.units == "channels", self.soft)

    def _values(self, entry: Entry, used: Mapping[str, torch.device]) -> Scores:
        """A neighbour's values of the weights that the new task uses."""
        ranks = entry.ranks if self.soft else None
        if ranks is not None:
            return {n: (1 - q).to(used[n]) for n, q in ranks.items() if n in used}
        return {n: m.float().to(used[n]) for n, m in entry.mask.items() if n in used}


def _magnitudes(model: nn.Module, scores: Mapping[str, Scores]) -> Scores:
    """The absolute values of all weights that some task's scores name."""
    named = {n for per in scores.values() for n in per}
    return {n: p.detach().float().abs() for n, p in prunable(model).items() if n in named}


def newtask(
    model: nn.Module,
    batches: Iterable[Any],
    losses: Mapping[str, Loss],
    task: str,
    scorer: SimilarTasks,
    *,
    budget: Any = None,
    fusion: Poll | None = None,
    units: Channels | Literal["weights", "channels"] = "weights",
    floor_share: float = 0.05,
    inputs: Inputs | None = None,
) -> Mask:
    """Cut a pre-trained model for a new task in one go, by the masks of similar tasks; the cut weights become zero.

    Train the new head and what is left for a few steps afterwards, with :func:`cut.masks.apply_mask` after each.

    Args:
        model: The pre-trained model with a fresh head for the new task; changed in place.
        batches: A few labelled batches of the new task.
        losses: Every task of the model to a function of (output, batch); a head that is not trained here may have any
            loss that depends on its output.
        task: The new task.
        scorer: The library, the similarity and the number of neighbours.
        budget: What may stay: over weights a :class:`cut.budget.Budget`, over channels a
            :class:`cut.limits.UnitBudget`. Default: sparsity 0.9, of channels 0.5.
        fusion: How the neighbours vote.
        units: ``"weights"`` or ``"channels"`` (heads and neurons of a transformer among them), or channels with
            options.
        floor_share: Share of every layer that stays before any cut.
        inputs: How to get the network's input from a batch.

    Returns:
        The mask.

    Raises:
        ValueError: If the library is empty or of another model, no task is similar, or the budget is out of reach.
    """
    check_tasks([task], losses)
    chosen = chosen_units(units, budget)
    few = list(islice(batches, scorer.batches))
    options: dict[str, Any] = {"fusion": fusion or Poll(), "budget": budget, "floor_share": floor_share}
    scores = scorer(model, few, losses, [task], inputs)
    if chosen is None:
        mask = make_mask(model, scores, few[0], losses, [task], inputs=inputs, **options)
    else:
        options |= {"reduce": chosen.reduce, "inside": chosen.inside}
        mask = make_unit_mask(model, scores, few[0], losses, [task], inputs=inputs, **options)
    apply_mask(model, mask)
    return mask
