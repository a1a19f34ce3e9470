"""Facts: what a model's file says of its input and tasks, for a model that no data set of ours describes.

The form is that of :func:`cut.export.metadata`. What nobody states is seen by one forward pass: the size of the example
input, and of each output its channels and a kind by its shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

# Kind of task to the dimensions that its output may have, batch included, and its channels; empty, None = any.
KINDS: dict[str, tuple[tuple[int, ...], int | None]] = {
    "segmentation": ((4,), None),
    "normals": ((4,), 3),
    "depth": ((4,), 1),
    "map": ((4,), 1),
    "classification": ((2,), None),
    "numbers": ((), None),
}
_INPUT, _TASK = ("height", "width", "mean", "std"), ("kind", "channels", "unit", "classes")


def kind_of(output: Tensor) -> str:
    """What an output most likely is, by its shape alone.

    Depth and normals cannot be told from other maps and classes; who has them says so.

    Example:
        >>> import torch
        >>> [kind_of(torch.zeros(s)) for s in ((2, 5, 8, 8), (2, 1, 8, 8), (2, 3), (2, 1))]
        ['segmentation', 'map', 'classification', 'numbers']
    """
    if output.ndim == 4:
        return "segmentation" if output.shape[1] > 1 else "map"
    return "classification" if output.ndim == 2 and output.shape[1] > 1 else "numbers"


def facts_of(
    example: Tensor,
    outputs: Mapping[str, Tensor],
    told: Any = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Facts on a model's input and tasks, as :func:`cut.export.metadata` has them.

    Args:
        example: An input [N, C, H, W]; of any other there are facts on the tasks only.
        outputs: What the model puts out for it.
        told: What is known better, in the same form and as much of it as one likes: ``{"input": {"mean": ..., "std":
            ...}, "tasks": {task: {"kind": ..., "classes": [...], "unit": ...}}}``; of other tasks it may speak too.
        mean: Of the channels, in [0, 1]; None = 0: pictures are given as they are.
        std: What a picture is then divided by; None = 1.

    Raises:
        ValueError: If what is told has another form, or does not fit the model.
    """
    _check(told, example, outputs)
    known: Mapping[str, Any] = told or {}
    found: dict[str, Any] = {"tasks": {}}
    if example.ndim == 4:
        channels, height, width = example.shape[1:]
        norm = {"mean": mean or [0] * channels, "std": std or [1] * channels, **known.get("input", {})}
        stated = {k: [*map(float, norm[k])] for k in ("mean", "std")}
        found = {"input": {"height": height, "width": width, **stated}, "tasks": {}}
    for task, output in outputs.items():
        seen = {"kind": kind_of(output), "unit": "", "classes": []} | dict(known.get("tasks", {}).get(task, {}))
        found["tasks"][task] = {**seen, "classes": list(seen["classes"]), "channels": _channels(output)}
    return found


def _channels(output: Tensor) -> int:
    return output.shape[1] if output.ndim > 1 else 1


def _check(told: Any, example: Tensor, outputs: Mapping[str, Tensor]) -> None:
    """Refuse facts of another form, or that do not fit the model."""
    _keys(told or {}, ("input", "tasks"), "facts")
    stated, tasks = (told or {}).get("input", {}), (told or {}).get("tasks", {})
    _keys(stated, _INPUT, "facts on the input")
    if not isinstance(tasks, Mapping):
        raise ValueError(f"facts on the tasks are {type(tasks).__name__}; allowed: a dict of task name to facts")
    if stated and example.ndim != 4:
        raise ValueError(f"facts on the input: the example input is {list(example.shape)}, no picture [N, C, H, W]")
    for key, size in zip(("height", "width"), example.shape[-2:], strict=False):
        if stated.get(key, size) != size:
            raise ValueError(f"facts on the input: {key} {stated[key]}; allowed: {size}, as the example input has")
    for key in ("mean", "std"):
        _check_channels(key, stated.get(key), example)
    for task, entry in tasks.items():
        _check_task(task, entry, outputs.get(task))


def _check_channels(key: str, values: Any, example: Tensor) -> None:
    """Refuse what is no number for each channel."""
    if values is None:
        return
    good = isinstance(values, (list, tuple)) and all(isinstance(v, (int, float)) for v in values)
    if not good or len(values) != example.shape[1] or (key == "std" and min(values) <= 0):
        above = " above 0" if key == "std" else ""
        raise ValueError(f"facts on the input: {key} {values!r}; allowed: {example.shape[1]} numbers{above}")


def _check_task(task: str, entry: Any, output: Tensor | None) -> None:
    """Refuse facts on a task that nothing can be done with."""
    what = f"facts on the task {task!r}"
    _keys(entry, _TASK, what)
    if (kind := entry.get("kind", "numbers")) not in KINDS:
        raise ValueError(f"{what}: kind {kind!r}; allowed: {', '.join(KINDS)}")
    if output is not None and not _fits(kind, output):
        allowed = ", ".join(k for k in KINDS if _fits(k, output))
        raise ValueError(f"{what}: kind {kind!r}; allowed for its output {list(output.shape)}: {allowed}")
    classes, unit = entry.get("classes", []), entry.get("unit", "")
    if not isinstance(classes, (list, tuple)) or not all(isinstance(c, str) for c in classes):
        raise ValueError(f"{what}: classes {classes!r}; allowed: a list of names")
    if not isinstance(unit, str):
        raise ValueError(f"{what}: unit {unit!r}; allowed: a text such as 'm'")


def _fits(kind: str, output: Tensor) -> bool:
    """Whether an output can be of a kind."""
    dimensions, channels = KINDS[kind]
    return output.ndim in (dimensions or [output.ndim]) and (channels is None or output.shape[1] == channels)


def _keys(entry: Any, allowed: Sequence[str], what: str) -> None:
    """Refuse what is no dict, or has other keys."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"{what} are {type(entry).__name__}; allowed: a dict with {', '.join(allowed)}")
    if odd := [k for k in entry if k not in allowed]:
        raise ValueError(f"{what} have {odd[0]!r}; allowed: {', '.join(allowed)}")
