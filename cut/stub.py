"""Stubs: what stands in for the parts of a foreign network that were removed.

A network's own forward keeps calling all its parts, so a removed one is replaced by a module that returns
zeros of the same structure, and the output dict is filtered. Both are described by JSON-able data, so that a
compact network can be rebuilt from a file (:mod:`cut.checkpoint`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Structure = Any  # JSON: what a module returns, see structure_of


class Stub(nn.Module):
    """Stands in for a removed module of a foreign network: returns zeros of the same structure at no cost.

    Args:
        structure: What the removed module returned, see :func:`structure_of`; None if it was never called.
    """

    def __init__(self, structure: Structure) -> None:
        super().__init__()
        self.structure = structure

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros in the recorded structure; batch, picture size and device follow the first tensor given."""
        return _zeros(self.structure, next(tensors_in([args, kwargs]), None))


class TaskSubset(nn.Module):
    """A network whose output dict holds only some of its tasks.

    Args:
        module: The network.
        tasks: The tasks that stay, in this order.
    """

    def __init__(self, module: nn.Module, tasks: Sequence[str]) -> None:
        super().__init__()
        self.module = module
        self.tasks = tuple(tasks)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The network's outputs for the tasks that stay."""
        outputs = self.module(*args, **kwargs)
        return {task: outputs[task] for task in self.tasks}


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from tensors_in(entry)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def structure_of(output: Any, like: Sequence[int] | None) -> Structure:
    """What a module returned, without the numbers, as JSON-able data.

    Args:
        output: Tensors in nested tuples, lists and dicts.
        like: Shape of the module's input. A size of the batch or of the picture that equals the input's is
            noted as -1: it follows the input.

    Returns:
        None for what cannot be described (a stub then returns None in its place).

    Example:
        >>> structure_of((torch.zeros(2, 3), [torch.zeros(5)]), like=(2, 3))
        {'tuple': [{'tensor': [-1, 3], 'dtype': 'float32'}, {'list': [{'tensor': [5], 'dtype': 'float32'}]}]}
    """
    if isinstance(output, Tensor):
        same = [like is not None and i != 1 and i < len(like) and s == like[i] for i, s in enumerate(output.shape)]
        shape = [-1 if follows else size for follows, size in zip(same, output.shape, strict=True)]
        return {"tensor": shape, "dtype": str(output.dtype).removeprefix("torch.")}
    if isinstance(output, (list, tuple)):
        kind = "tuple" if isinstance(output, tuple) else "list"
        return {kind: [structure_of(entry, like) for entry in output]}
    if isinstance(output, dict) and all(isinstance(key, str) for key in output):
        return {"dict": {key: structure_of(entry, like) for key, entry in output.items()}}
    return None


def _zeros(structure: Structure, like: Tensor | None) -> Any:
    """Zeros in a recorded structure, as views of a single number."""
    if structure is None:
        return None
    if "tensor" in structure:
        given = like.shape if like is not None else ()
        shape = [(given[i] if i < len(given) else 1) if s == -1 else s for i, s in enumerate(structure["tensor"])]
        device = like.device if like is not None else None
        return torch.zeros((), dtype=getattr(torch, structure["dtype"]), device=device).expand(shape)
    if "dict" in structure:
        return {key: _zeros(entry, like) for key, entry in structure["dict"].items()}
    kind, entries = next(iter(structure.items()))
    values = [_zeros(entry, like) for entry in entries]
    return tuple(values) if kind == "tuple" else values
