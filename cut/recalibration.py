"""Recalibration: batch norm's running statistics measured anew on a cut network (as in arXiv 2007.02491)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from cut.decomposition import Inputs, forward


def recalibrate(network: nn.Module, batches: Iterable[Any], inputs: Inputs | None = None) -> None:
    """Replace every batch norm's running mean and variance by their averages over batches, in place.

    Weights, and the mode of every module, stay as they were. A network without batch norm is left alone.

    Args:
        network: Any module.
        batches: At least one, on the network's device.
        inputs: How to get the network's input from a batch.

    Raises:
        ValueError: If there are no batches.
    """
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    given = iter(batches)
    first = next(given, None)
    if first is None:
        raise ValueError("no batches to measure batch norm's statistics on")
    modes = {m: m.training for m in network.modules()}
    momenta = [m.momentum for m in norms]
    network.eval()  # dropout stays off: only norms see their batch
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the cumulative average
            norm.train()
        with torch.no_grad():
            for batch in itertools.chain([first], given):
                forward(network, batch, inputs)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
