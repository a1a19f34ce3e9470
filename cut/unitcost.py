"""Unit cost: what a network takes when only some of its units stay, counted without building it.

Every tensor's size is the product of what is kept along its dimensions, and a layer's multiply-accumulates are the size
of its weight times the positions it is applied at. So the counts equal those of the network with the units physically
removed (:mod:`cut.removal`), and they can only fall when more is cut.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cut.attention import is_plain, plain_attention, product_macs
from cut.decomposition import prunable
from cut.slots import Group

LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
Amounts = dict[str, float]  # "weights", "parameters", "macs", "bytes"


@dataclass
class _Sized:
    """A tensor as its kept size sees it.

    Attributes:
        shape: Dense shape.
        parts: (dimension, group name, entries of each unit along it).
        itemsize: Bytes of a number.
        parameter: Whether it is one (else a buffer).
        weight: Whether it is the weight of a convolution or linear layer.
        positions: Where it is applied for one picture, for multiply-accumulates.
    """

    shape: tuple[int, ...]
    parts: list[tuple[int, str, Tensor]]
    itemsize: int
    parameter: bool
    weight: bool
    positions: int = 0

    def size(self, kept: Mapping[str, Tensor]) -> int:
        """Numbers left when these units stay."""
        sides = list(self.shape)
        for dim, name, entries in self.parts:
            sides[dim] -= int(entries[~kept[name]].sum())
        return math.prod(sides)


class UnitCost:
    """Counts for a choice of units of one network.

    Args:
        network: The dense network, with the kept tasks only and in eval mode; not changed.
        groups: Its units.
        example: An input; the counts are for its first entry.
        saved: What is saved of it, where that is the network in a filter over its outputs.

    Attributes:
        groups: The units.
        dense: The amounts with all units.
        facts: Bytes of the facts that are saved with the model, which its file's size includes.
    """

    facts: int = 0

    def __init__(
        self, network: nn.Module, groups: Sequence[Group], example: Tensor, saved: nn.Module | None = None
    ) -> None:
        from cut.cost import macs

        self.groups = list(groups)
        self._saved = saved or network
        positions, tokens = _watched(network, example[:1])
        self._tensors = _sized(network, self.groups, positions)
        attention = dict(plain_attention(network))
        self._heads = {
            g.name: product_macs(attention[g.name], 1) * tokens.get(g.name, 0)
            for g in self.groups
            if g.name in attention
        }
        self._rest = 0  # products of matrices without weights, which no unit is part of
        everything = self.everything()
        self._rest = macs(network, example) - self._macs(everything)
        self.dense: Amounts = self.amounts(everything)

    def everything(self) -> dict[str, Tensor]:
        """All units."""
        return {g.name: torch.ones(g.units, dtype=torch.bool) for g in self.groups}

    def amounts(self, kept: Mapping[str, Tensor]) -> Amounts:
        """What is left when these units stay.

        Args:
            kept: Group name to bool [units]; all groups.

        Returns:
            ``"weights"`` (of convolutions and linear layers), ``"parameters"``, ``"macs"`` for one picture and
            ``"bytes"`` of the tensors. Tied parameters count once.
        """
        kept = {n: k.cpu() for n, k in kept.items()}
        sizes = [(t, t.size(kept)) for t in self._tensors]
        return {
            "weights": sum(s for t, s in sizes if t.weight),
            "parameters": sum(s for t, s in sizes if t.parameter),
            "macs": self._rest + sum(s * t.positions for t, s in sizes) + self._head_macs(kept),
            "bytes": sum(s * t.itemsize for t, s in sizes),
        }

    def _macs(self, kept: Mapping[str, Tensor]) -> int:
        return sum(t.size(kept) * t.positions for t in self._tensors) + self._head_macs(kept)

    def _head_macs(self, kept: Mapping[str, Tensor]) -> int:
        return sum(each * int(kept[name].sum()) for name, each in self._heads.items())

    @property
    def file_overhead(self) -> int:
        """Bytes that the saved network takes beside its tensors: facts, names, shapes; no fewer for smaller ones."""
        return self._names + self.facts

    @cached_property
    def _names(self) -> int:
        from cut.checkpoint import save

        with tempfile.TemporaryDirectory() as folder:
            return save(self._saved, Path(folder) / "model", sparse=False) - int(self.dense["bytes"])

    def unit_macs(self) -> dict[str, Tensor]:
        """Multiply-accumulates of each unit in the dense network: what makes it and what reads it, float64."""
        found = {g.name: torch.zeros(g.units, dtype=torch.float64) for g in self.groups}
        for tensor in self._tensors:
            total = math.prod(tensor.shape) * tensor.positions
            for dim, name, entries in tensor.parts:
                found[name] += entries.double() * (total / tensor.shape[dim])
        for name, each in self._heads.items():
            found[name] += each
        return found


def _sized(network: nn.Module, groups: Sequence[Group], positions: Mapping[str, int]) -> list[_Sized]:
    """All tensors of a network that its file holds, each once."""
    parts: dict[str, list[tuple[int, str, Tensor]]] = {}
    for group in groups:
        for slot in group.slots:
            entries = torch.bincount(slot.unit[slot.unit >= 0], minlength=group.units)
            parts.setdefault(slot.name, []).append((slot.dim, group.name, entries))
    weights = set(prunable(network))
    tensors, seen = [], set()
    for name, value in network.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            tensors.append(
                _Sized(
                    tuple(value.shape),
                    parts.get(name, []),
                    value.itemsize,
                    isinstance(value, nn.Parameter),
                    name in weights,
                    positions.get(name, 0),
                )
            )
    return tensors


def _watched(network: nn.Module, picture: Tensor) -> tuple[dict[str, int], dict[str, int]]:
    """Weight name to the positions that its layer is applied at, and attention name to the square of its tokens."""
    positions: dict[str, int] = {}
    tokens: dict[str, int] = {}
    names = {id(p): n for n, p in network.named_parameters()}

    def layer(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        name = names[id(module.weight)]
        if isinstance(module, nn.Linear):
            here = output.numel() // module.out_features
        else:
            at = args[0] if module.transposed else output
            here = math.prod(at.shape[-len(module.kernel_size) :])
        positions[name] = positions.get(name, 0) + here

    def attention(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], __: Any) -> None:
            tokens[name] = tokens.get(name, 0) + args[0].shape[1] ** 2

        return hook

    handles = []
    for name, module in network.named_modules():
        if isinstance(module, LAYERS) and id(module._parameters.get("weight")) in names:
            handles.append(module.register_forward_hook(layer))
        elif is_plain(module):
            handles.append(module.register_forward_hook(attention(name)))
    try:
        with torch.no_grad():
            network(picture)
    finally:
        for handle in handles:
            handle.remove()
    return positions, tokens
