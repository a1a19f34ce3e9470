"""Norms: a layer norm that has lost channels and still is the same function of those that are left.

A layer norm takes mean and variance over all channels. A cut channel of a masked network is zero there, but counts. So
a narrower norm has to count it too: :class:`PartialNorm` does. With it the widths of transformers and ConvNeXts, which
norms over channels read, can be cut exactly.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Layer norms by the dimension of their channels. By name, since timm and torchvision each have their own.
_CHANNELS = {"LayerNorm": -1, "LayerNorm2d": 1, "PartialNorm": -1}


class PartialNorm(nn.LayerNorm):
    """A layer norm over some of its channels, where the others are zero.

    Args:
        channels: Channels that are left.
        full: Channels that mean and variance are taken over.
        eps: Added to the variance.
        bias: Whether it has one.
        channels_first: Whether channels are the second dimension of four, else the last.

    Example:
        >>> x = torch.tensor([[1.0, 2.0, 0.0, 0.0]])
        >>> norm = PartialNorm(2, full=4)
        >>> torch.allclose(norm(x[:, :2]), nn.LayerNorm(4)(x)[:, :2])
        True
    """

    def __init__(
        self, channels: int, full: int, eps: float = 1e-5, bias: bool = True, channels_first: bool = False
    ) -> None:
        super().__init__(channels, eps=eps, bias=bias)
        self.full, self.channels_first = full, channels_first

    def forward(self, x: Tensor) -> Tensor:
        """Of the input's shape: its channels as the whole norm gives them."""
        x = x.permute(0, 2, 3, 1) if self.channels_first else x
        gone = self.full - self.normalized_shape[0]
        weight, bias = (None if p is None else F.pad(p, (0, gone)) for p in (self.weight, self.bias))
        # Zeros, one norm, a slice: runtimes have a fast norm, and a formula would be many small operations. Zeros are
        # joined, not padded: XNNPACK refuses a padding with int8 on one side only.
        x = torch.cat([x, x.new_zeros((*x.shape[:-1], gone))], -1)
        x = F.layer_norm(x, (self.full,), weight, bias, self.eps)[..., : self.normalized_shape[0]]
        return x.permute(0, 3, 1, 2) if self.channels_first else x

    def extra_repr(self) -> str:
        """Channels and those of the whole norm."""
        return f"{self.normalized_shape[0]} of {self.full}, eps={self.eps}"


def is_channel_norm(module: Any) -> TypeGuard[nn.LayerNorm]:
    """Whether a module is a layer norm over channels alone, with a scale for each, of a form that is known."""
    return (
        isinstance(module, nn.LayerNorm)
        and type(module).__name__ in _CHANNELS
        and len(module.normalized_shape) == 1
        and module._parameters.get("weight") is not None
    )


def whole_width(module: Any) -> int:
    """Channels that a channel norm's mean and variance are taken over."""
    return int(getattr(module, "full", module.normalized_shape[0]))


def partial(module: Any, full: int | None = None) -> PartialNorm:
    """A channel norm that counts as many channels as it has, or as ``full`` says; parameters are the module's own.

    Args:
        module: A channel norm, see :func:`is_channel_norm`; its parameters may have lost channels already.
        full: Default: the channels that the module counts.
    """
    first = getattr(module, "channels_first", _CHANNELS[type(module).__name__] == 1)
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    norm = PartialNorm(len(weight), full or whole_width(module), module.eps, bias is not None, first)
    norm.weight = weight
    if bias is not None:
        norm.bias = bias
    norm.training = module.training
    return norm


def put(network: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another, by its name."""
    parent, _, key = name.rpartition(".")
    network.get_submodule(parent)._modules[key] = module


def widths(network: nn.Module) -> dict[str, int]:
    """Name to :func:`whole_width` of every norm over channels."""
    return {n: whole_width(m) for n, m in network.named_modules() if is_channel_norm(m)}
