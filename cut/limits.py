"""Limits: budgets that a device has, met by cutting whole units.

A budget over units says how much of each measure may be left at most. The best units of one ranking stay, as many as
meet every limit: found by bisection, because what they take only falls when fewer stay. So a limit is met to within one
unit (or one rounding step), and smaller limits give nested choices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from cut.budget import Size
from cut.fusion import Fusion, Ranking
from cut.scores import Scores
from cut.selection import Mask
from cut.slots import Group
from cut.unitcost import Amounts, UnitCost


@runtime_checkable
class UnitBudget(Protocol):
    """A budget that whole units can meet."""

    def limits(self, cost: UnitCost) -> Amounts:
        """The measures (see :meth:`cut.unitcost.UnitCost.amounts`) that are limited, each with what may be left."""
        ...


class OnlyUnits:
    """What a budget that no mask over single weights can meet says about it."""

    reason = "a mask over single weights does not change it"

    def mask(
        self,
        scores: Mapping[str, Scores],
        fusion: Fusion,
        size: Size,
        front: Mask | None = None,
        cut: Mask | None = None,
        fraction: float = 1.0,
    ) -> Mask:
        """Refuses.

        Raises:
            ValueError: Always, with the reason.
        """
        raise ValueError(self.refusal())

    def refusal(self) -> str:
        """Why single weights cannot meet it, and what can."""
        name = type(self).__name__
        return f"budget {name} needs units='channels': {self.reason}; for single weights use Sparsity or Parameters"


def _share_or_number(target: float, dense: float) -> float:
    """A target up to 1 as a share of the dense amount, a larger one as it is."""
    return target * dense if target <= 1 else target


def _check_target(what: str, target: float) -> float:
    if not 0 < target < math.inf:
        raise ValueError(f"{what} {target}; allowed: above 0 (up to 1 a share of the dense model's, else a number)")
    return float(target)


class MACs(OnlyUnits):
    """Cut units until so many multiply-accumulates are left.

    Args:
        target: Up to 1: their share in the dense model with the same kept heads; above 1: their number for a picture.
    """

    reason = "a layer with zeros takes as many multiply-accumulates as without"

    def __init__(self, target: float) -> None:
        self.target = _check_target("MACs", target)

    def limits(self, cost: UnitCost) -> Amounts:
        """The largest number of multiply-accumulates."""
        return {"macs": _share_or_number(self.target, cost.dense["macs"])}


class Bytes(OnlyUnits):
    """Cut units until the saved model takes so many bytes on disk (:func:`cut.checkpoint.save`, dense).

    Args:
        target: Up to 1: their share in the file of the dense model with the same kept heads; above 1: their number.
    """

    reason = "how small zeros are stored depends on where they are"

    def __init__(self, target: float) -> None:
        self.target = _check_target("bytes", target)

    def limits(self, cost: UnitCost) -> Amounts:
        """The largest number of bytes of the tensors: the file's without its names and shapes."""
        overhead = cost.file_overhead
        return {"bytes": _share_or_number(self.target, cost.dense["bytes"] + overhead) - overhead}


class Together(OnlyUnits):
    """Several budgets at once: the largest model that meets all of them.

    Args:
        budgets: Budgets over units; at least one.
    """

    def __init__(self, budgets: list[UnitBudget]) -> None:
        wrong = [type(b).__name__ for b in budgets if not isinstance(b, UnitBudget)]
        if wrong or not budgets:
            raise ValueError(f"budgets {wrong}; allowed: at least one of Sparsity, Parameters, Weights, MACs, Bytes")
        self.budgets = list(budgets)

    def limits(self, cost: UnitCost) -> Amounts:
        """The smallest limit of each measure."""
        found: Amounts = {}
        for budget in self.budgets:
            for measure, most in budget.limits(cost).items():
                found[measure] = min(most, found.get(measure, most))
        return found


