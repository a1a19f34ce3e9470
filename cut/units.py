"""Units: what is cut together. A channel with all that is coupled to it, an attention head, an MLP neuron.

A group holds the units that the same layers make. It knows for every parameter and buffer, and each of its
dimensions, which entries belong to which unit. So per-task scores of weights become per-task scores of units
(``{task: {group name: float32 [units]}}``), which fuse and rank as weights do, and a choice of units becomes an
ordinary mask over weights, in which all entries of a cut unit are False.

The widths of a vision transformer and of ConvNeXt's stages are channels too: the layer norms that read them go on to
count the cut ones (:mod:`cut.norms`). What must stay: outputs, and whatever another norm over channels reads.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from cut.attention import head_entries, other_attention, plain_attention
from cut.channels import OutputCheck
from cut.coupling import coupled_channels, tensors_of
from cut.decomposition import Inputs, network_input
from cut.removal import without, zeroed
from cut.scores import Scores
from cut.selection import Mask
from cut.slots import Group, Slot

Reduce = Literal["sum", "mean", "per_mac"]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Units:
    """The units of a network.

    Attributes:
        groups: In the order of the network, each with at least one unit.
        blockers: Names of modules that keep others from being cut.
    """

    groups: list[Group]
    blockers: list[str]

    def names(self) -> set[str]:
        """Names of all parameters and buffers that hold an entry of a unit."""
        return {s.name for g in self.groups for s in g.slots}


def traced_units(network: nn.Module, example: Tensor) -> Units:
    """The units as the traced graph and the attention modules tell, not yet checked by numbers.

    Args:
        network: Any module that returns ``{task: Tensor}``; left as it is.
        example: An input batch.

    Raises:
        Exception: Whatever the tracer raises for a network that it cannot follow.
    """
    coupled, blockers = coupled_channels(network, example)
    order = {name: i for i, (name, _) in enumerate(network.named_modules())}
    heads = [_head_group(name, module) for name, module in plain_attention(network)]
    taken = {g.name for g in heads}
    groups = []
    for c in coupled:
        group = _channel_group(network, c.units, c.entries, taken)
        taken.add(group.name)
        groups.append(group)
    return Units(sorted([*groups, *heads], key=lambda g: order[g.name.split("/")[0]]), blockers)


def _channel_group(
    network: nn.Module, units: int, entries: Mapping[tuple[str, str], Tensor], taken: Collection[str]
) -> Group:
    """A group from coupled layers, called after its first producer, with a number if that is taken."""
    slots: list[Slot] = []
    name = ""
    for (module_name, side), unit in entries.items():
        module = network.get_submodule(module_name)
        if not name and side == "out" and isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
            name = module_name
        for tensor, dim in tensors_of(module, side).items():
            if getattr(module, tensor, None) is not None:
                slots.append(Slot(f"{module_name}.{tensor}" if module_name else tensor, dim, unit))
    number = 1
    while (unique := name if number == 1 else f"{name}/{number}") in taken:
        number += 1
    return Group(unique, units, tuple(slots))


def _head_group(name: str, module: Any) -> Group:
    """The heads of an attention module."""
    slots = tuple(Slot(f"{name}.{tensor}", dim, unit) for (tensor, dim), unit in head_entries(module).items())
    return Group(name, int(module.num_heads), slots)


def find_groups(
    network: nn.Module,
    batch: Any,
    *,
    inputs: Inputs | None = None,
    shared: Collection[str] | None = None,
) -> list[Group]:
    """The groups of :func:`find_units`, which see."""
    return find_units(network, batch, inputs=inputs, shared=shared).groups


def find_units(
    network: nn.Module,
    batch: Any,
    *,
    inputs: Inputs | None = None,
    shared: Collection[str] | None = None,
) -> Units:
    """All units of a network that can be cut exactly, checked by numbers.

    Half of the units of every group are cut at random on a copy, once by zeros and once physically; a group whose
    outputs differ is left out.

    Args:
        network: Any module whose forward returns ``{task: Tensor}``; left as it is.
        batch: A batch, or just the network's input; at most two of its entries are used.
        inputs: How to get the network's input from the batch.
        shared: Names of the parameters of the shared part (the backbone), of which at least one group must be.

    Returns:
        The groups, in the order of the network, and what keeps others whole: modules, and layers whose outputs would
        differ.

    Raises:
        ValueError: If the shared part, or without it the network, has no units; the message names the module that
            stops it.
    """
    example = batch if inputs is None and isinstance(batch, Tensor) else (inputs or network_input)(batch)
    example = example[:2].detach()
    stop = next(other_attention(network), None)
    if stop is not None:
        raise ValueError(f"the network cannot be cut by units: {stop} is attention of a form that is not known")
    with _running(network) as stack:
        try:
            units = traced_units(network, example)
        except Exception as error:  # a tracer for arbitrary networks may fail in any way
            where = f"; it is stopped by {stack[-1]}" if stack else ""
            raise ValueError(f"the network cannot be cut by units: it cannot be traced ({error!r}){where}") from error
    groups = _exact(network, example, units.groups)
    exact = {g.name for g in groups}
    blockers = [*units.blockers, *(g.name for g in units.groups if g.name not in exact)]
    wanted = set(shared) if shared is not None else {n for n, _ in network.named_parameters()}
    if not any(s.name in wanted for g in groups for s in g.slots if s.dim == 0):
        stop = next(iter(blockers), "having no convolution or linear layer whose channels can go")
        raise ValueError(f"the network's shared part cannot be cut by units; it is stopped by {stop}")
    return Units(groups, blockers)


@contextmanager
def _running(network: nn.Module) -> Iterator[list[str]]:
    """Names and kinds of the modules that run at the moment, the innermost last; they stay when one of them fails."""
    stack: list[str] = []
    handles = []
    for name, module in network.named_modules():
        told = f"{name or 'the network'} ({type(module).__name__})"
        handles.append(module.register_forward_pre_hook(lambda *_, told=told: stack.append(told)))
        handles.append(module.register_forward_hook(lambda *_: stack.pop() and None))
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


def _exact(network: nn.Module, example: Tensor, groups: Sequence[Group]) -> list[Group]:
    """The groups whose units can be removed with equal outputs."""
    check = OutputCheck(network, example)

    def good(part: list[Group]) -> list[Group]:
        if not part or _removable(network, part, check):
            return part
        if len(part) == 1:
            _log.warning("not cut by units, because the outputs would differ: %s", part[0].name)
            return []
        half = len(part) // 2
        return good(part[:half]) + good(part[half:])

    return good(list(groups))


def _removable(network: nn.Module, groups: Sequence[Group], check: OutputCheck) -> bool:
    """Whether zeroing half of the units, and removing them, give equal outputs."""
    generator = torch.Generator().manual_seed(0)
    kept = {}
    for group in groups:
        order = torch.randperm(group.units, generator=generator)
        kept[group.name] = torch.ones(group.units, dtype=torch.bool)
        kept[group.name][order[: group.units // 2]] = False
    masked = zeroed(network, groups, kept)
    return check.same(masked, lambda: without(masked, groups, kept))


def unit_scores(
    scores: Mapping[str, Scores],
    groups: Sequence[Group],
    reduce: Reduce = "sum",
    macs: Mapping[str, Tensor] | None = None,
) -> dict[str, Scores]:
    """Per-task scores of weights, reduced within each unit.

    A unit owns all its weights: those that make it and those that read it, also in the heads, as far as the task uses
    them. A weight between two units of one group counts for both.

    Args:
        scores: Task to parameter name to scores.
        groups: The units.
        reduce: ``"sum"``, ``"mean"`` over the weights, or ``"per_mac"``: the sum over the unit's multiply-accumulates.
        macs: Group name to those numbers of each unit; needed for ``"per_mac"``.

    Returns:
        Task to group name to float32 [units], for the groups that the task uses.

    Raises:
        ValueError: For another ``reduce``, or ``"per_mac"`` without ``macs``.
    """
    check_reduce(reduce)
    if reduce == "per_mac" and macs is None:
        raise ValueError("reduce 'per_mac' needs the multiply-accumulates of the units")
    result: dict[str, Scores] = {}
    for task, per in scores.items():
        result[task] = {}
        for group in groups:
            slots = [s for s in group.slots if s.name in per]
            if not slots:
                continue
            total = _summed({n: per[n] for n in {s.name for s in slots}}, slots, group.units)
            if reduce == "mean":
                ones = {n: torch.ones_like(per[n]) for n in {s.name for s in slots}}
                total = total / _summed(ones, slots, group.units).clamp_min(1)
            elif reduce == "per_mac" and macs is not None:
                total = total / macs[group.name].to(total).clamp_min(1)
            result[task][group.name] = total.float()
    return {task: per for task, per in result.items() if per}


def check_reduce(reduce: str) -> None:
    """Refuse a reduction that :func:`unit_scores` does not have."""
    if reduce not in get_args(Reduce):
        raise ValueError(f"reduce {reduce!r}; allowed: {', '.join(map(repr, get_args(Reduce)))}")


def _summed(values: Mapping[str, Tensor], slots: Sequence[Slot], units: int) -> Tensor:
    """Float64 sums of the values of each unit."""
    device = next(iter(values.values())).device
    total = torch.zeros(units + 1, dtype=torch.float64, device=device)  # the last is for entries of no unit
    for slot in slots:
        per_entry = values[slot.name].movedim(slot.dim, 0).reshape(len(slot.unit), -1).double().sum(1)
        total.index_add_(0, slot.unit.to(device) % (units + 1), per_entry)
    return total[:units]


def weight_mask(
    network: nn.Module, groups: Sequence[Group], kept: Mapping[str, Tensor], names: Collection[str] = ()
) -> Mask:
    """A choice of units as a mask over weights, biases and norm parameters.

    Args:
        network: The network whose parameters the mask is for.
        groups: The units.
        kept: Group name to bool [units], True = kept; a group that is missing keeps all.
        names: Weights that are in the mask even if no unit has a part in them.

    Returns:
        Parameter name to bool of the parameter's shape: False for every entry of a cut unit.
    """
    parameters = dict(network.named_parameters())
    mask: Mask = {n: torch.ones_like(parameters[n], dtype=torch.bool) for n in names}
    for group in groups:
        for slot in group.slots:
            if slot.name in parameters and group.name in kept:
                like = parameters[slot.name]
                whole = mask.setdefault(slot.name, torch.ones_like(like, dtype=torch.bool))
                entries = slot.entries(kept[group.name]).to(like.device)
                whole &= entries.view([-1 if d == slot.dim else 1 for d in range(like.ndim)])
    return mask


def cut_units(groups: Sequence[Group], mask: Mapping[str, Tensor]) -> Mask:
    """Which units a mask over weights has cut: those of which every masked entry is False.

    Args:
        groups: The units.
        mask: Parameter name to bool, True = kept.

    Returns:
        Group name to bool [units], True = cut.
    """
    return {g.name: ~g.alive(mask) for g in groups}
