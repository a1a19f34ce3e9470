"""Objectives: what the tasks of a model of one's own are trained on and judged by, in plain functions.

A task of :mod:`cut.tasks` is one; so is a pair of a loss and metrics that someone wrote for their own model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cut.decomposition import Inputs, Loss, forward

LOSS = "loss"


class Judge(Protocol):
    """A metric with state, as torchmetrics has them."""

    higher_is_better: bool | None

    def update(self, output: Tensor, target: Tensor) -> None:
        """Take in a batch."""
        ...

    def compute(self) -> Tensor:
        """The value over all batches."""
        ...


@dataclass(frozen=True)
class Objective:
    """A task's loss and metrics.

    Attributes:
        loss: Of (output, batch), one number; without the weight.
        metrics: Name to a function of (output, batch), whose values are averaged over pictures, or to a metric with
            ``update(output, batch[task])`` and ``compute()``.
        weight: Of the loss in training.
        dense: Whether metrics with state get the output at their label's resolution.
    """

    loss: Loss
    metrics: Mapping[str, Callable[[Tensor, Any], Any] | Judge] = field(default_factory=dict)
    weight: float = 1.0
    dense: bool = False


def objectives_of(tasks: Any) -> dict[str, Objective]:
    """Objectives from what a setup function returned.

    Args:
        tasks: Task name to an :class:`Objective`, a loss, or a pair (loss, metrics).

    Raises:
        ValueError: If it is anything else; the message names the task.
    """
    if not isinstance(tasks, Mapping) or not tasks:
        raise ValueError(f"tasks are {type(tasks).__name__}; allowed: a dict of task name to loss or (loss, metrics)")
    return {str(name): _objective(str(name), entry) for name, entry in tasks.items()}


def _objective(name: str, entry: Any) -> Objective:
    """One entry of a setup function's tasks."""
    if isinstance(entry, Objective):
        return entry
    pair = entry if isinstance(entry, (tuple, list)) else (entry, {})
    known = len(pair) == 2 and callable(pair[0]) and isinstance(pair[1], Mapping)
    if not known or not all(callable(m) or hasattr(m, "compute") for m in pair[1].values()):
        raise ValueError(f"task {name!r} is {entry!r}; allowed: a loss, or (loss, {{name: metric}})")
    return Objective(pair[0], dict(pair[1]))


def checked_loss(name: str, loss: Loss) -> Loss:
    """A task's loss that raises a ValueError where it does not give a tensor of one number."""

    def checked(output: Tensor, batch: Any) -> Tensor:
        value: Any = loss(output, batch)
        if not isinstance(value, Tensor) or value.numel() != 1:
            kind = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"the loss of task {name!r} gives {kind}; a tensor of one number is needed")
        return value

    return checked


def moved(batch: Any, device: torch.device | str) -> Any:
    """A batch with all its tensors on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {k: moved(v, device) for k, v in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(moved(v, device) for v in batch) if type(batch) in (tuple, list) else batch
    return batch


def endless(loader: Iterable[Any], epoch: int = 0) -> Iterator[Any]:
    """A loader's batches again and again; a sampler that has ``set_epoch`` is told the epoch.

    Args:
        loader: Any loader.
        epoch: The first epoch.

    Raises:
        ValueError: If the loader gives no batch.
    """
    while True:
        sampler: Any = getattr(loader, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise ValueError("the loader gives no batches" + (" a second time" if epoch else ""))
        epoch += 1


@torch.no_grad()
def evaluate(
    network: nn.Module,
    batches: Iterable[Any],
    objectives: Mapping[str, Objective],
    inputs: Inputs | None = None,
) -> dict[str, float]:
    """Losses and metrics over batches, in eval mode; each module's own mode comes back.

    Args:
        network: Forward gives ``{task: Tensor}``; tasks that it does not put out are left out.
        batches: On any device.
        objectives: Task to objective.
        inputs: How to get the network's input from a batch.

    Returns:
        ``"<task>/<metric>"`` and ``"<task>/loss"`` to values.

    Raises:
        ValueError: If there are no batches.
    """
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    modes = [(m, m.training) for m in network.modules()]
    network.eval()
    total: dict[str, float] = {}
    seen = 0
    for metric in (m for o in objectives.values() for m in o.metrics.values()):
        getattr(metric, "reset", lambda: None)()
    try:
        for raw in batches:
            batch = moved(raw, device)
            outputs = forward(network, batch, inputs)
            shown = {t: o for t, o in objectives.items() if t in outputs}
            size = len(next(iter(outputs.values())))
            for task, objective in shown.items():
                for key, value in _values(task, objective, outputs[task], batch).items():
                    total[key] = total.get(key, 0.0) + value * size
            seen += size
    finally:
        for module, training in modes:
            module.training = training
    if not seen:
        raise ValueError("no batches to evaluate on")
    found = {key: value / seen for key, value in total.items()}
    for task, objective in objectives.items():
        if f"{task}/{LOSS}" in found:
            states = {k: m for k, m in objective.metrics.items() if hasattr(m, "compute")}
            found |= {f"{task}/{k}": float(m.compute()) for k, m in states.items()}
    return found


def _values(task: str, objective: Objective, output: Tensor, batch: Any) -> dict[str, float]:
    """A batch's loss and plain metrics; metrics with state are updated."""
    found = {f"{task}/{LOSS}": float(objective.loss(output, batch))}
    for name, metric in objective.metrics.items():
        if not hasattr(metric, "compute"):
            value: Any = metric(output, batch)  # type: ignore[operator]
            try:
                found[f"{task}/{name}"] = float(value)
            except (TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"metric {name!r} of task {task!r} gives no number: {error}") from error
            continue
        target = batch[task]
        if objective.dense and output.shape[-2:] != target.shape[-2:]:
            output = nn.functional.interpolate(output, target.shape[-2:], mode="bilinear", align_corners=False)
        metric.update(output.float(), target)  # type: ignore[union-attr]
    return found
