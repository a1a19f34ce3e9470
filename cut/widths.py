"""Widths: a fresh network made narrower everywhere by the same factor, to be trained from scratch.

This is the width multiplier of MobileNets (Howard et al., arXiv 1704.04861) for any backbone: of every group of coupled
channels, attention heads and neurons (:mod:`cut.units`) the first ones stay, a transformer's embedding among them. What
cannot be cut by units keeps its width: the outputs. So multiply-accumulates fall roughly with the square of the width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from cut import backbones
from cut.network import MultiTaskNet
from cut.removal import without
from cut.slots import Group
from cut.units import find_groups

MULTIPLE = 8  # of channels, as in timm's models of other widths


def check_width(width: float, weights: str | None = None) -> None:
    """Refuse a width that :func:`narrowed` does not have, or pre-trained weights that do not fit it.

    Raises:
        ValueError: For a width outside (0, 1], or weights with a width below 1.
    """
    if not 0 < width <= 1:
        raise ValueError(f"width {width}; allowed: above 0, up to 1 (a share of every layer's channels)")
    if width < 1 and weights is not None:
        raise ValueError(f"weights {weights!r} do not fit a network of width {width}; allowed: None (random)")


def narrowed(network: MultiTaskNet, width: float, example_size: Sequence[int], multiple: int = 1) -> MultiTaskNet:
    """A copy of a network with the first ``max(1, round(width x units))`` units of every group.

    The weights that stay are unchanged, so they have the spread that was drawn for the full width.

    Args:
        network: Left as it is.
        width: Share of the units, in (0, 1].
        example_size: Height and width in pixels of a picture that the network takes, to see what is coupled.
        multiple: Channels of a group are rounded to the nearest multiple of it, where the group has that many.

    Returns:
        The narrower network, in the network's own mode.

    Raises:
        ValueError: For a width or multiple that is not allowed, or a network without units.
    """
    check_width(width)
    if multiple < 1:
        raise ValueError(f"multiple {multiple}; allowed: 1 (not at all) or a number of channels such as 4, 8, 16")
    example = torch.randn(2, 3, *example_size, generator=torch.Generator().manual_seed(0))
    example = example.to(next(network.parameters()))
    calm = copy.deepcopy(network).eval()
    groups = find_groups(calm, example)
    kept = {g.name: _first(g, width, multiple) for g in groups}
    result = cast(MultiTaskNet, without(calm, groups, kept, count_cut=False))
    result.channels = _channels(result, example)
    modes = {n: m.training for n, m in network.named_modules()}
    for name, module in result.named_modules():
        module.training = modes[name]
    return result


def _channels(network: MultiTaskNet, example: Tensor) -> list[int]:
    """Channels of the backbone's maps."""
    found: list[int] = []

    def look(_: nn.Module, __: Any, maps: Sequence[Tensor]) -> None:
        found.extend(m.shape[1] for m in backbones.nchw(maps, network.nhwc))

    handle = network.backbone.register_forward_hook(look)
    with torch.no_grad():
        network(example)
    handle.remove()
    return found


def _first(group: Group, width: float, multiple: int) -> Tensor:
    """Bool [units]: the first ones, as many as the width says."""
    step = group.step(multiple)
    count = min(group.units, max(1, round(width * group.units / step)) * step)
    return torch.arange(group.units) < count
