"""Rounds: score, cut and fit what stays, as often as a prune command asks, and on until a latency is met."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from cut.commands import budgets
from cut.commands.cutting import Job, latency_target
from cut.commands.source import Data
from cut.commands.terminal import Terminal
from cut.decomposition import kept_parameters
from cut.limits import MACs, UnitBudget
from cut.masks import apply_mask, sparsity
from cut.objectives import moved
from cut.reconstruction import reconstruct
from cut.schedules import rounds_of
from cut.scores import Scores, Sensitivity
from cut.search import Found, TooSlowError
from cut.selection import Mask
from cut.speed import density_of

MORE = 6  # rounds at most after those asked for, while the file takes longer than the latency that was asked for
LEAST = 0.98  # of the multiply-accumulates that each of these leaves at most


@dataclass(frozen=True)
class Rounds:
    """One round after the other, each scored on what the one before left.

    Attributes:
        job: What is cut, and how; its network's weights follow.
        data: Pictures to score and to fit on.
        terminal: Shows progress.
    """

    job: Job
    data: Data
    terminal: Terminal

    def _batches(self, count: int, what: str) -> Iterator[Any]:
        device = next(self.job.network.parameters()).device
        return (moved(b, device) for b in self.terminal.track(self.data.score(count), what))

    def scores(self) -> dict[str, Scores]:
        """Each task's scores of the network as it is."""
        batches = self._batches(self.job.args.batches, "scoring")
        return Sensitivity()(self.job.network, batches, self.job.losses, self.job.tasks)

    def cut(self, scores: dict[str, Scores], more: list[UnitBudget], fraction: float = 1.0) -> Rounds:
        """The rounds after one more, which ends at a fraction of the way to the budgets."""
        network, count = self.job.network, self.job.args.reconstruct
        mask = self.job.mask(scores, more, fraction)
        before = copy.deepcopy(network) if count else None
        apply_mask(network, mask)
        if before is not None:
            reconstruct(network, before, mask, self._batches(count, "fitting"))
        return replace(self, job=replace(self.job, cut=mask))


def in_rounds(job: Job, data: Data, terminal: Terminal, wish: budgets.Wish | None) -> tuple[Mask, Found | None]:
    """The mask, and what a search for a latency reached; the network's weights are cut, and fitted if asked for.

    A latency is searched for among models of one round each, which takes a fraction of the time: rounds keep other
    channels, but about as many. Where the file of what they leave is too slow all the same, more of them follow.

    Raises:
        ValueError: If a budget is out of reach.
    """
    args, rounds = job.args, Rounds(job, data, terminal)
    # Weights go by the same factor in each round; units, and budgets of other kinds, in equal parts.
    target = args.sparsity if job.plan is None and not args.budget else None
    kept = kept_parameters(job.network, job.used, job.tasks)
    done = 0.0 if job.cut is None else sparsity(job.network, job.cut, kept)
    scores = rounds.scores()
    found = None if wish is None else job.fast_enough(scores, wish, terminal.shows_progress)
    more: list[UnitBudget] = [] if found is None else [MACs(found.density)]
    for i, fraction in enumerate(rounds_of(args.rounds, 1.0, target, done)):
        rounds = rounds.cut(rounds.scores() if i else scores, more, fraction)
    if wish is not None and found is not None and args.rounds > 1:
        rounds, found = _met(rounds, wish, found)
    assert rounds.job.cut is not None
    return rounds.job.cut, found


def _met(rounds: Rounds, wish: budgets.Wish, found: Found) -> tuple[Rounds, Found]:
    """Rounds until the file is fast enough; what was found is then that file's reading."""
    for left in range(MORE, -1, -1):
        assert rounds.job.cut is not None
        density = density_of(rounds.job.units, rounds.job.cut)
        reading = rounds.job.reading(rounds.job.cut, wish)
        if reading.value <= wish.amount:
            return rounds, replace(found, density=density, reading=reading)
        if left:
            density *= min(LEAST, wish.amount / reading.value)
            rounds = rounds.cut(rounds.scores(), [MACs(density)])
    slow = f"{reading.value:.3g}{latency_target(wish).unit}"
    raise TooSlowError(f"{wish}: {MORE} rounds more still leave a model that takes {slow}")
