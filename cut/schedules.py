"""Schedules: at which epochs is how much of the budget cut?

A schedule maps epochs to the fraction of the final budget that is reached there, rising to 1.
"""

from __future__ import annotations

from typing import Protocol


class Schedule(Protocol):
    """Epoch to fraction of the budget."""

    def steps(self) -> dict[int, float]:
        """The epochs *before* whose training pruning happens, with the fraction reached there; the last is 1."""
        ...


class OneShot:
    """Everything at once.

    Args:
        epoch: The epoch before which the cut is made.

    Example:
        >>> OneShot().steps()
        {0: 1.0}
    """

    def __init__(self, epoch: int = 0) -> None:
        if epoch < 0:
            raise ValueError(f"epoch {epoch}; allowed: 0 or later")
        self.epoch = epoch

    def steps(self) -> dict[int, float]:
        """One step to the whole budget."""
        return {self.epoch: 1.0}


class Iterative:
    """Rounds that each remove the same share of what is left (as iterative magnitude pruning does).

    Args:
        rounds: Number of cuts.
        every: Epochs from one cut to the next.
        start: Epoch of the first cut.
        final_sparsity: The sparsity that the rounds lead to; it shapes the steps, the budget decides the amount.

    Example:
        >>> {e: round(f, 3) for e, f in Iterative(rounds=2, every=3, final_sparsity=0.75).steps().items()}
        {0: 0.667, 3: 1.0}
    """

    def __init__(self, rounds: int = 3, every: int = 1, start: int = 0, final_sparsity: float = 0.9) -> None:
        if rounds < 1 or every < 1 or start < 0:
            raise ValueError(
                f"rounds={rounds}, every={every}, start={start}; allowed: rounds and every >= 1, start >= 0"
            )
        if not 0 < final_sparsity < 1:
            raise ValueError(f"final_sparsity {final_sparsity}; allowed: between 0 and 1")
        self.rounds, self.every, self.start, self.final_sparsity = rounds, every, start, final_sparsity

    def steps(self) -> dict[int, float]:
        """After round i of n the density is d^(i/n), d the final density."""
        density = 1 - self.final_sparsity
        fractions = [(1 - density ** (i / self.rounds)) / self.final_sparsity for i in range(1, self.rounds)] + [1.0]
        return {self.start + i * self.every: f for i, f in enumerate(fractions)}


class Gradual:
    """The cubic schedule of Zhu and Gupta (arXiv 1710.01878): fast first, slow at the end.

    Args:
        start: Epoch of the first cut.
        end: Epoch of the last cut.
        every: Epochs from one cut to the next.

    Example:
        >>> {e: round(f, 3) for e, f in Gradual(start=0, end=3).steps().items()}
        {0: 0.578, 1: 0.875, 2: 0.984, 3: 1.0}
    """

    def __init__(self, start: int = 0, end: int = 3, every: int = 1) -> None:
        if not 0 <= start <= end or every < 1:
            raise ValueError(f"start={start}, end={end}, every={every}; allowed: 0 <= start <= end, every >= 1")
        self.start, self.end, self.every = start, end, every

    def steps(self) -> dict[int, float]:
        """1 - (1 - i/n)^3 after cut i of n."""
        epochs = [*list(range(self.start, self.end, self.every)), self.end]
        return {e: 1 - (1 - i / len(epochs)) ** 3 for i, e in enumerate(epochs, 1)}


def rounds_of(rounds: int, fraction: float = 1.0, target: float | None = None, done: float = 0.0) -> list[float]:
    """The fractions of the budget at which the rounds of one cut end, without training between them.

    Args:
        rounds: Number of rounds, at least 1.
        fraction: Where the last one ends.
        target: The budget's sparsity; None cuts equal parts of the budget.
        done: The sparsity that is reached already. With a target the density falls by the same factor in each round.

    Example:
        >>> rounds_of(2), [round(f, 3) for f in rounds_of(2, target=0.75)]
        ([0.5, 1.0], [0.667, 1.0])
    """
    if not target or target >= 1:
        return [fraction * (i + 1) / rounds for i in range(rounds)]
    now, last = 1 - done, 1 - fraction * target
    densities = [now * (last / now) ** (i / rounds) for i in range(1, rounds)]
    return [*((1 - d) / target for d in densities), fraction]
