"""Export: ONNX with named outputs, metadata and a parity check per task. Needs the extra ``export``."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cut.conversion import Exported, Ordered, check_outputs, evaluating, needed, quiet
from cut.files import write_atomically
from cut.runtime import METADATA_KEY, onnx_session, open_file

if TYPE_CHECKING:  # metrics take seconds to import, and a device that only predicts needs none
    from cut.tasks import Task

OPSET = 18
INPUT = "image"  # as the argument of what is traced
session = onnx_session
_LARGEST = 2**31 - 1  # bytes in one protocol buffer


def metadata(tasks: Sequence[Task], mean: Sequence[float], std: Sequence[float], size: Sequence[int]) -> dict[str, Any]:
    """What someone needs to use the file: input size and normalisation; kind, classes, unit of every task.

    Args:
        tasks: The outputs.
        mean: Of the three channels, in [0, 1], subtracted from the picture.
        std: What it is then divided by.
        size: Height and width of the input in pixels.
    """
    height, width = (int(s) for s in size)
    facts = ("kind", "channels", "unit")
    return {
        "input": {"height": height, "width": width, "mean": [*map(float, mean)], "std": [*map(float, std)]},
        "tasks": {t.name: {k: getattr(t, k) for k in facts} | {"classes": list(t.classes)} for t in tasks},
    }


def export_onnx(
    network: nn.Module,
    path: str | Path,
    image: Tensor,
    *,
    tasks: Sequence[str],
    meta: Mapping[str, Any] | None = None,
) -> Exported:
    """Write a network as one ONNX file: input ``image`` [N, 3, H, W] with free N, an output for each task.

    Args:
        network: Forward gives ``{task: Tensor}``; its modules' modes are as before afterwards.
        path: Where to.
        image: An input of the size that the file is for; its batch size does not matter.
        tasks: The outputs, in this order and by these names.
        meta: JSON-able facts, stored under the metadata key ``cut``; see :func:`metadata`.

    Raises:
        ValueError: If the extra is missing, no task is given or one that is called as the input is, the network has no
            such output, or it is larger than the 2 GB that one ONNX file can hold.
        OSError: If the file cannot be written; nothing is left then.
    """
    needed("export", "onnx", "onnxscript", "onnxruntime")  # all, before the work starts
    facts = json.dumps(dict(meta or {}), allow_nan=False)
    if INPUT in tasks:
        raise ValueError(f"a task is called {INPUT!r}, as the file's input is; allowed: any other name")
    with evaluating(network):
        check_outputs(network, image, tasks)
        model = _converted(network, image, tasks)
    return write_onnx(model, path, facts)


def _converted(network: nn.Module, image: Tensor, tasks: Sequence[str]) -> Any:
    """The network as an ONNX protocol buffer, weights inside."""
    example = image if len(image) > 1 else torch.cat([image, image])  # a batch of one would be baked in
    with quiet():
        program = torch.onnx.export(
            Ordered(network, tasks),
            (example,),
            input_names=[INPUT],
            output_names=list(tasks),
            dynamic_shapes={INPUT: {0: torch.export.Dim("batch", min=1, max=4096)}},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    return program.model_proto


def write_onnx(model: Any, path: str | Path, facts: str) -> Exported:
    """Check a model and write it with its facts, and without what names this machine.

    Args:
        model: An ONNX protocol buffer, changed in place.
        path: Where to.
        facts: JSON, stored under the metadata key ``cut``.

    Raises:
        ValueError: If it is larger than one file can hold.
        OSError: If it cannot be written; nothing is left then.
    """
    (onnx,) = needed("export", "onnx")
    _clean(model)
    onnx.helper.set_model_props(model, {METADATA_KEY: facts})
    onnx.checker.check_model(model)
    if model.ByteSize() >= _LARGEST:
        raise ValueError(f"the model takes {model.ByteSize()} bytes; one ONNX file holds at most {_LARGEST}")
    write_atomically(Path(path), model.SerializeToString())
    return Exported(Path(path), Path(path).stat().st_size, OPSET)


def _clean(model: Any) -> None:
    """Leave out the exporter's notes on where each node came from: they name files of this machine."""
    model.producer_name = "cut"
    del model.metadata_props[:]
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in [*model.graph.value_info, *model.graph.input, *model.graph.output]:
        del value.metadata_props[:]


def read_metadata(opened: Any) -> dict[str, Any]:
    """The facts that :func:`export_onnx` stored.

    Raises:
        ValueError: If the file was not written by this project, or without ``meta``.
    """
    found = opened.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    try:
        meta = json.loads(found or "")
        meta["input"]["height"], meta["tasks"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        message = (
            f"the ONNX file has no {METADATA_KEY!r} metadata, which say what input and tasks it has: "
            "`cut export` writes them, cut.export.export_onnx does if it is given `meta`"
        )
        raise ValueError(message) from error
    return meta


def parity(path: str | Path, network: nn.Module, batches: Iterable[Tensor]) -> dict[str, float]:
    """The largest absolute difference of each output between a file, in its runtime, and PyTorch over given inputs.

    A value that is not finite makes the difference infinite.

    Args:
        path: Any file that :func:`cut.runtime.open_file` opens.
        network: What the file was made from.
        batches: Inputs [N, 3, H, W].

    Raises:
        ValueError: If the file is not readable or there are no inputs.
    """
    return {name: difference for name, (difference, _) in _compared(path, network, batches).items()}


def _compared(path: str | Path, network: nn.Module, batches: Iterable[Tensor]) -> dict[str, tuple[float, float]]:
    """The largest difference of each output, and PyTorch's largest value of it."""
    opened = open_file(path, torch.get_num_threads())
    worst: dict[str, tuple[float, float]] = {}
    with evaluating(network):
        for image in batches:
            expected = network(image)
            for name, found in opened.run(image.cpu().numpy()).items():
                own = expected[name].cpu()
                difference = float((own - torch.from_numpy(found)).abs().max())
                # max() would drop a NaN, and with it the worst fault there is.
                difference = difference if math.isfinite(difference) else math.inf
                before = worst.get(name, (0.0, 0.0))
                worst[name] = max(before[0], difference), max(before[1], float(own.abs().max()))
    if not worst:
        raise ValueError(f"no inputs to compare {path} on; give at least one batch")
    return worst


def check_parity(
    path: str | Path, network: nn.Module, batches: Iterable[Tensor], tolerance: float = 1e-3
) -> dict[str, float]:
    """:func:`parity`, refused where a task differs by more than the tolerance.

    Args:
        path: As of :func:`parity`.
        network: Likewise.
        batches: Likewise.
        tolerance: Of an output whose values are up to 1; where they are larger, in proportion to the largest.

    Raises:
        ValueError: Naming the task and its difference.
    """
    worst = _compared(path, network, batches)
    for task, (difference, largest) in worst.items():
        allowed = tolerance * max(1.0, largest)
        if difference > allowed or difference == math.inf:
            message = f"output {task!r} differs from PyTorch by {difference:.2e}, more than {allowed:.0e}"
            raise ValueError(f"{path}: {message}")
    return {task: difference for task, (difference, _) in worst.items()}