class _Order:
    """All units of a ranking, best first: floor, then fused value, then index; those that never stay come last.

    There are thousands of units, not millions of weights, so they are simply sorted.

    Args:
        ranking: The order over units.
        groups: The units.
        front: Units that stay before all others.
        back: Units that never stay.
        multiple: Of channels that every group keeps.
    """

    def __init__(
        self, ranking: Ranking, groups: Sequence[Group], front: Mask | None, back: Mask | None, multiple: int
    ) -> None:
        values = {n: v.cpu() for n, v in ranking.values().items()}
        gone = {n: _flags(back, n, v) for n, v in values.items()}
        first = {n: _flags(front, n, v) & ~gone[n] for n, v in values.items()}
        keys = torch.cat([v - 2.0 * first[n] + 2.0 * gone[n] for n, v in values.items()])
        place = torch.empty(len(keys), dtype=torch.long)
        place[keys.sort(stable=True).indices] = torch.arange(len(keys))
        self.place = dict(zip(values, place.split([len(v) for v in values.values()]), strict=True))
        self.least = sum(int(f.sum()) for f in first.values())
        self.free = {n: int((~g).sum()) for n, g in gone.items()}
        self.steps = {g.name: g.step(multiple) for g in groups}

    @property
    def most(self) -> int:
        """Units that can stay."""
        return sum(self.free.values())

    def best(self, count: int) -> Mask:
        """The best so many units, rounded within each group: up where there are units for it, else down."""
        return {n: self._rounded(n, int((p < count).sum())) for n, p in self.place.items()}

    def _rounded(self, name: str, count: int) -> Tensor:
        """The best units of a group, a rounded number."""
        place, step, free = self.place[name], self.steps[name], self.free[name]
        up = -(-count // step) * step
        if up > free and free < len(place):
            up = max(free // step * step, min(step, free))
        within = torch.empty_like(place)
        within[place.sort().indices] = torch.arange(len(place))
        return within < min(up, free)


def _flags(mask: Mask | None, name: str, like: Tensor) -> Tensor:
    return mask[name].cpu() if mask and name in mask else torch.zeros_like(like, dtype=torch.bool)


def most_units(
    ranking: Ranking,
    cost: UnitCost,
    limits: Amounts,
    *,
    front: Mask | None = None,
    back: Mask | None = None,
    multiple: int = 1,
) -> Mask:
    """The best units of a ranking, as many as meet all limits.

    Args:
        ranking: The order over units; groups that it does not hold stay whole.
        cost: What they take.
        limits: Measure to what may be left at most.
        front: Units that stay before all others (a floor).
        back: Units that never stay (cut already, or above a cap).
        multiple: Channels that every group keeps are a multiple of it, or all it has. Units wider than a channel
            (heads, groups of convolutions) count by their width.

    Returns:
        Group name to bool [units].

    Raises:
        ValueError: If what the floor keeps takes more; the message says what can be reached.
    """
    order = _Order(ranking, cost.groups, front, back, multiple)
    everything = cost.everything()

    def kept(count: int) -> Mask:
        return {**everything, **order.best(count)}

    def meets(count: int) -> bool:
        amounts = cost.amounts(kept(count))
        return all(amounts[measure] <= most * (1 + 1e-12) for measure, most in limits.items())

    if meets(order.most):
        return kept(order.most)
    if not meets(order.least):
        raise ValueError(_out_of_reach(limits, cost, cost.amounts(kept(order.least))))
    low, high = order.least, order.most  # the first meets the limits, the second does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if meets(middle) else (low, middle)
    return kept(low)


def _out_of_reach(limits: Amounts, cost: UnitCost, reached: Amounts) -> str:
    """Which limit cannot be met, and how far units go."""
    measure = next(m for m, most in limits.items() if reached[m] > most)
    besides = cost.file_overhead if measure == "bytes" else 0  # as a budget of bytes is of the whole file
    need, dense = reached[measure] + besides, cost.dense[measure] + besides
    return (
        f"a budget of {limits[measure] + besides:.4g} {measure} is out of reach: floor, rounding and what is never cut "
        f"need {need:.4g} ({need / dense:.1%} of the dense model's); raise the budget, or lower floor or rounding"
    )
