"""Decomposition: which parameters does each task of a multi-task model use?

The answer comes from gradients, never from names: in eval mode, with every parameter requiring a gradient, a parameter
belongs to a task if the gradient of that task's loss reaches it (even a gradient of zero). So any topology works, with
any number of tasks of any name, and tied parameters are one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

Loss = Callable[[Tensor, Any], Tensor]
Inputs = Callable[[Any], Tensor]
Owners = dict[str, frozenset[str]]

_PRUNABLE = (nn.modules.conv._ConvNd, nn.Linear)


def network_input(batch: Any) -> Tensor:
    """What the network is called with: ``batch["image"]`` of a mapping, the first entry of a sequence.

    Raises:
        ValueError: If the batch is neither, or has no such entry.
    """
    if isinstance(batch, Mapping) and "image" in batch:
        return batch["image"]
    if isinstance(batch, Sequence) and len(batch) and isinstance(batch[0], Tensor):
        return batch[0]
    found = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
    raise ValueError(
        f"no network input in the batch: found {found}; expected a dict with 'image' or a tuple, or pass inputs="
    )


def check_tasks(tasks: Sequence[str], known: Collection[str]) -> list[str]:
    """The selected tasks as a list, after checking that they are some of the known ones, each once.

    Raises:
        ValueError: If the selection is empty, names an unknown task or names a task twice.

    Example:
        >>> check_tasks(("seg",), {"seg", "depth"})
        ['seg']
    """
    if isinstance(tasks, str) or not len(tasks):
        raise ValueError(f"no tasks selected: got {tasks!r}; choose some of {sorted(known)}")
    unknown = [t for t in tasks if t not in known]
    if unknown:
        raise ValueError(f"unknown task {unknown[0]!r}; the model's tasks are {sorted(known)}")
    twice = sorted({t for t in tasks if list(tasks).count(t) > 1})
    if twice:
        raise ValueError(f"task {twice[0]!r} is selected twice in {list(tasks)}")
    return list(tasks)


def forward(model: nn.Module, batch: Any, inputs: Inputs | None = None) -> dict[str, Tensor]:
    """The model's outputs for a batch, checked to be ``{task: Tensor}``.

    Raises:
        ValueError: If the model returns anything else.
    """
    outputs = model((inputs or network_input)(batch))
    if not isinstance(outputs, Mapping) or not all(isinstance(v, Tensor) for v in outputs.values()):
        kind = (
            {k: type(v).__name__ for k, v in outputs.items()}
            if isinstance(outputs, Mapping)
            else type(outputs).__name__
        )
        raise ValueError(f"the model's forward must return a dict of task name to Tensor; it returned {kind}")
    return dict(outputs)


def prunable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that can be cut, by name: those held by convolutions and linear layers only.

    A weight that is tied to something else (an embedding, a raw parameter) is left out; one tied between layers appears
    once, under its first name.
    """
    elsewhere = {
        id(p)
        for m in model.modules()
        for name, p in m.named_parameters(recurse=False)
        if not (isinstance(m, _PRUNABLE) and name == "weight")
    }
    cut_here = {id(m.weight) for m in model.modules() if isinstance(m, _PRUNABLE)} - elsewhere
    return {name: p for name, p in model.named_parameters() if id(p) in cut_here and p.is_floating_point()}


@contextmanager
def no_trace(model: nn.Module, mode: Literal["eval", "train"] = "eval") -> Iterator[None]:
    """Run the block with every parameter requiring a gradient and put everything back afterwards.

    Put back are ``requires_grad``, each module's own mode, all buffers and the random state; ``.grad`` is never
    touched, as long as the block uses :func:`torch.autograd.grad`.
    """
    if mode not in ("eval", "train"):
        raise ValueError(f"mode {mode!r}; allowed: 'eval', 'train'")
    parameters = list(model.parameters())
    needs_grad = [p.requires_grad for p in parameters]
    modes = [(m, m.training) for m in model.modules()]
    buffers = [(m, k, b, b.detach().clone()) for m in model.modules() for k, b in m._buffers.items() if b is not None]
    devices = sorted({p.device.index or 0 for p in parameters if p.is_cuda})
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        try:
            model.train(mode == "train")
            for p in parameters:
                if p.is_floating_point():
                    p.requires_grad_(True)
            yield
        finally:
            for p, needed in zip(parameters, needs_grad, strict=True):
                p.requires_grad_(needed)
            for m, training in modes:
                m.training = training
            with torch.no_grad():
                for m, key, buffer, before in buffers:
                    buffer.copy_(before)
                    m._buffers[key] = buffer


