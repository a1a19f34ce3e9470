"""Compact: from a model and a mask to a smaller module with the same outputs for the tasks that are kept.

First the modules that the kept tasks do not need go, then the units that the mask has cut whole (:mod:`cut.removal`),
then further channels that it has made dead (:mod:`cut.channels`). Each step is checked on the outputs: what would
change them stays in.

An unstructured mask leaves few channels dead, so it hardly shrinks a dense module; its zeros pay off in a
sparse file (:mod:`cut.checkpoint`). A structured mask leaves whole channels dead, and they all go.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cut.channels import remove_dead_channels, same_outputs, shared_parameters, trial_inputs
from cut.decomposition import Inputs, check_tasks, forward, network_input, no_trace
from cut.masks import apply_mask
from cut.removal import remove_cut_units
from cut.stub import Structure, Stub, TaskSubset, structure_of, tensors_in


def compact(
    model: nn.Module,
    tasks: Sequence[str],
    mask: Mapping[str, Tensor] | None,
    batch: Any,
    *,
    inputs: Inputs | None = None,
) -> nn.Module:
    """A smaller copy of the model that gives the masked model's outputs for the kept tasks.

    Args:
        model: Any module whose forward returns ``{task: Tensor}``; it is left as it is.
        tasks: The tasks to keep.
        mask: Parameter name to bool, True = kept; None cuts no weights.
        batch: A real batch, or just the network's input; removals are checked on it.
        inputs: How to get the network's input from the batch, see :func:`cut.decomposition.network_input`.

    Returns:
        A module in eval mode. Its parameters have the model's names unless it had to be wrapped in
        :class:`TaskSubset`.

    Raises:
        ValueError: If a task is unknown, named twice or none is named, the mask does not fit the model, or
            the model does not return a dict of tensors.
    """
    example = _example(batch, inputs)
    smaller = keep_tasks(model, tasks, example, mask=mask)
    return remove_dead_channels(remove_cut_units(smaller, example), example)


def keep_tasks(
    model: nn.Module,
    tasks: Sequence[str],
    batch: Any,
    *,
    mask: Mapping[str, Tensor] | None = None,
    inputs: Inputs | None = None,
) -> nn.Module:
    """A copy of the model without the modules that only dropped tasks need; all other weights are unchanged.

    Tried are the largest modules that no kept output's gradient reaches; one goes only if the kept outputs
    are equal without it on the batch and on random input. So a frozen or detached branch that they need
    stays, and so does a dropped head that feeds a kept one. An entry of a ``ModuleDict`` is deleted if the
    network then still runs; anything else becomes a :class:`cut.stub.Stub`, and the output dict is filtered.

    Args:
        model: Any module whose forward returns ``{task: Tensor}``.
        tasks: The tasks to keep.
        batch: A real batch, or just the network's input.
        mask: Parameter name to bool, True = kept; the cut weights are set to zero first.
        inputs: How to get the network's input from the batch.

    Returns:
        A module in eval mode.

    Raises:
        ValueError: As for :func:`compact`.
    """
    example = _example(batch, inputs)
    model = _masked(model, mask)
    with torch.no_grad():
        known = forward(model, example, _itself)
    tasks = check_tasks(tasks, known)
    check = _KeptOutputs(model, tasks, example)
    structures = _structures(model, example)
    used = _used_parameters(model, tasks, example)
    for name in list(_unused(model, model, "", used, shared_parameters(model))):
        if name in dict(model.named_modules()):  # not inside a module that has gone
            _try_remove(model, name, structures.get(name), check)
    with torch.no_grad():
        left = forward(model, example, _itself)
    if set(left) == set(tasks):
        return model
    return TaskSubset(model.module if isinstance(model, TaskSubset) else model, tasks).eval()


def _itself(batch: Any) -> Any:
    """The network's input of a batch that is the network's input."""
    return batch


def _example(batch: Any, inputs: Inputs | None) -> Tensor:
    """The network's input, detached."""
    if inputs is None and isinstance(batch, Tensor):
        return batch.detach()
    return (inputs or network_input)(batch).detach()


