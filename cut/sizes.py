"""Sizes: the numbers of channels that a layer's attributes must say once its tensors have been sliced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

CONV = nn.modules.conv._ConvNd
NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def sizes(module: Any, own: Mapping[str, Tensor]) -> dict[str, int]:
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