def task_loss(
    losses: Mapping[str, Loss], task: str, outputs: Mapping[str, Tensor], batch: Any, index: int = 0
) -> Tensor:
    """One task's scalar loss, checked.

    Raises:
        ValueError: If the model has no such output, there is no loss for it, or the loss is not one finite number.
    """
    if task not in losses:
        raise ValueError(f"no loss for task {task!r}; there are losses for {sorted(losses)}")
    if task not in outputs:
        raise ValueError(f"the model has no output {task!r}; its outputs are {sorted(outputs)}")
    loss = losses[task](outputs[task], batch)
    if loss.numel() != 1:
        raise ValueError(f"the loss of task {task!r} has shape {tuple(loss.shape)}; expected one number")
    if not torch.isfinite(loss).all():
        raise ValueError(
            f"the loss of task {task!r} is {float(loss.detach())} on batch {index}; scoring needs finite losses"
        )
    return loss.reshape(())


def owners(
    model: nn.Module,
    batch: Any,
    losses: Mapping[str, Loss],
    tasks: Sequence[str],
    inputs: Inputs | None = None,
) -> Owners:
    """The names of all parameters that each task uses, norms and biases included.

    Args:
        model: Any module whose forward returns ``{task: Tensor}``.
        batch: One batch; it decides nothing but the shapes.
        losses: Task name to a function of (output, batch).
        tasks: The tasks to decompose into.
        inputs: How to get the network's input from the batch; default :func:`network_input`.

    Returns:
        Task name to parameter names, as in ``model.named_parameters()`` (a tied parameter under its first name).
    """
    check_tasks(tasks, losses)
    named = {n: p for n, p in model.named_parameters() if p.is_floating_point()}
    used: Owners = {}
    with no_trace(model):
        outputs = forward(model, batch, inputs)
        for task in tasks:
            loss = task_loss(losses, task, outputs, batch)
            grads: Sequence[Tensor | None] = [None] * len(named)
            if loss.requires_grad:
                grads = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
            used[task] = frozenset(n for n, g in zip(named, grads, strict=True) if g is not None)
    return used


def kept_parameters(model: nn.Module, used: Owners, tasks: Sequence[str]) -> set[str]:
    """The names of the parameters that stay when only ``tasks`` are kept.

    Gone are those that some dropped task uses and no kept one does. What no task's gradient reaches stays: the
    outputs may need it all the same (a detached branch).
    """
    kept = set().union(*(used[t] for t in tasks))
    dropped = set().union(*(used[t] for t in used if t not in tasks)) - kept
    return {name for name, _ in model.named_parameters()} - dropped


def components(used: Owners, tasks: Sequence[str]) -> dict[str, str]:
    """Parameter name to the component it is counted in: a task's name if only that task uses it, else ``"backbone"``.

    ``used`` covers all tasks of the model, so that with a single kept task the shared part is still the backbone.

    Example:
        >>> components({"a": frozenset({"w", "x"}), "b": frozenset({"w"})}, ["a"])
        {'w': 'backbone', 'x': 'a'}
    """
    by_name: dict[str, list[str]] = {}
    for task, names in used.items():
        for name in sorted(names):
            by_name.setdefault(name, []).append(task)
    return {n: (ts[0] if len(ts) == 1 else "backbone") for n, ts in by_name.items() if set(ts) & set(tasks)}
