"""Recovery: fine-tuning under a mask as a plain loop, for models that know nothing of Lightning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cut.decomposition import Inputs, Loss, forward
from cut.masks import apply_mask
from cut.objectives import endless, moved

WARMUP = 0.1  # share of the steps in which the learning rate rises


def recover(
    model: nn.Module,
    batches: Iterable[Any],
    losses: Mapping[str, Loss],
    tasks: Sequence[str],
    *,
    steps: int,
    lr: float = 1e-3,
    mask: Mapping[str, Tensor] | None = None,
    weights: Mapping[str, float] | None = None,
    inputs: Inputs | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> list[float]:
    """Train a model on the weighted sum of its tasks' losses; what a mask cuts stays zero.

    AdamW; the learning rate rises linearly for a tenth of the steps and falls to zero along a cosine. The mask is
    applied again after every step, so neither momentum nor weight decay revives a weight.

    Args:
        model: Forward gives ``{task: Tensor}``; trained in place, only what requires a gradient, and left in eval mode.
        batches: A loader, gone through as often as the steps need.
        losses: Task to a function of (output, batch).
        tasks: The tasks to train.
        steps: Optimiser steps; 0 trains nothing.
        lr: The highest learning rate.
        mask: Parameter name to bool, True = kept.
        weights: Task to loss weight; 1 where there is none.
        inputs: How to get the network's input from a batch.
        progress: Wraps the range of steps, for a progress bar.

    Returns:
        The loss of every step.

    Raises:
        ValueError: For bad numbers, a mask of another model, or a loss that is not finite (it names task and step).
    """
    if steps < 0 or lr <= 0:
        raise ValueError(f"steps {steps}, lr {lr}; allowed: steps of at least 0, lr above 0")
    mask = mask or {}
    apply_mask(model, mask)
    parameters = dict(model.named_parameters())
    device = next((p.device for p in parameters.values()), torch.device("cpu"))
    pairs = [(parameters[n], m.to(device, parameters[n].dtype)) for n, m in mask.items() if not m.all()]
    optimizer = torch.optim.AdamW([p for p in parameters.values() if p.requires_grad], lr=lr, weight_decay=1e-4)
    history = []
    source = endless(batches)
    model.train()
    for step in progress(range(steps)):
        for group in optimizer.param_groups:
            group["lr"] = lr * _factor(step, steps)
        batch = moved(next(source), device)
        outputs = forward(model, batch, inputs)
        total = _total(outputs, batch, losses, tasks, weights or {}, step)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()
        if pairs:
            with torch.no_grad():
                torch._foreach_mul_([p for p, _ in pairs], [m for _, m in pairs])
        history.append(float(total.detach()))
    model.eval()
    return history


def _factor(step: int, steps: int) -> float:
    """The learning rate at a step as a factor of the highest."""
    progress = (step + 1) / (steps + 1)
    if progress < WARMUP:
        return progress / WARMUP
    return (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP))) / 2


def _total(
    outputs: Mapping[str, Tensor],
    batch: Any,
    losses: Mapping[str, Loss],
    tasks: Sequence[str],
    weights: Mapping[str, float],
    step: int,
) -> Tensor:
    """The weighted sum of the tasks' losses, each checked."""
    terms = []
    for task in tasks:
        if task not in outputs:
            raise ValueError(f"the model has no output {task!r}; its outputs are {sorted(outputs)}")
        loss = losses[task](outputs[task], batch)
        if not torch.isfinite(loss).all():
            raise ValueError(f"the loss of task {task!r} is {float(loss.detach())} at step {step}; try a lower lr")
        terms.append(weights.get(task, 1.0) * loss.float().reshape(()))
    return torch.stack(terms).sum()
