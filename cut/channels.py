"""Dead channels: remove those that cannot matter to the outputs.

A channel may go if every layer that reads it either always gets zero for it or makes no use of it
(:mod:`cut.reach`). Which channels hang together (additions, depthwise convolutions, norms) is taken from
Torch-Pruning's dependency graph (Fang et al., *DepGraph*, CVPR 2023). Every removal is checked against the
original's outputs and undone if they differ.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cut.dependency import dependency_graph
from cut.reach import alive_inputs

Removal = dict[tuple[str, str], set[int]]  # (module name, "in" | "out") -> channels to remove
_log = logging.getLogger(__name__)

_CONV = nn.modules.conv._ConvNd
_PER_CHANNEL = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.PReLU)


def remove_dead_channels(model: nn.Module, example: Tensor) -> nn.Module:
    """A copy of the model without the channels that cannot matter; its outputs are equal.

    Args:
        model: Any module that returns ``{task: Tensor}``, with its cut weights set to zero.
        example: An input batch that the model accepts; at most two of its entries are used.

    Returns:
        The smaller model in eval mode; at least one channel is left in every layer. What Torch-Pruning cannot
        follow, or what would change the outputs, is left in.
    """
    model = copy.deepcopy(model).eval()
    example = example[:2].detach()
    try:
        alive = alive_inputs(model, example)
        removals = [] if all(bool(a.all()) for a in alive.values()) else list(_plan(model, example, alive))
    except Exception as error:  # a tracer for arbitrary networks may fail in any way; the model is then left as it is
        warnings.warn(f"no channels removed: the network could not be traced ({error!r})", stacklevel=2)
        return model
    return _remove_checked(model, removals, OutputCheck(model, example)) if removals else model


# -------------------------------------------------------------------------------------------- what to remove


def _plan(model: nn.Module, example: Tensor, alive: Mapping[str, Tensor]) -> Iterator[Removal]:
    """One removal per group of coupled layers, in the original's channel numbers."""
    names = {id(m): n for n, m in model.named_modules()}
    shared = shared_parameters(model)
    taken: Removal = defaultdict(set)
    graph = dependency_graph(model, example)
    for group in graph.get_all_groups():
        if not all(_can_slice(item.dep.target.module, shared) for item in group):
            continue
        removal = _dead_part(graph, group, names, alive, taken)
        for key, channels in removal.items():
            taken[key] |= channels
        if removal:
            yield removal


def _dead_part(
    graph: Any, group: Any, names: Mapping[int, str], alive: Mapping[str, Tensor], taken: Removal
) -> Removal:
    """What can go of one group: the channels that no reader needs, but one if a layer would end up empty."""
    root, prune = group[0].dep.target.module, group[0].dep.handler
    dead = set(group[0].idxs)
    for item in group:
        flags = _reader_flags(item, names, alive)
        if flags is not None:
            dead -= {r for i, r in zip(item.idxs, item.root_idxs, strict=True) if flags[i]}
    while dead:
        closure = graph.get_pruning_group(root, prune, sorted(dead))
        spare: set[int] = set()
        removal: Removal = {}
        for item in closure:
            flags = _reader_flags(item, names, alive)
            if flags is not None and any(flags[i] for i in item.idxs):
                return {}
            module = item.dep.target.module
            if id(module) in names and not (isinstance(module, nn.PReLU) and module.num_parameters == 1):
                key = _key(item, names)
                removal[key] = removal.get(key, set()) | set(item.idxs)
                if len(removal[key] | taken[key]) >= _size(module, key[1]):
                    spare.add(min(item.root_idxs))
        if not spare:
            return removal
        dead -= spare
    return {}


def _key(item: Any, names: Mapping[int, str]) -> tuple[str, str]:
    """Module name and side of an entry of a Torch-Pruning group; what keeps its channels counts as "out"."""
    module = item.dep.target.module
    reads = isinstance(module, (_CONV, nn.Linear)) and item.dep.handler.__name__ == "prune_in_channels"
    return names[id(module)], "in" if reads else "out"


def _reader_flags(item: Any, names: Mapping[int, str], alive: Mapping[str, Tensor]) -> list[bool] | None:
    """The alive flags of a layer whose *input* channels the entry would remove, else None."""
    if id(item.dep.target.module) not in names:
        return None
    name, side = _key(item, names)
    return alive[name].tolist() if side == "in" else None


def shared_parameters(model: nn.Module) -> set[int]:
    """The ids of parameters that are registered more than once (tied weights)."""
    seen: dict[int, int] = defaultdict(int)
    for module in model.modules():
        for p in module._parameters.values():
            seen[id(p)] += p is not None
    return {i for i, count in seen.items() if count > 1}


def _can_slice(module: Any, shared: set[int]) -> bool:
    """Whether a node's channels can go one by one: what mixes, groups or shares them is left alone."""
    from torch_pruning import ops

    kind = ops.module2type(module)
    if kind in (
        ops.OPTYPE.ELEMENTWISE,
        ops.OPTYPE.CONCAT,
        ops.OPTYPE.SPLIT,
        ops.OPTYPE.RESHAPE,
        ops.OPTYPE.EXPAND,
    ):
        return True
    if not isinstance(module, (_CONV, nn.Linear, *_PER_CHANNEL)) or any(id(p) in shared for p in module.parameters()):
        return False
    if "weight" not in module._parameters:  # a parametrised weight
        return False
    return not isinstance(module, _CONV) or module.groups == 1 or _is_depthwise(module)


