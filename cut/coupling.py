"""Coupling: which channels of which layers can only be cut together.

Torch-Pruning's dependency graph (Fang et al., *DepGraph*, CVPR 2023) says which channels hang together by additions,
concatenations, norms, depthwise convolutions and readers. Its groups are joined here into one partition of all
channels: a grouped convolution couples the inputs and outputs of each of its groups, so that whole groups go. What the
graph or this module cannot slice exactly (a norm over groups of channels, a reshaped attention, tied weights) blocks
all that is coupled to it. Parameters that are no layer's (position embeddings, class tokens, layer scales) are sliced
along the dimension in which the graph holds their channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cut.channels import shared_parameters
from cut.dependency import dependency_graph
from cut.norms import is_channel_norm
from cut.sizes import CONV, channel_dim, loose_parameters

PER_CHANNEL = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.PReLU)
# Module name, and "in" | "out"; what keeps its channels apart counts as "out"; ".name" is a parameter of no layer.
Key = tuple[str, str]


@dataclass
class Coupled:
    """Layers that lose the same units.

    Attributes:
        units: Number of units.
        entries: (module name, side) to the unit of each of its channels, -1 where it belongs to none of these.
    """

    units: int
    entries: dict[Key, Tensor] = field(default_factory=dict)


def tensors_of(module: nn.Module, side: str) -> dict[str, int]:
    """Names of a layer's tensors that hold one side's channels, each with the dimension that does."""
    if side.startswith("."):
        return {side[1:]: channel_dim(getattr(module, side[1:]))}
    if isinstance(module, CONV):
        if module.groups > 1:  # whole groups go: the inputs have no dimension of their own
            return {"weight": 0, "bias": 0} if side == "out" else {}
        return {"weight": int((side == "in") != module.transposed)} | ({"bias": 0} if side == "out" else {})
    if isinstance(module, nn.Linear):
        return {"weight": 0, "bias": 0} if side == "out" else {"weight": 1}
    if isinstance(module, nn.PReLU):
        return {"weight": 0}
    return {"weight": 0, "bias": 0, "running_mean": 0, "running_var": 0}


def coupled_channels(model: nn.Module, example: Tensor) -> tuple[list[Coupled], list[str]]:
    """The partition of a model's channels, and what stands in the way of the rest.

    Args:
        model: Any module that returns ``{task: Tensor}``; left as it is.
        example: An input batch.

    Returns:
        Layers with units that can be cut, in the order of the model; and the names (with kinds) of the modules that
        block others.

    Raises:
        Exception: Whatever the tracer raises for a network that it cannot follow.
    """
    nodes = _Nodes(model)
    for group in dependency_graph(model, example).get_all_groups():
        nodes.add(list(group))
    return nodes.partition(), nodes.blockers


class _Nodes:
    """Channels as nodes of a graph whose connected parts are units."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.names = {id(m): n for n, m in self.modules.items()}
        self.tied = shared_parameters(model)
        self.loose: dict[int, Key] = {}  # id of a parameter of no layer to its key
        self.first: dict[Key, int] = {}  # (module, side) to the node of its channel 0
        self.sizes: dict[Key, int] = {}
        self.count = 0
        self.edges: list[tuple[np.ndarray, np.ndarray]] = []
        self.blocked: list[int] = []
        self.blockers: list[str] = []
        for name, module in self.modules.items():
            for side in ("out", "in") if isinstance(module, (CONV, nn.Linear)) else ("out",):
                if self._known(module):
                    self._place((name, side), self._size(module, side))
            if isinstance(module, CONV) and module.groups > 1:
                self._join_groups(name, module)
            self._place_loose(name, module)

    def _place(self, key: Key, size: int) -> None:
        self.first[key], self.sizes[key] = self._allocate(size), size

    def _place_loose(self, name: str, module: nn.Module) -> None:
        """Nodes for a module's parameters, if it is no layer."""
        for attribute, parameter in loose_parameters(module).items():
            if id(parameter) not in self.tied:
                self.loose[id(parameter)] = name, f".{attribute}"
                self._place(self.loose[id(parameter)], parameter.shape[channel_dim(parameter)])

    def _allocate(self, size: int) -> int:
        start, self.count = self.count, self.count + size
        return start

    def _known(self, module: Any) -> bool:
        """Whether a module holds channels that can be sliced one by one, or group by group."""
        if not isinstance(module, (CONV, nn.Linear, *PER_CHANNEL)) and not is_channel_norm(module):
            return False
        if any(id(p) in self.tied for p in module.parameters()):
            return False
        if isinstance(module, (CONV, nn.Linear, nn.PReLU)) and "weight" not in module._parameters:
            return False  # a parametrised weight
        if isinstance(module, nn.PReLU):
            return module.num_parameters > 1
        return not (isinstance(module, CONV) and module.transposed and module.groups > 1)

    @staticmethod
    def _size(module: Any, side: str) -> int:
        if isinstance(module, CONV):
            return module.out_channels if side == "out" else module.in_channels
        if isinstance(module, nn.Linear):
            return module.out_features if side == "out" else module.in_features
        if isinstance(module, nn.LayerNorm):
            return int(module.normalized_shape[0])
        return module.num_parameters if isinstance(module, nn.PReLU) else module.num_features

    def _join_groups(self, name: str, conv: Any) -> None:
        """Couple the inputs and outputs of each group of a grouped convolution."""
        if (name, "out") not in self.first:
            return
        hubs = self._allocate(conv.groups)
        for side in ("out", "in"):
            size = self._size(conv, side)
            channel = np.arange(size)
            self.edges.append((self.first[name, side] + channel, hubs + channel // (size // conv.groups)))

    def _key(self, item: Any) -> Key | None:
        """The layer and side, or the parameter of no layer, that an entry of a group is about; None for operations."""
        module = item.dep.target.module
        if id(module) not in self.names:
            return self.loose.get(id(module))
        reads = isinstance(module, (CONV, nn.Linear)) and item.dep.handler.__name__ == "prune_in_channels"
        return self.names[id(module)], "in" if reads else "out"

    def add(self, items: list[Any]) -> None:
        """Take in one group of the dependency graph."""
        roots = self._allocate(max(max(item.root_idxs) for item in items) + 1)
        for item in items:
            key = self._key(item)
            if key is not None and key in self.first and max(item.idxs) < self.sizes[key]:
                self.edges.append((self.first[key] + np.asarray(item.idxs), roots + np.asarray(item.root_idxs)))
            elif not self._passes(item):
                self.blocked.append(roots)
                self.edges.append((np.full(len(items[0].idxs), roots), roots + np.asarray(items[0].root_idxs)))
                self._note(item, key)

    @staticmethod
    def _passes(item: Any) -> bool:
        """Whether an operation without parameters, or with one for all channels, keeps channels apart."""
        from torch_pruning import ops

        module = item.dep.target.module
        if isinstance(module, nn.PReLU):
            return module.num_parameters == 1
        kinds = ops.OPTYPE
        plain = (kinds.ELEMENTWISE, kinds.CONCAT, kinds.SPLIT, kinds.SLICE, kinds.RESHAPE, kinds.EXPAND)
        return ops.module2type(module) in plain

    def _note(self, item: Any, key: Key | None) -> None:
        """Remember what blocks, outputs aside: those are never cut."""
        kind = type(item.dep.target.module).__name__
        name = key[0] if key is not None else item.dep.target.name
        what = f"{name} ({kind})" if key is not None else str(name).split(" (")[0]
        if kind != "_OutputOp" and what not in self.blockers:
            self.blockers.append(what)

    def partition(self) -> list[Coupled]:
        """Units by layers: those that the same layers make are one entry."""
        from scipy.sparse import coo_array  # not needed where models are only loaded
        from scipy.sparse.csgraph import connected_components

        rows = np.concatenate([a for a, _ in self.edges] or [np.zeros(0, int)])
        columns = np.concatenate([b for _, b in self.edges] or [np.zeros(0, int)])
        adjacency = coo_array((np.ones(len(rows), bool), (rows, columns)), shape=(self.count, self.count))
        _, part = connected_components(adjacency, directed=False)
        stopped = np.isin(part, part[np.asarray(self.blocked, dtype=int)])
        # A channel that nothing was said about (an input picture's, a layer that was never called) stays.
        stopped |= ~np.isin(np.arange(self.count), rows)
        parts = {
            key: np.where(stopped[at : at + self.sizes[key]], -1, part[at : at + self.sizes[key]])
            for key, at in self.first.items()
        }
        return list(_by_producer(parts, self.modules))


def _by_producer(parts: Mapping[Key, np.ndarray], modules: Mapping[str, nn.Module]) -> Iterator[Coupled]:
    """Group units that the same layers make, so that every branch of a concatenation has its own; number them."""
    makers: dict[int, list[Key]] = {}  # unit to the layers that make it
    for key, part in parts.items():
        if key[1] == "out" and isinstance(modules[key[0]], (CONV, nn.Linear)):
            for unit in dict.fromkeys(part[part >= 0].tolist()):
                makers.setdefault(unit, []).append(key)
    families: dict[tuple[Key, ...], list[int]] = {}
    for unit, keys in makers.items():
        families.setdefault(tuple(keys), []).append(unit)
    for units in families.values():
        numbers = {unit: number for number, unit in enumerate(units)}
        found = Coupled(len(numbers))
        for key, part in parts.items():
            entry = torch.tensor([numbers.get(u, -1) for u in part.tolist()])
            if (entry >= 0).any():
                found.entries[key] = entry
        yield found
