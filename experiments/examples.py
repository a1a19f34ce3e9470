"""Examples: test pictures with the labels and the predictions of some models, drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cut import drawing
from cut.data.base import MultiTaskData
from cut.data.batch import picture
from cut.tasks import Task

UNKNOWN = 255  # a label that is not known, see cut.data.batch


def spread(length: int, count: int) -> list[int]:
    """At most ``count`` places spread evenly over a set, the first and the last among them.

    Example:
        >>> spread(100, 3), spread(2, 6)
        ([0, 50, 99], [0, 1])
    """
    return sorted({int(i) for i in np.linspace(0, length - 1, count).round()})


def shown(task: Task, values: np.ndarray, far: float) -> np.ndarray | str:
    """One task's label or output for one picture: a picture, or a class's name where it has one per picture."""
    if task.dense:
        return drawing.output(task.kind, values, near=0.5, far=far)
    best = int(values.argmax()) if values.ndim else int(values)
    if not values.ndim and best == UNKNOWN:
        return "unknown"
    return task.classes[best] if best < len(task.classes) else str(best)


def examples(
    data: MultiTaskData, models: Mapping[str, torch.nn.Module], tasks: Sequence[str], count: int
) -> list[dict[str, Any]]:
    """Some test pictures, spread over the set, each as the label has it and as every model sees it.

    Args:
        data: Where pictures come from.
        models: Name to a model on the CPU, in eval mode; each puts out the tasks.
        tasks: Which tasks are shown.
        count: How many pictures.

    Returns:
        For each picture ``id``, ``picture`` (uint8 [H, W, 3]) and ``tasks``: task to ``label`` and each model's name,
        to a uint8 picture or, for a task with one label a picture, a class's name.
    """
    data.setup("test")
    test, kinds = data.splits["test"], {t.name: t for t in data.tasks}
    found = []
    for index in spread(len(test), count):  # type: ignore[arg-type]
        item: Mapping[str, Tensor] = test[0, index]
        values = {t: {"label": item[t].numpy()} for t in tasks}
        with torch.no_grad():
            for name, model in models.items():
                outputs = model(item["image"][None])
                for task in tasks:
                    values[task][name] = outputs[task][0].float().numpy()
        far = float(item["depth"].max()) if "depth" in item else 6.0
        drawn = {t: {who: shown(kinds[t], a, far) for who, a in panels.items()} for t, panels in values.items()}
        found.append({"id": str(index), "picture": picture(item["image"], data.mean, data.std), "tasks": drawn})
    return found
