"""Evaluation: how well a shipped file does every task, in the runtime that runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from cut.data.base import MultiTaskData
from cut.objectives import Objective
from cut.objectives import evaluate as evaluate_network
from cut.runtime import Opened, open_file
from cut.tasks import Task

Builder = Callable[[], nn.Module]


def evaluate(
    opened: Opened, batches: Iterable[Mapping[str, Tensor]], tasks: Sequence[Task], family: str = "corrected"
) -> dict[str, float]:
    """Metrics of an opened model over batches, the same numbers as :meth:`cut.model.MultiTaskModel.evaluate` gives.

    Args:
        opened: See :func:`cut.runtime.open_file`.
        batches: ``{"image": [B, 3, H, W], task: label, ...}``.
        tasks: What to judge; dense outputs are resized bilinearly to the label.
        family: ``"corrected"`` or ``"legacy"``.

    Returns:
        ``"<task>/<metric>"`` to value.

    Raises:
        ValueError: If there are no tasks or batches, or the model has no such output or a batch no such label.
    """
    metrics = {t.name: t.metrics(family) for t in tasks}
    if not metrics:
        raise ValueError("no tasks to evaluate; give at least one")
    seen = 0
    for batch in batches:
        outputs = opened.run(batch["image"].float().numpy())
        for task in tasks:
            _update(metrics[task.name], task, outputs, batch)
        seen += len(batch["image"])
    if not seen:
        raise ValueError("no pictures to evaluate on; give at least one batch")
    return {f"{t}/{k}": float(v) for t, collection in metrics.items() for k, v in collection.compute().items()}


def _update(metrics: object, task: Task, outputs: Mapping[str, object], batch: Mapping[str, Tensor]) -> None:
    for where, what in ((outputs, "output"), (batch, "label")):
        if task.name not in where:
            raise ValueError(f"no {what} {task.name!r}; there are {sorted(where)}")
    output, target = torch.as_tensor(outputs[task.name]), batch[task.name]
    if task.dense and output.shape[-2:] != target.shape[-2:]:
        output = F.interpolate(output, target.shape[-2:], mode="bilinear", align_corners=False)
    metrics.update(output.float(), target)  # type: ignore[attr-defined]


def evaluate_file(
    path: str | Path,
    data: MultiTaskData,
    *,
    tasks: Sequence[str] | None = None,
    family: str = "corrected",
    split: str = "test",
    threads: int = 1,
    builder: Builder | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Metrics of an ONNX file, ExecuTorch program or compact model's folder over a split of a data set.

    Args:
        path: What :func:`cut.runtime.open_file` opens.
        data: The data set.
        tasks: Names of the data set's tasks to judge; None = those that the file says it has, else all.
        family: ``"corrected"`` or ``"legacy"``.
        split: ``"test"`` or ``"val"``.
        threads: Of the runtime.
        builder: The dense network of a folder with a foreign model, see :func:`cut.checkpoint.load`.
        progress: Show a bar on stderr.

    Returns:
        ``"<task>/<metric>"`` to value.

    Raises:
        ValueError: For an unknown task or split, or a file that cannot be read.
    """
    if split not in ("test", "val"):
        raise ValueError(f"split {split!r}; allowed: 'test', 'val'")
    known = {t.name: t for t in data.tasks}
    opened = open_file(path, threads, builder)
    names = list(tasks) if tasks is not None else [t for t in known if t in opened.meta.get("tasks", known)]
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"unknown task {unknown[0]!r}; the data set has {sorted(known)}")
    data.setup("test" if split == "test" else "fit")
    loader = data.test_dataloader() if split == "test" else data.val_dataloader()
    return evaluate(opened, _tracked(loader, path, progress), [known[n] for n in names], family)


def judge_file(
    path: str | Path,
    batches: Iterable[Any],
    objectives: Mapping[str, Objective],
    *,
    threads: int = 1,
    builder: Builder | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Losses and metrics of a file over batches of one's own: the numbers of :func:`cut.objectives.evaluate`.

    Args:
        path: What :func:`cut.runtime.open_file` opens.
        batches: Of one's own test loader.
        objectives: Task to loss and metrics, which get the file's outputs; other tasks are left out.
        threads: Of the runtime.
        builder: The dense network of a folder with a foreign model, see :func:`cut.checkpoint.load`.
        progress: Show a bar on stderr.

    Returns:
        ``"<task>/<metric>"`` and ``"<task>/loss"`` to values.

    Raises:
        ValueError: If there are no batches, or the file cannot be read or puts out none of the tasks.
    """
    network = _Shipped(open_file(path, threads, builder))
    found = evaluate_network(network, _tracked(batches, path, progress), objectives)
    if not found:
        raise ValueError(f"{path} puts out none of the tasks {sorted(objectives)}")
    return found


class _Shipped(nn.Module):
    """A file with the face of a network."""

    def __init__(self, opened: Opened) -> None:
        super().__init__()
        self.opened = opened

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """The file's outputs, as tensors."""
        return {t: torch.as_tensor(v) for t, v in self.opened.run(image.float().cpu().numpy()).items()}


def _tracked(batches: Iterable[Any], path: str | Path, progress: bool) -> Iterable[Any]:
    """The batches with a bar on stderr: stdout is the caller's, who may print JSON."""
    console = Console(stderr=True)
    return track(batches, f"judging {Path(path).name}", console=console, transient=True, disable=not progress)
