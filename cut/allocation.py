"""Allocation: a budget that is shared out among the layers first, then met within each by the ranking."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch

from cut.budget import Size, scored_units
from cut.fusion import Fusion, Ranking
from cut.scores import Scores
from cut.selection import Mask, best_per_layer

Rule = Literal["uniform", "erk"]


def densities(shapes: Mapping[str, tuple[int, ...]], rule: Rule) -> dict[str, float]:
    """Each layer's share of kept units up to one common factor.

    ``uniform``: all layers alike. ``erk`` (Erdos-Renyi kernel, arXiv 1911.11134): the sum of a weight's sides over
    their product, so that small layers stay denser.

    Example:
        >>> densities({"a": (2, 2, 1, 1), "b": (8, 8, 1, 1)}, "erk")
        {'a': 1.5, 'b': 0.28125}
    """
    if rule == "uniform":
        return dict.fromkeys(shapes, 1.0)
    return {n: sum(s) / math.prod(s) for n, s in shapes.items()}


def allocate(
    sizes: Mapping[str, int],
    density: Mapping[str, float],
    count: int,
    least: Mapping[str, int],
    most: Mapping[str, int],
) -> dict[str, int]:
    """How many units each layer keeps: proportional to its density, within bounds, ``count`` in all.

    Args:
        sizes: Units of each layer.
        density: From :func:`densities`.
        count: Units to keep in all.
        least: Lower bound of each layer.
        most: Upper bound of each layer.

    Raises:
        ValueError: If the bounds leave no way to keep ``count``.

    Example:
        >>> allocate({"a": 4, "b": 6}, {"a": 1.0, "b": 0.5}, 4, {"a": 0, "b": 0}, {"a": 4, "b": 6})
        {'a': 2, 'b': 2}
        >>> allocate({"a": 4, "b": 6}, {"a": 9.0, "b": 0.1}, 6, {"a": 0, "b": 0}, {"a": 4, "b": 6})
        {'a': 4, 'b': 2}
    """
    if not sum(least.values()) <= count <= sum(most.values()):
        raise ValueError(f"cannot keep {count} units in layers that keep {sum(least.values())} to {sum(most.values())}")
    names = sorted(sizes)

    def share(factor: float) -> dict[str, float]:
        return {n: min(float(most[n]), max(float(least[n]), factor * density[n] * sizes[n])) for n in names}

    low, high = 0.0, 1.0
    while sum(share(high).values()) < count and high < 1e18:
        high *= 2
    for _ in range(100):  # the sum rises with the factor: bisect to float precision
        middle = (low + high) / 2
        low, high = (middle, high) if sum(share(middle).values()) < count else (low, middle)
    ideal = share(high)
    counts = {n: min(most[n], max(least[n], math.floor(v + 1e-9))) for n, v in ideal.items()}
    # What rounding left goes to the largest remainders, then to whoever has room.
    order = sorted(names, key=lambda n: (counts[n] - ideal[n], n))
    left = count - sum(counts.values())
    while left:
        step = 1 if left > 0 else -1
        for name in order if step > 0 else reversed(order):
            if left and least[name] <= counts[name] + step <= most[name]:
                counts[name] += step
                left -= step
    return {n: counts[n] for n in sizes}


class LayerSparsity:
    """The same sparsity as :class:`cut.budget.Sparsity`, but shared out among the layers by a rule.

    Args:
        target: The fraction removed, in [0, 1).
        rule: ``"uniform"`` or ``"erk"``.
    """

    def __init__(self, target: float, rule: Rule = "erk") -> None:
        if not 0 <= target < 1:
            raise ValueError(f"sparsity {target}; allowed: 0 <= sparsity < 1 (the fraction removed)")
        if rule not in ("uniform", "erk"):
            raise ValueError(f"rule {rule!r}; allowed: 'uniform', 'erk'")
        self.target = target
        self.rule: Rule = rule

    def mask(
        self,
        scores: Mapping[str, Scores],
        fusion: Fusion,
        size: Size,
        front: Mask | None = None,
        cut: Mask | None = None,
        fraction: float = 1.0,
    ) -> Mask:
        """The mask with exactly ``round(fraction x target x size.prunable)`` zeros.

        Raises:
            ValueError: If the floor keeps more, or fewer weights have a score than must go.
        """
        front, cut = front or {}, cut or {}
        # Ordered after fusion: a fusion that adds scores up must not see the marks of floor and cut.
        ranking = fusion(scores)
        ordered = {
            t: {n: _ordered(s, front.get(n), cut.get(n)) for n, s in per.items()} for t, per in ranking.scores.items()
        }
        shapes = {n: s for per in scores.values() for n, s in per.items()}
        sizes = {n: s.numel() for n, s in shapes.items()}
        least = {n: int((front[n] & ~cut[n] if n in cut else front[n]).sum()) if n in front else 0 for n in sizes}
        most = {n: sizes[n] - (int(cut[n].sum()) if n in cut else 0) for n in sizes}
        kept = scored_units(scores) - round(fraction * self.target * size.prunable)
        density = densities({n: tuple(s.shape) for n, s in shapes.items()}, self.rule)
        try:
            counts = allocate(sizes, density, kept, least, most)
        except ValueError as error:
            raise ValueError(f"sparsity {self.target}: {error}; raise the budget or lower the floor") from error
        return best_per_layer(Ranking(ordered, ranking.share), counts)


def _ordered(score: torch.Tensor, front: torch.Tensor | None, cut: torch.Tensor | None) -> torch.Tensor:
    """The score with a floor's units before all others and cut ones behind them."""
    if front is not None:
        score = score.masked_fill(front, 2 * float(score.max()) + 1)
    return score if cut is None else score.masked_fill(cut, -1.0)