def _is_depthwise(module: nn.Module) -> bool:
    return (
        isinstance(module, _CONV) and module.groups > 1 and module.groups == module.in_channels == module.out_channels
    )


# ----------------------------------------------------------------------------------------------- removing it


def _fields(module: nn.Module, side: str) -> tuple[tuple[str, ...], dict[str, int]]:
    """The size attributes and the tensors (name to dimension) that hold one side's channels."""
    if _is_depthwise(module):
        return ("out_channels", "in_channels", "groups"), {"weight": 0, "bias": 0}
    if isinstance(module, _CONV):
        weight_dim = int((side == "in") != module.transposed)
        return (f"{side}_channels",), {"weight": weight_dim} | ({"bias": 0} if side == "out" else {})
    if isinstance(module, nn.Linear):
        return (f"{side}_features",), {"weight": 0, "bias": 0} if side == "out" else {"weight": 1}
    if isinstance(module, nn.PReLU):
        return ("num_parameters",), {"weight": 0}
    return ("num_features",), {"weight": 0, "bias": 0, "running_mean": 0, "running_var": 0}


def _size(module: nn.Module, side: str) -> int:
    return int(getattr(module, _fields(module, side)[0][0]))


def _slice(module: nn.Module, side: str, channels: set[int]) -> None:
    """Remove channels from one side of a layer, in place."""
    attributes, tensors = _fields(module, side)
    kept = torch.tensor(sorted(set(range(_size(module, side))) - channels))
    for name, dim in tensors.items():
        value = getattr(module, name, None)
        if value is None:
            continue
        sliced = value.detach().index_select(dim, kept.to(value.device)).contiguous()
        setattr(
            module,
            name,
            nn.Parameter(sliced, value.requires_grad) if isinstance(value, nn.Parameter) else sliced,
        )
    for attribute in attributes:
        setattr(module, attribute, len(kept))


def _without(model: nn.Module, removals: list[Removal]) -> nn.Module:
    """A copy of the model with all the removals carried out."""
    total: Removal = defaultdict(set)
    for removal in removals:
        for key, channels in removal.items():
            total[key] |= channels
    smaller = copy.deepcopy(model)
    for (name, side), channels in total.items():
        _slice(smaller.get_submodule(name), side, channels)
    return smaller


def trial_inputs(example: Tensor) -> list[Tensor]:
    """The example, then random inputs of its size and, for pictures, of a larger one (it may be refused)."""
    if not example.is_floating_point():
        return [example]
    generator = torch.Generator().manual_seed(1)
    shapes = [list(example.shape)]
    if example.ndim == 4:
        shapes.append([*example.shape[:2], *(s + 32 for s in example.shape[2:])])
    return [example, *(torch.randn(s, generator=generator).to(example) for s in shapes)]


class OutputCheck:
    """Compares a model with the original, in float64 if the original can run in it."""

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self.double = example.is_floating_point()
        try:
            self._run(model, example)
        except Exception:  # a network that names its dtype
            self.double = False
        self.inputs, self.expected = [], []
        for x in trial_inputs(example):
            try:
                self.expected.append(self._run(model, x))
            except Exception:
                if x is example:
                    raise
                continue  # a network of fixed input size
            self.inputs.append(x)

    @torch.no_grad()
    def _run(self, model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        return dict(copy.deepcopy(model).double()(x.double()) if self.double else model(x))

    def __call__(self, model: nn.Module) -> bool:
        """Whether the model's outputs are the original's."""
        return self._equal(model, self.expected)

    def same(self, model: nn.Module, make: Callable[[], nn.Module]) -> bool:
        """Whether another model of the same inputs, and one that is made of it, have equal outputs."""
        try:
            return self._equal(make(), [self._run(model, x) for x in self.inputs])
        except Exception:  # whatever making or running a network of the wrong shape raises
            return False

    def _equal(self, model: nn.Module, expected: list[dict[str, Tensor]]) -> bool:
        try:
            return all(
                same_outputs(self._run(model, x), wanted, 1e-8 if self.double else 1e-5)
                for x, wanted in zip(self.inputs, expected, strict=True)
            )
        except Exception:  # whatever a network of the wrong shape raises
            return False


def same_outputs(outputs: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> bool:
    """Whether all expected outputs are there and equal to within ``tolerance`` x their largest value."""
    for task, want in expected.items():
        got = outputs.get(task)
        if got is None or got.shape != want.shape or got.dtype != want.dtype:
            return False
        if not want.is_floating_point():
            if not torch.equal(got, want):
                return False
            continue
        scale = float(torch.nan_to_num(want, posinf=0, neginf=0).abs().max()) if want.numel() else 0.0
        if not torch.allclose(got, want, rtol=0, atol=tolerance * scale, equal_nan=True):
            return False
    return True


def _remove_checked(model: nn.Module, removals: list[Removal], check: Callable[[nn.Module], bool]) -> nn.Module:
    """The model without as many of the removals as leave its outputs equal, found by halving."""

    def good(part: list[Removal], done: list[Removal]) -> list[Removal]:
        if not part or check(_without(model, done + part)):
            return part
        if len(part) == 1:
            _log.info("left in, because the outputs would change: %s", sorted(part[0]))
            return []
        half = len(part) // 2
        first = good(part[:half], done)
        return first + good(part[half:], done + first)

    return _without(model, good(removals, []))
