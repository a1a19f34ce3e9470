"""Evaluation: how well a shipped file does every task, in the runtime that runs it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

from cut.data.base import MultiTaskData
from cut.runtime import Opened, open_file
from cut.tasks import Task


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
) -> dict[str, float]:
    """Metrics of an ONNX file, ExecuTorch program or compact model's folder over a split of a data set.

    Args:
        path: What :func:`cut.runtime.open_file` opens.
        data: The data set.
        tasks: Names of the data set's tasks to judge; None = those that the file says it has, else all.
        family: ``"corrected"`` or ``"legacy"``.
        split: ``"test"`` or ``"val"``.
        threads: Of the runtime.

    Returns:
        ``"<task>/<metric>"`` to value.

    Raises:
        ValueError: For an unknown task or split, or a file that cannot be read.
    """
    if split not in ("test", "val"):
        raise ValueError(f"split {split!r}; allowed: 'test', 'val'")
    known = {t.name: t for t in data.tasks}
    opened = open_file(path, threads)
    names = list(tasks) if tasks is not None else [t for t in known if t in opened.meta.get("tasks", known)]
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"unknown task {unknown[0]!r}; the data set has {sorted(known)}")
    data.setup("test" if split == "test" else "fit")
    loader = data.test_dataloader() if split == "test" else data.val_dataloader()
    batches = track(loader, f"judging {Path(path).name}", transient=True)
    return evaluate(opened, batches, [known[n] for n in names], family)
