"""Removal: units taken out of a network, by zeros or physically."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from cut.attention import fit_heads, is_plain
from cut.channels import OutputCheck
from cut.norms import is_channel_norm, partial, put, whole_width
from cut.sizes import sizes
from cut.slots import Group

_log = logging.getLogger(__name__)
Kept = Mapping[str, Tensor]  # group name to bool [units]


def zeroed(network: nn.Module, groups: Sequence[Group], kept: Kept) -> nn.Module:
    """A copy of a network in which every parameter entry of the cut units is zero."""
    result = copy.deepcopy(network)
    parameters = dict(result.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for group in groups:
            for slot in group.slots:
                if slot.name in parameters:
                    gone = ~slot.entries(kept[group.name])
                    parameters[slot.name].index_fill_(
                        slot.dim, gone.nonzero().squeeze(1).to(parameters[slot.name].device), 0.0
                    )
    return result


def without(network: nn.Module, groups: Sequence[Group], kept: Kept, *, count_cut: bool = True) -> nn.Module:
    """A copy of a network without the cut units; sizes, groups of convolutions and heads follow.

    Args:
        network: Left as it is.
        groups: Its units.
        kept: Group name to bool [units], True = kept; at least one of each group.
        count_cut: Whether norms over channels go on to count the cut ones, as zeros (:mod:`cut.norms`); a network that
            is to be trained from the start has no use for that.

    Returns:
        The smaller network; whether its outputs are those of :func:`zeroed` is for the caller to check.
    """
    result = copy.deepcopy(network)
    attention = [m for m in result.modules() if is_plain(m)]
    touched: set[str] = set()
    for (full_name, dim), entries in _entries(groups, kept).items():
        name, _, key = full_name.rpartition(".")
        module = result.get_submodule(name)
        value = getattr(module, key)
        sliced = value.detach().index_select(dim, entries.nonzero().squeeze(1).to(value.device)).contiguous()
        if isinstance(value, nn.Parameter):
            module._parameters[key] = nn.Parameter(sliced, value.requires_grad)
        else:
            module._buffers[key] = sliced
        touched.add(name)
    for name in touched:
        module = result.get_submodule(name)
        if count_cut and is_channel_norm(module) and module.weight.shape[0] < whole_width(module):
            put(result, name, partial(module))
            continue
        own = {k: v for k, v in [*module._parameters.items(), *module._buffers.items()] if v is not None}
        for attribute, size in sizes(module, own).items():
            setattr(module, attribute, size)
    for module in attention:
        fit_heads(module)
    return result


def _entries(groups: Sequence[Group], kept: Kept) -> dict[tuple[str, int], Tensor]:
    """(tensor name, dimension) to bool of the entries that stay; several groups can lie side by side in one."""
    found: dict[tuple[str, int], Tensor] = {}
    for group in groups:
        for slot in group.slots:
            entries = slot.entries(kept[group.name])
            place = (slot.name, slot.dim)
            found[place] = found[place] & entries if place in found else entries
    return found


def remove_cut_units(model: nn.Module, example: Tensor) -> nn.Module:
    """The model without the units of which every parameter is zero; its outputs are equal.

    Args:
        model: Any module that returns ``{task: Tensor}``, with its cut weights set to zero.
        example: An input batch that the model accepts; at most two of its entries are used.

    Returns:
        A smaller copy in eval mode, at least one unit left in every group; the model itself if nothing can go. What
        would change the outputs is left in.
    """
    from cut.units import traced_units

    if not _has_empty_rows(model):
        return model
    example = example[:2].detach()
    try:
        groups = traced_units(model, example).groups
    except Exception as error:  # a tracer for arbitrary networks may fail in any way; the model is then left as it is
        warnings.warn(f"no units removed: the network could not be traced ({error!r})", stacklevel=2)
        return model
    kept = _alive(model, groups)
    groups = [g for g in groups if g.name in kept]
    return _removed(model, groups, kept, OutputCheck(model, example)) if groups else model


def _has_empty_rows(model: nn.Module) -> bool:
    """Whether any layer has an output whose weights are all zero: only then can a unit be cut."""
    layers = (m for m in model.modules() if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear)))
    return any(bool((m.weight.detach().flatten(1) == 0).all(1).any()) for m in layers)


def _alive(model: nn.Module, groups: Sequence[Group]) -> dict[str, Tensor]:
    """The units that stay, of the groups that lose any; one stays where all are cut."""
    parameters = {n: p.detach() for n, p in model.named_parameters(remove_duplicate=False)}
    kept = {}
    for group in groups:
        alive = group.alive(parameters)
        if not alive.any():
            alive[0] = True
        if not alive.all():
            kept[group.name] = alive
    return kept


def _removed(model: nn.Module, groups: list[Group], kept: Kept, check: OutputCheck) -> nn.Module:
    """The model without as many of the groups' cut units as leave its outputs equal, found by halving."""

    def good(part: list[Group], done: list[Group]) -> list[Group]:
        if not part or check(without(model, done + part, kept)):
            return part
        if len(part) == 1:
            _log.info("left in, because the outputs would change: %s", part[0].name)
            return []
        half = len(part) // 2
        first = good(part[:half], done)
        return first + good(part[half:], done + first)

    return without(model, good(groups, []), kept).eval()
