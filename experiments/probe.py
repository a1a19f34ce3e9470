"""Probe: a head fitted on a frozen backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cut.network import MultiTaskNet


def fit_head(
    network: MultiTaskNet,
    task: str,
    batches: Sequence[Mapping[str, Tensor]],
    loss: Callable[[Tensor, Any], Tensor],
    steps: int,
    rate: float,
) -> None:
    """Train one head alone, on feature maps that the frozen backbone gives once.

    Args:
        network: Changed in place; its modes are put back.
        task: Whose head.
        batches: Labelled batches on the network's device, taken in turns.
        loss: A function of (output, batch).
        steps: Optimiser steps; 0 changes nothing.
        rate: Learning rate of Adam.
    """
    head, caught = network.heads[task], list[list[Tensor]]()
    modes = [(m, m.training) for m in network.modules()]
    handle = head.register_forward_pre_hook(lambda _, args: caught.append([m.detach() for m in args[0]]))
    network.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                network(batch["image"])
    finally:
        handle.remove()
    head.train()
    optimizer = torch.optim.Adam(head.parameters(), lr=rate)
    for step in range(steps):
        batch, maps = batches[step % len(batches)], caught[step % len(batches)]
        out = head(maps)
        if task not in network.image_level:
            out = F.interpolate(out, size=batch["image"].shape[-2:], mode="bilinear", align_corners=False)
        optimizer.zero_grad(set_to_none=True)
        loss(out, batch).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for module, training in modes:
        module.training = training
