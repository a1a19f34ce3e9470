"""Source: what a command works on: a folder with a model of ours, or a function that returns one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cut.decomposition import network_input, prunable
from cut.masks import silence
from cut.objectives import Objective
from cut.stub import TaskSubset
from cut.trace import trace

if TYPE_CHECKING:
    pass

CUT = "cut"  # in a model's metadata: how it was cut


@dataclass
class Data:
    """Labelled pictures, and what the tasks are trained on and judged by.

    Attributes:
        train: A loader to train on.
        test: A loader to judge on.
        objectives: Task to loss and metrics.
        score: Number to the list of so many scoring batches.
    """

    train: Iterable[Any]
    test: Iterable[Any]
    objectives: dict[str, Objective]
    score: Callable[[int], list[Any]]


@dataclass
class Source:
    """A model and what is known about it.

    Attributes:
        name: What the user called it.
        network: Forward gives ``{task: Tensor}``; in eval mode, on the CPU.
        tasks: The tasks that it puts out.
        example: A few inputs of it.
        meta: Facts on its input and tasks; empty if there are none.
        path: Where its files are, None for a model that a function made.
        data: Labelled pictures, None if there are none at hand.
        unlabelled: Number to the list of so many batches of inputs, for want of data.
    """

    name: str
    network: nn.Module
    tasks: list[str]
    example: Tensor
    meta: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None
    data: Data | None = None
    unlabelled: Callable[[int], list[Tensor]] | None = None

    def inputs(self, count: int) -> list[Tensor]:
        """So many batches of inputs, of training pictures where there are any."""
        if self.data is not None:
            return [network_input(batch) for batch in self.data.score(count)]
        return self.unlabelled(count) if self.unlabelled is not None else [self.example]

    @property
    def cut(self) -> bool:
        """Whether a mask was made for it: its zeros are to stay."""
        return CUT in self.meta

    def labelled(self) -> Data:
        """The data.

        Raises:
            ValueError: If there are none to train on or to judge on.
        """
        if self.data is None:
            raise ValueError(f"{self.name} comes without data; name a data set with --data")
        for what, loader in (("loader", self.data.train), ("test loader", self.data.test)):
            if _is_empty(loader):
                raise ValueError(f"{self.name}: the {what} gives no batches")
        return self.data


def _is_empty(loader: Iterable[Any]) -> bool:
    """Whether a loader gives no batches; without going through it where it tells its length."""
    try:
        return len(loader) == 0  # type: ignore[arg-type]
    except TypeError:
        return next(iter(loader), None) is None


def whole(source: Source) -> Any:
    """The network with all its tasks running, without a wrapper that leaves some out."""
    network = inner(source)
    if hasattr(network, "select") and hasattr(network, "heads"):
        network.select(list(network.heads))
    return network


def inner(source: Source) -> Any:
    """The network without a wrapper that leaves some of its tasks out."""
    return source.network.module if isinstance(source.network, TaskSubset) else source.network


def zeros_of(network: nn.Module) -> dict[str, Tensor]:
    """The mask that a network's zero weights make: of a pruned model, what is cut."""
    return {n: p.detach() != 0 for n, p in prunable(network).items()}


def held(source: Source) -> dict[str, Tensor]:
    """The mask that keeps a pruned model's zeros in training, those of dead channels' biases and norms included."""
    if not source.cut:
        return {}
    seen = trace(source.network, source.example[:2], lambda x: x)
    return silence(source.network, zeros_of(source.network), seen)


def few(batch: Any, count: int = 2) -> Any:
    """The first entries of a batch: enough to see what belongs to which task."""
    if isinstance(batch, Tensor):
        return batch[:count] if batch.dim() else batch
    if isinstance(batch, dict):
        return {k: few(v, count) for k, v in batch.items()}
    return type(batch)(few(v, count) for v in batch) if type(batch) in (tuple, list) else batch


def device_of(name: str) -> torch.device:
    """A device by name; ``auto`` is the accelerator if there is one, else the CPU.

    Raises:
        ValueError: If there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
