"""Heads: from backbone feature maps to one task's output."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RATES = (6, 12, 18, 24)


class ASPPHead(nn.Module):
    """The paper's head: four parallel dilated branches on the deepest map, their outputs summed.

    Each branch is 3x3 dilated convolution to ``width``, ReLU, dropout, 1x1 convolution, ReLU, dropout, 1x1 to ``out``.

    Args:
        channels: Channels of the early and the deepest map; only the deepest is used.
        out: Output channels.
        width: Channels inside a branch; the paper has 1024.
        dropout: Dropout probability; the reference has 0.5.
    """

    def __init__(self, channels: Sequence[int], out: int, width: int = 1024, dropout: float = 0.0) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels[-1], width, 3, padding=rate, dilation=rate),
                nn.ReLU(),
                nn.Dropout(dropout),
                nn.Conv2d(width, width, 1),
                nn.ReLU(),
                nn.Dropout(dropout),
                nn.Conv2d(width, out, 1),
            )
            for rate in RATES
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """[B, out, h, w] at the deepest map's resolution."""
        return torch.stack([branch(features[-1]) for branch in self.branches]).sum(0)


def _conv(inputs: int, outputs: int, kernel: int = 1, groups: int = 1) -> list[nn.Module]:
    """Convolution, batch norm, ReLU: in this order and unshared, so that a dead channel can be followed through it."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


class LightHead(nn.Module):
    """A light decoder: context on the deepest map, joined with an early map for sharp borders.

    Args:
        channels: Channels of the early and the deepest map.
        out: Output channels.
        width: Channels inside the decoder.
        dropout: Dropout probability before the last layer.
    """

    def __init__(self, channels: Sequence[int], out: int, width: int = 64, dropout: float = 0.0) -> None:
        super().__init__()
        skip = max(8, width // 2)
        self.deep = nn.Sequential(
            *_conv(channels[-1], width), *_conv(width, width, 5, groups=width), *_conv(width, width)
        )
        self.early = nn.Sequential(*_conv(channels[0], skip))
        joined = width + skip
        self.join = nn.Sequential(
            *_conv(joined, joined, 3, groups=joined),
            *_conv(joined, width),
            *_conv(width, width, 3, groups=width),
            *_conv(width, width),
        )
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Conv2d(width, out, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """[B, out, h, w] at the early map's resolution."""
        early, deep = features[0], features[-1]
        deep = F.interpolate(self.deep(deep), size=early.shape[-2:], mode="bilinear", align_corners=False)
        return self.out(self.dropout(self.join(torch.cat([deep, self.early(early)], 1))))


class LinearHead(nn.Module):
    """The head of an image-level task: average over the deepest map, dropout, linear.

    Args:
        channels: Channels of the early and the deepest map; only the deepest is used.
        out: Output channels.
        dropout: Dropout probability before the linear layer.
    """

    def __init__(self, channels: Sequence[int], out: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(channels[-1], out)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """[B, out]."""
        return self.out(self.dropout(features[-1].mean((2, 3))))