def _masked(model: nn.Module, mask: Mapping[str, Tensor] | None) -> nn.Module:
    """A copy in eval mode, without gradients, with the mask multiplied in."""
    model = copy.deepcopy(model).eval()
    model.zero_grad(set_to_none=True)
    apply_mask(model, mask or {})
    with torch.no_grad():
        for p in model.parameters():
            p.masked_fill_(p == 0, 0.0)  # no negative zeros
    return model


# ----------------------------------------------------------------------------------- dropping what is unused


class _KeptOutputs:
    """Whether the kept outputs are still what they were, on the batch and on random input of two sizes."""

    def __init__(self, model: nn.Module, tasks: Sequence[str], example: Tensor) -> None:
        self.inputs, self.expected = [], []
        for x in trial_inputs(example):
            try:
                with torch.no_grad():
                    outputs = forward(model, x, _itself)
            except Exception:
                if x is example:
                    raise
                continue  # a network of fixed input size
            self.inputs.append(x)
            self.expected.append({t: outputs[t].clone() for t in tasks})

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> bool:
        try:
            return all(
                same_outputs(forward(model, x, _itself), expected, 1e-6)
                for x, expected in zip(self.inputs, self.expected, strict=True)
            )
        except Exception:  # whatever a network raises that misses a part
            return False


def _used_parameters(model: nn.Module, tasks: Sequence[str], example: Tensor) -> set[int]:
    """The ids of the parameters that the gradient of a kept output reaches."""
    with no_trace(model):
        parameters = [p for p in model.parameters() if p.requires_grad]
        outputs = forward(model, example[:2], _itself)
        kept = [outputs[t].sum() for t in tasks if outputs[t].requires_grad]
        grads = torch.autograd.grad(kept, parameters, allow_unused=True) if kept else [None] * len(parameters)
    return {id(p) for p, g in zip(parameters, grads, strict=True) if g is not None}


def _unused(root: nn.Module, module: nn.Module, prefix: str, used: set[int], tied: set[int]) -> Iterator[str]:
    """Names of candidates, a module before its children; parameters tied to outside do not hold it."""
    own = {id(p) for p in module.parameters()}
    if prefix and own and (own & used <= tied and own & used <= _held_outside(root, module)):
        yield prefix
    for name, child in module.named_children():
        yield from _unused(root, child, f"{prefix}.{name}" if prefix else name, used, tied)


def _held_outside(root: nn.Module, module: nn.Module) -> set[int]:
    """The ids of parameters that modules other than ``module`` and its children hold."""
    inside = {id(m) for m in module.modules()}
    return {id(p) for m in root.modules() if id(m) not in inside for p in m._parameters.values() if p is not None}


def _try_remove(root: nn.Module, name: str, structure: Structure, check: Callable[[nn.Module], bool]) -> bool:
    """Delete a module or put a stub in its place, wherever it is registered; undo it if outputs change."""
    target = root.get_submodule(name)
    places = [(m, key) for m in root.modules() for key, child in m._modules.items() if child is target]
    before = [dict(m._modules) for m, _ in places]

    def restore() -> None:
        for (parent, _), modules in zip(places, before, strict=True):
            parent._modules.clear()
            parent._modules.update(modules)

    if all(isinstance(parent, nn.ModuleDict) for parent, _ in places):
        for parent, key in places:
            del parent._modules[key]
        if check(root):
            return True
        restore()
    for parent, key in places:
        parent._modules[key] = Stub(structure)
    if check(root):
        return True
    restore()
    return False


def _structures(model: nn.Module, example: Tensor) -> dict[str, Structure]:
    """What each module returned at its first call."""
    found: dict[str, Structure] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            first = next(tensors_in([args, kwargs]), None)
            found.setdefault(name, structure_of(output, None if first is None else first.shape))

        return hook

    handles = [m.register_forward_hook(watch(n), with_kwargs=True) for n, m in model.named_modules() if n]
    with torch.no_grad():
        model(example)
    for handle in handles:
        handle.remove()
    return found
