"""Budget: how much may stay, and the mask that keeps exactly that.

The cut-off is found on the ranking, so any budget is met to within one unit, ties broken by index, and a smaller budget
gives a subset of a larger one. The floor moves the best units of every layer to the front of the ranking *before* any
cut, so budgets stay exact and nested with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from cut.fusion import Fusion, Ranking
from cut.scores import Scores
from cut.selection import Mask, best, best_per_layer

if TYPE_CHECKING:
    from cut.unitcost import Amounts, UnitCost


@dataclass(frozen=True)
class Size:
    """What a budget is measured against: the model with the kept heads only.

    Attributes:
        prunable: Number of weights of convolutions and linear layers.
        other: Number of all other parameters (norms, biases, embeddings); never cut by a budget.
        shared: Names of the weights that more than one task of the *whole* model uses, dropped tasks included.
    """

    prunable: int
    other: int = 0
    shared: frozenset[str] | None = None


class Budget(Protocol):
    """Scores in, mask out."""

    def mask(
        self,
        scores: Mapping[str, Scores],
        fusion: Fusion,
        size: Size,
        front: Mask | None = None,
        cut: Mask | None = None,
        fraction: float = 1.0,
    ) -> Mask:
        """The mask at ``fraction`` of the way to this budget (a schedule's step).

        Args:
            scores: Task to parameter name to score.
            fusion: The rule that makes one ranking of them.
            size: The model with its kept heads.
            front: The floor: units kept before all others.
            cut: Units that are cut already and stay so.
            fraction: 0 = nothing more is cut, 1 = the whole budget.
        """
        ...


def floor(ranking: Ranking, share: float, rows: Iterable[str] = ()) -> Mask:
    """The units that every layer keeps before any cut: its best ``share``, at least one.

    Args:
        ranking: The order over all units.
        share: Share of each layer, in [0, 1]. With 0 there is no floor at all.
        rows: Weights (a head's last layer) of which every output keeps at least its best input as well.

    Returns:
        Parameter name to bool, ``True`` = in the floor; empty if ``share`` is 0.

    Example:
        >>> r = Ranking({"a": {"w": torch.tensor([[4.0, 3.0], [2.0, 1.0]])}})
        >>> floor(r, 0.25)["w"].tolist()
        [[True, False], [False, False]]
        >>> floor(r, 0.25, rows=["w"])["w"].tolist()
        [[True, False], [True, False]]
    """
    if not 0 <= share <= 1:
        raise ValueError(f"floor {share}; allowed: 0 to 1 (a share of every layer)")
    if share == 0:
        return {}
    shapes = {n: ranking.scores[ts[0]][n] for n, ts in ranking.tasks_of().items()}
    front = best_per_layer(ranking, {n: max(1, math.ceil(share * s.numel() - 1e-9)) for n, s in shapes.items()})
    for name in rows:
        if name in front:
            front[name] |= _best_of_rows([s[name] for s in ranking.scores.values() if name in s])
    return front


def _best_of_rows(scores: list[Tensor]) -> Tensor:
    """Bool of the best input of every output, the first among equals; several tasks count by their normalised sum."""
    total = torch.stack([s.double() / s.double().sum().clamp_min(1e-300) for s in scores]).sum(0)
    flat = total.reshape(len(total), -1)
    largest = flat == flat.amax(1, keepdim=True)
    return (largest & (largest.cumsum(1) == 1)).view(total.shape)


def scored_units(scores: Mapping[str, Scores]) -> int:
    """Number of units that have a score, each counted once."""
    return sum({n: s.numel() for per in scores.values() for n, s in per.items()}.values())


class Counted:
    """Shared by budgets that say how many single weights go: along the ranking, to the unit.

    A budget of this kind has ``told``, its words for errors, and says what it counts and how much of that goes.
    """

    told: str

    def total(self, size: Size) -> int:
        """All that the budget counts: the Conv and Linear weights."""
        return size.prunable

    def zeros(self, size: Size) -> float:
        """How much of it the whole budget cuts; below 0 where the model is smaller as it is."""
        raise NotImplementedError

    def mask(
        self,
        scores: Mapping[str, Scores],
        fusion: Fusion,
        size: Size,
        front: Mask | None = None,
        cut: Mask | None = None,
        fraction: float = 1.0,
    ) -> Mask:
        """The mask with exactly ``round(fraction x zeros)`` zeros.

        Raises:
            ValueError: If the floor keeps more, or fewer weights have a score than must go.
        """
        return best(fusion(scores), self.kept(scores, size, front, cut, fraction), front, cut)

    def kept(
        self, scores: Mapping[str, Scores], size: Size, front: Mask | None, cut: Mask | None, fraction: float
    ) -> int:
        """How many scored weights the mask keeps.

        Raises:
            ValueError: If the floor keeps more, or fewer weights have a score than must go.
        """
        scored, zeros = scored_units(scores), max(0.0, self.zeros(size))
        if round(zeros) > scored:
            never = self.total(size) - scored
            raise ValueError(
                f"{self.told} is out of reach: {never} are never cut, only {scored} are reached by a gradient"
            )
        kept = scored - round(fraction * zeros)
        least = sum(int((m & ~cut[n] if cut and n in cut else m).sum()) for n, m in (front or {}).items())
        if kept < least:
            raise ValueError(
                f"{self.told} keeps {kept} weights, but the floor needs {least}: raise the budget or lower the floor"
            )
        return kept


class Sparsity(Counted):
    """Cut until a fraction of the Conv and Linear weights of backbone and kept heads is zero.

    Args:
        target: The fraction removed, in [0, 1).
    """

    def __init__(self, target: float) -> None:
        if not 0 <= target < 1:
            raise ValueError(f"sparsity {target}; allowed: 0 <= sparsity < 1 (the fraction removed)")
        self.target, self.told = target, f"sparsity {target}"

    def zeros(self, size: Size) -> float:
        """That fraction of the weights, not rounded yet: a schedule's step takes a part of it."""
        return self.target * size.prunable

    def limits(self, cost: UnitCost) -> Amounts:
        """Over units: the largest number of Conv and Linear weights that may be left."""
        return {"weights": (1 - self.target) * cost.dense["weights"]}


class Parameters(Counted):
    """Cut until a number of parameters is left, norms, biases and all.

    Args:
        target: Non-zero parameters of backbone and kept heads.
    """

    def __init__(self, target: int) -> None:
        if not 1 <= target < math.inf:
            raise ValueError(f"parameter budget {target}; allowed: at least 1, and finite")
        self.target, self.told = int(target), f"a budget of {int(target)} parameters"

    def total(self, size: Size) -> int:
        """All parameters."""
        return size.prunable + size.other

    def zeros(self, size: Size) -> float:
        """All parameters but the target."""
        return self.total(size) - self.target

    def limits(self, cost: UnitCost) -> Amounts:
        """Over units: the largest number of parameters that may be left."""
        return {"parameters": self.target}


class Weights(Counted):
    """Cut until a number of Conv and Linear weights is left: for models that must share a budget with others.

    Args:
        target: Non-zero Conv and Linear weights of backbone and kept heads.
    """

    def __init__(self, target: int) -> None:
        if target < 1:
            raise ValueError(f"weight budget {target}; allowed: at least 1")
        self.target, self.told = int(target), f"a budget of {int(target)} weights"

    def zeros(self, size: Size) -> float:
        """All weights but the target."""
        return size.prunable - self.target

    def limits(self, cost: UnitCost) -> Amounts:
        """Over units: the largest number of Conv and Linear weights that may be left."""
        return {"weights": self.target}


class Smallest:
    """Several budgets over single weights at once: the largest model that meets all of them.

    For whole units there is :class:`cut.limits.Together`.

    Args:
        budgets: At least one; their masks are nested, as all cut along one ranking.
    """

    def __init__(self, budgets: Sequence[Budget]) -> None:
        self.budgets = list(budgets)

    def mask(
        self,
        scores: Mapping[str, Scores],
        fusion: Fusion,
        size: Size,
        front: Mask | None = None,
        cut: Mask | None = None,
        fraction: float = 1.0,
    ) -> Mask:
        """The smallest of the budgets' masks."""
        masks = [b.mask(scores, fusion, size, front, cut, fraction) for b in self.budgets]
        return min(masks, key=lambda mask: sum(int(m.sum()) for m in mask.values()))


class KeepRatio:
    """The reference's rule: a fixed keep ratio per task and at least so many votes; the sparsity is whatever comes out.

    Each task keeps its best ``int(ratio x N_t)`` units, ties at the threshold included; a shared unit stays if at least
    ``votes`` of the tasks keep it, a private one if its own task does. No fusion rule, no floor, no exact budget.

    Args:
        ratio: Share of each task's units that it keeps, in (0, 1].
        votes: Tasks that must keep a shared unit. With fewer tasks than votes nothing shared is left, as in the
            reference.
    """

    def __init__(self, ratio: float, votes: int = 2) -> None:
        if not 0 < ratio <= 1:
            raise ValueError(f"keep ratio {ratio}; allowed: 0 < ratio <= 1")
        if votes < 1:
            raise ValueError(f"votes {votes}; allowed: at least 1")
        self.ratio, self.votes = ratio, votes

    def mask(
        self,
        scores: Mapping[str, Scores],
        fusion: Fusion,
        size: Size,
        front: Mask | None = None,
        cut: Mask | None = None,
        fraction: float = 1.0,
    ) -> Mask:
        """The reference's mask. Shared is what ``size.shared`` says, else what more than one scored task uses.

        Raises:
            ValueError: If a floor or a schedule is asked for, which this rule has not.
        """
        if front or fraction != 1.0:
            raise ValueError(
                f"the keep-ratio rule has no floor and no steps; got floor={bool(front)}, fraction={fraction}"
            )
        own = {task: self._task_mask(per) for task, per in scores.items()}
        names = {n for per in scores.values() for n in per}
        result: Mask = {}
        for name in sorted(names):
            kept = torch.stack([m[name] for m in own.values() if name in m])
            is_shared = len(kept) > 1 if size.shared is None else name in size.shared
            result[name] = kept.sum(0) >= (self.votes if is_shared else 1)
            if cut and name in cut:
                result[name] &= ~cut[name]
        return result

    def _task_mask(self, scores: Scores) -> Mask:
        """One task's mask: scores divided by their sum, as the reference does, then a global threshold."""
        flat = torch.cat([s.flatten() for s in scores.values()])
        total = flat.sum()
        flat = flat / total if total > 0 else flat
        count = int(self.ratio * len(flat))
        if count < 1:
            raise ValueError(f"keep ratio {self.ratio} keeps none of {len(flat)} weights")
        kept = flat >= flat.kthvalue(len(flat) - count + 1).values
        parts = kept.split([s.numel() for s in scores.values()])
        return {n: part.view(s.shape) for (n, s), part in zip(scores.items(), parts, strict=True)}
