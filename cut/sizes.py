"""Sizes: the numbers of channels that a layer's attributes must say once its tensors have been sliced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from cut.norms import is_channel_norm

CONV = nn.modules.conv._ConvNd
NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def sizes(module: Any, own: Mapping[str, Tensor]) -> dict[str, Any]:
    """The size attributes that follow from a layer's tensors, the number of channels it emits first.

    Args:
        module: The layer with its dense attributes: a grouped convolution loses whole groups, so what they were wide
            tells how many are left.
        own: Tensor name to tensor.

    Raises:
        ValueError: If a grouped convolution's outputs are no whole number of groups.
    """
    if isinstance(module, CONV) and "weight" in own:
        return _conv_sizes(module, own["weight"])
    if isinstance(module, nn.Linear) and "weight" in own:
        return {"out_features": own["weight"].shape[0], "in_features": own["weight"].shape[1]}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": len(own["weight"])}
    if isinstance(module, nn.LayerNorm) and "weight" in own:
        return {"normalized_shape": tuple(own["weight"].shape)}
    lengths = [len(value) for value in own.values() if value.ndim == 1]
    return {"num_features": lengths[0]} if isinstance(module, NORMS) and lengths else {}


def _conv_sizes(module: Any, weight: Tensor) -> dict[str, int]:
    first, second = weight.shape[:2]
    if module.groups == 1:
        emits, reads = (second, first) if module.transposed else (first, second)
        return {"out_channels": emits, "in_channels": reads}
    rows = (module.in_channels if module.transposed else module.out_channels) // module.groups
    groups, rest = divmod(first, rows)
    if rest:
        raise ValueError(f"a grouped convolution has {first} rows, no multiple of {rows}")
    emits, reads = (groups * second, first) if module.transposed else (first, groups * second)
    return {"out_channels": emits, "in_channels": reads, "groups": groups}


def loose_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """A module's own parameters, if it is no layer of torch: embeddings, tokens, scales."""
    kinds = [k for k in type(module).__mro__ if k not in (nn.Module, *_CONTAINERS)]
    if any(k.__module__.startswith("torch.nn.") for k in kinds):
        return {}
    return {n: p for n, p in module._parameters.items() if p is not None and p.ndim}


def channel_dim(parameter: Tensor) -> int:
    """The dimension in which a parameter of no layer has its channels, as Torch-Pruning takes it: the last wide one.

    Example:
        >>> import torch
        >>> channel_dim(torch.zeros(1, 5, 64)), channel_dim(torch.zeros(64, 1, 1))
        (2, 0)
    """
    wide = [d for d, size in enumerate(parameter.shape) if size > 1]
    return wide[-1] if wide else parameter.ndim - 1


def can_shrink(module: nn.Module, name: str, shape: Sequence[int]) -> bool:
    """Whether units can go from a tensor of a module until it has another shape.

    Args:
        module: With its dense tensors.
        name: Of one of its own tensors.
        shape: The smaller shape.
    """
    tensor: Tensor = getattr(module, name)
    dense = tuple(tensor.shape)
    if len(dense) != len(shape) or not all(0 < s <= d for s, d in zip(shape, dense, strict=True)):
        return False
    if isinstance(module, (CONV, nn.Linear, nn.PReLU, *NORMS)) or is_channel_norm(module):
        return tuple(shape[2:]) == dense[2:]
    changed = [d for d in range(len(dense)) if shape[d] != dense[d]]
    return name in loose_parameters(module) and changed == [channel_dim(tensor)]
