"""Conversion: what all exporters need: outputs in a fixed order, eval mode, silence, and their extra."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_CHATTY = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export", "executorch", "torchao", "torch.utils._pytree")


@dataclass(frozen=True)
class Exported:
    """A written file.

    Attributes:
        path: Where it is.
        bytes: Its size.
        opset: Of an ONNX file; None for other formats.
    """

    path: Path
    bytes: int
    opset: int | None = None


class Ordered(nn.Module):
    """The outputs of some tasks as a tuple in a fixed order: exporters take no dict.

    Args:
        network: Its forward gives ``{task: Tensor}``.
        tasks: Which outputs, in which order.
    """

    def __init__(self, network: nn.Module, tasks: Sequence[str]) -> None:
        super().__init__()
        self.network, self.tasks = network, list(tasks)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """The tasks' outputs for an input [N, 3, H, W]."""
        outputs = self.network(image)
        return tuple(outputs[t] for t in self.tasks)


def check_outputs(network: nn.Module, image: Tensor, tasks: Sequence[str]) -> None:
    """Run a network once and compare the tasks asked for with what it puts out.

    Raises:
        ValueError: If no task is asked for, or the network has no such output.
    """
    if not tasks:
        raise ValueError("no tasks to export; give at least one output of the network")
    found = network(image)
    missing = sorted(set(tasks) - set(found))
    if missing:
        raise ValueError(f"the network has no output {missing[0]!r}; its outputs are {sorted(found)}")


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; each module's own mode comes back, as a frozen norm may differ."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No chatter from an exporter on the terminal: neither logs, warnings nor prints."""
    levels = {n: logging.getLogger(n).level for n in ("", *_CHATTY)}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def needed(extra: str, *names: str) -> list[Any]:
    """Modules of an extra, all of which must be there.

    Raises:
        ValueError: Naming the extra and the module that is missing.
    """
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        message = f"this needs the extra {extra!r} (in the project's folder: pip install -e '.[{extra}]'): {error}"
        raise ValueError(message) from error
