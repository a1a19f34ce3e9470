"""Structured: from per-task scores of weights to a mask that cuts whole units and meets a device's budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cut.budget import Budget, Sparsity
from cut.budget import floor as best_of_every_group
from cut.compact import keep_tasks
from cut.decomposition import Inputs, Loss, check_tasks, network_input, owners, prunable
from cut.fusion import Fusion, Ranking, Vote
from cut.limits import OnlyUnits, UnitBudget, most_units
from cut.masks import behind, make_mask
from cut.scores import Scores
from cut.selection import Mask, best_per_layer
from cut.slots import Group
from cut.stub import TaskSubset
from cut.unitcost import Amounts, UnitCost
from cut.units import Reduce, check_reduce, cut_units, find_units, unit_scores, weight_mask

_FILTER = "module."  # before the names of a network that is in a filter over its outputs
_SPARE = 1.05  # what is out of reach for any choice of units is found before there are scores, but for so much


@dataclass(frozen=True)
class Plan:
    """What a model with its kept tasks can lose by units, and what that saves.

    Attributes:
        groups: The units; names are those of the whole model's parameters.
        cost: What a choice of them takes.
        blockers: Names of what keeps other layers whole.
    """

    groups: list[Group]
    cost: UnitCost
    blockers: tuple[str, ...] = ()


def plan(
    model: nn.Module,
    batch: Any,
    losses: Mapping[str, Loss],
    tasks: Sequence[str],
    inputs: Inputs | None = None,
) -> Plan:
    """The units of a model with only its kept tasks. A backbone unit owns its input slices in their heads only.

    Args:
        model: The model with all its heads; left as it is.
        batch: One batch; costs are those of a picture of its size.
        losses: Losses of *all* tasks of the model.
        tasks: The tasks to keep.
        inputs: How to get the network's input from a batch.

    Raises:
        ValueError: For a bad selection, or if the part that tasks share cannot be cut; it names the module that stops
            it.
    """
    tasks = check_tasks(tasks, losses)
    example = (inputs or network_input)(batch)[:2].detach()
    used = owners(model, batch, losses, list(losses), inputs)
    shared = {n for names in used.values() for n in names if sum(n in u for u in used.values()) > 1}
    kept: Any = keep_tasks(model, tasks, example)
    kept = kept.module if isinstance(kept, TaskSubset) else kept
    subset = kept if set(_outputs(kept, example)) == set(tasks) else TaskSubset(kept, tasks)
    found = find_units(subset, example, shared=_prefixed(shared, subset) if shared else None)
    groups = [_unprefixed(g) for g in found.groups] if isinstance(subset, TaskSubset) else found.groups
    blockers = tuple(name.removeprefix(_FILTER) if subset is not kept else name for name in found.blockers)
    return Plan(groups, UnitCost(kept, groups, example, subset), blockers)


def _outputs(network: nn.Module, example: Tensor) -> Mapping[str, Tensor]:
    with torch.no_grad():
        return network(example)


def _prefixed(names: set[str], network: nn.Module) -> set[str]:
    """Parameter names as a filter over outputs has them."""
    return {_FILTER + n for n in names} if isinstance(network, TaskSubset) else names


def _unprefixed(group: Group) -> Group:
    """A group by the names of the network within a filter over outputs."""
    slots = tuple(type(s)(s.name.removeprefix(_FILTER), s.dim, s.unit) for s in group.slots)
    return Group(group.name.removeprefix(_FILTER), group.units, slots)


def make_unit_mask(
    model: nn.Module,
    scores: Mapping[str, Scores],
    batch: Any,
    losses: Mapping[str, Loss],
    tasks: Sequence[str],
    *,
    fusion: Fusion | None = None,
    budget: UnitBudget | None = None,
    floor_share: float = 0.05,
    silent: bool = True,
    cut: Mask | None = None,
    fraction: float = 1.0,
    inputs: Inputs | None = None,
    reduce: Reduce = "sum",
    rounding: int = 1,
    cap: float = 1.0,
    inside: Budget | None = None,
    units: Plan | None = None,
) -> Mask:
    """Scores to a mask of whole units: reduce within units, fuse, put the floor in front, meet the budget.

    Args:
        model: The model with all its heads; it is not changed.
        scores: From a scorer, of weights.
        batch: One batch, to see what is coupled and what belongs to which task; costs are for a picture of its size.
        losses: Losses of *all* tasks of the model.
        tasks: The selected tasks.
        fusion: Default: vote share 0.5.
        budget: Default: sparsity 0.5, of weights in cut units.
        floor_share: Share of every group's units that stays before any cut, at least one; 0 keeps one all the same, as
            a layer without any is none.
        silent: Whether channels that ``inside`` leaves dead are silenced.
        cut: An earlier mask; what it cuts stays cut.
        fraction: How far towards the budget (a schedule's step).
        inputs: How to get the network's input from a batch.
        reduce: How the scores of a unit's weights become one, see :func:`cut.units.unit_scores`.
        rounding: Channels that every group keeps are a multiple of this, where it has that many.
        cap: The largest share of every group's units that may stay; with ``rounding``, as many as a multiple allows.
        inside: A budget of single weights that is met inside the units that are left; its zeros include those of cut
            units.
        units: What :func:`plan` gave for this model and these tasks, if it is known.

    Returns:
        The mask of the kept part: False for every weight, bias and norm parameter of a cut unit.

    Raises:
        ValueError: For a bad selection or choice, a model without units, or a budget that cannot be met.
    """
    check_choices(rounding, cap, floor_share)
    budget = budget or Sparsity(0.5)
    check_unit_budget(budget)
    known = units or plan(model, batch, losses, tasks, inputs)
    per_unit = unit_scores(scores, known.groups, reduce, known.cost.unit_macs() if reduce == "per_mac" else None)
    if not per_unit:
        raise ValueError("no unit has a score: the scored tasks use none of the units that can be cut")
    before = cut_units(known.groups, cut) if cut else {}
    ranking = (fusion or Vote(0.5))(behind(per_unit, before))
    back = _never_kept(ranking, before, cap)
    front = best_of_every_group(ranking, floor_share) or best_per_layer(ranking, dict.fromkeys(back, 1))
    limits = _limits(budget, known.cost, fraction)
    kept = _most(known, ranking, limits, front=front, back=back, multiple=rounding)
    names = {n for per in scores.values() for n in per}
    mask = weight_mask(model, known.groups, kept, sorted(names & set(prunable(model))))
    mask = {n: m & cut[n].to(m.device) if cut and n in cut else m for n, m in mask.items()}
    if inside is None or _met(inside, known.cost, kept, fraction):
        return mask
    within = make_mask(
        model,
        scores,
        batch,
        losses,
        tasks,
        fusion=fusion,
        budget=inside,
        floor_share=floor_share,
        silent=silent,
        cut=mask,
        fraction=fraction,
        inputs=inputs,
    )
    return {**mask, **{n: m & mask[n] if n in mask else m for n, m in within.items()}}


def _most(known: Plan, ranking: Ranking, limits: Amounts, **options: Any) -> Mask:
    """:func:`cut.limits.most_units`, which also says what is never cut if that makes a budget impossible."""
    try:
        return most_units(ranking, known.cost, limits, **options)
    except ValueError as error:
        if not known.blockers:
            raise
        more = f" and {len(known.blockers) - 3} more" if len(known.blockers) > 3 else ""
        raise ValueError(f"{error}; whole because of: {', '.join(known.blockers[:3])}{more}") from error


def check_reach(known: Plan, budget: UnitBudget, floor_share: float = 0.05, rounding: int = 1) -> None:
    """Refuse a budget that no choice of units meets, before there are scores.

    Args:
        known: The units.
        budget: The budget.
        floor_share: See :func:`make_unit_mask`.
        rounding: Likewise.

    Raises:
        ValueError: If even what the floor keeps takes clearly more; the message says how far units go.
    """
    ranking = Vote(0.5)({"": {g.name: torch.zeros(g.units) for g in known.groups}})
    front = best_of_every_group(ranking, floor_share) or best_per_layer(ranking, {g.name: 1 for g in known.groups})
    limits = {measure: most * _SPARE for measure, most in _limits(budget, known.cost, 1.0).items()}
    _most(known, ranking, limits, front=front, multiple=rounding)


def _limits(budget: UnitBudget, cost: UnitCost, fraction: float) -> Amounts:
    """What may be left at a fraction of the way to a budget."""
    return {m: cost.dense[m] - fraction * max(0.0, cost.dense[m] - most) for m, most in budget.limits(cost).items()}


def _met(budget: Any, cost: UnitCost, kept: Mask, fraction: float) -> bool:
    """Whether what units leave meets a budget already."""
    if not isinstance(budget, UnitBudget):
        return False
    left = cost.amounts(kept)
    return all(left[m] <= most for m, most in _limits(budget, cost, fraction).items())


def _never_kept(ranking: Ranking, before: Mask, cap: float) -> Mask:
    """Bool of each scored unit: whether it is cut already, or one of its group's worst, above the cap."""
    shapes = {n: s for per in ranking.scores.values() for n, s in per.items()}
    back = {n: before.get(n, torch.zeros(len(s), dtype=torch.bool)).to(s.device) for n, s in shapes.items()}
    if cap < 1:
        most = {n: max(1, math.floor(cap * len(s) + 1e-9)) for n, s in shapes.items()}
        back = {n: b | ~within for (n, b), within in zip(back.items(), _best(ranking, most), strict=True)}
    return back


def _best(ranking: Ranking, counts: Mapping[str, int]) -> list[Tensor]:
    """The best so many units of each group, in the order of the counts."""
    found = best_per_layer(ranking, counts)
    return [found[n] for n in counts]


def check_choices(rounding: int, cap: float, floor_share: float = 0.0) -> None:
    """Refuse numbers that :func:`make_unit_mask` does not have, or that contradict each other."""
    if rounding < 1:
        raise ValueError(f"rounding {rounding}; allowed: 1 (not at all) or a number of channels such as 4, 8, 16")
    if not 0 < cap <= 1:
        raise ValueError(f"cap {cap}; allowed: above 0, up to 1 (a share of every layer's units)")
    if floor_share > cap:
        raise ValueError(f"floor {floor_share:g} is above cap {cap:g}; allowed: a floor up to the cap")


def check_unit_budget(budget: Any) -> None:
    """Refuse a budget that whole units cannot meet."""
    if not isinstance(budget, UnitBudget):
        raise ValueError(
            f"budget {type(budget).__name__} is not one that whole units can meet; "
            "allowed: Sparsity, Parameters, Weights, MACs, Bytes, Together"
        )


class Channels:
    """A cut by whole units (channels, attention heads, MLP neurons), as the pruning callback makes it.

    Args:
        reduce: How the scores of a unit's weights become one: ``"sum"``, ``"mean"`` or ``"per_mac"``.
        inside: A budget of single weights, met inside the units that are left: channels first, weights after.

    Raises:
        ValueError: For another ``reduce``.
    """

    def __init__(self, reduce: Reduce = "sum", inside: Budget | None = None) -> None:
        check_reduce(reduce)
        self.reduce: Reduce = reduce
        self.inside = inside


def chosen_units(
    units: Channels | Literal["weights", "channels"],
    budget: Any,
    rounding: int = 1,
    cap: float = 1.0,
    floor_share: float = 0.0,
) -> Channels | None:
    """How to cut by whole units, None for single weights; checked against the budget, before any work.

    Args:
        units: ``"weights"``, ``"channels"`` or channels with options.
        budget: The budget, None for none.
        rounding: See :func:`make_unit_mask`.
        cap: Likewise.
        floor_share: Likewise; it may not be above the cap.

    Raises:
        ValueError: For another word, bad numbers, or a budget that these units cannot meet.
    """
    check_choices(rounding, cap, floor_share)
    if units == "weights":
        if isinstance(budget, OnlyUnits):
            raise ValueError(budget.refusal())
        if (rounding, cap) != (1, 1.0):
            raise ValueError(
                f"rounding {rounding} and cap {cap} are of channels; allowed with units='weights': 1 and 1.0"
            )
        return None
    if units != "channels" and not isinstance(units, Channels):
        raise ValueError(f"units {units!r}; allowed: 'weights', 'channels' or cut.structured.Channels")
    if budget is not None:
        check_unit_budget(budget)
    chosen = Channels() if units == "channels" else units
    if isinstance(chosen.inside, OnlyUnits):
        raise ValueError(f"inside: {chosen.inside.refusal()}")
    return chosen
