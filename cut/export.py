"""Export: ONNX with named outputs, metadata and a parity check per task. Needs the extra ``export``."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cut.tasks import Task

METADATA_KEY = "cut"
OPSET = 18


@dataclass(frozen=True)
class Exported:
    """A written file: its path, size in bytes and ONNX opset."""

    path: Path
    bytes: int
    opset: int


class _Ordered(nn.Module):
    """The outputs as a tuple in a fixed order, as ONNX wants them."""

    def __init__(self, network: nn.Module, tasks: Sequence[str]) -> None:
        super().__init__()
        self.network, self.tasks = network, list(tasks)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        outputs = self.network(image)
        return tuple(outputs[t] for t in self.tasks)


def metadata(tasks: Sequence[Task], mean: Sequence[float], std: Sequence[float], size: Sequence[int]) -> dict[str, Any]:
    """What someone needs to use the file: input size and normalisation; kind, classes and unit of every task."""
    return {
        "input": {"height": int(size[0]), "width": int(size[1]), "mean": [*map(float, mean)], "std": [*map(float, std)]},
        "tasks": {
            t.name: {"kind": t.kind, "channels": t.channels, "classes": list(t.classes), "unit": t.unit} for t in tasks
        },
    }


@contextlib.contextmanager
def _quiet() -> Any:
    """No chatter from the exporter on the terminal."""
    names = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")
    levels = {n: logging.getLogger(n).level for n in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _needed() -> Any:
    try:
        import onnx
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"ONNX export needs the extra 'export' (pip install 'cut[export]'): {error}") from error
    return onnx


def export_onnx(
    network: nn.Module, path: str | Path, image: Tensor, *, tasks: Sequence[str], meta: Mapping[str, Any] | None = None
) -> Exported:
    """Write a network as one ONNX file: input ``image`` [N, 3, H, W] with free N, one output named after each task.

    Args:
        network: Forward gives ``{task: Tensor}``.
        path: Where to.
        image: An input of the size that the file is for; its batch size does not matter.
        tasks: The outputs, in this order.
        meta: JSON-able facts, stored under the metadata key ``cut``; see :func:`metadata`.

    Raises:
        ValueError: If the extra is missing, or the network has no such output.
        OSError: If the file cannot be written; nothing is left then.
    """
    onnx = _needed()
    path = Path(path)
    was_training = network.training
    network.eval()
    with torch.no_grad():
        missing = sorted(set(tasks) - set(network(image)))
    if missing:
        raise ValueError(f"the network has no output {missing[0]!r}")
    example = image if len(image) > 1 else torch.cat([image, image])  # a batch of one would be baked in
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            _Ordered(network, tasks),
            (example,),
            input_names=["image"],
            output_names=list(tasks),
            dynamic_shapes={"image": {0: torch.export.Dim("batch", min=1, max=4096)}},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    network.train(was_training)
    assert program is not None
    model = program.model_proto
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {METADATA_KEY: json.dumps(dict(meta or {}))})
    model.producer_name = "cut"
    for node in model.graph.node:  # the exporter's notes on where a node came from, paths of this machine among them
        del node.metadata_props[:]
        node.doc_string = ""
    for value in [*model.graph.value_info, *model.graph.input, *model.graph.output]:
        del value.metadata_props[:]
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    try:
        temporary.write_bytes(model.SerializeToString())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return Exported(path, path.stat().st_size, OPSET)


def session(path: str | Path, threads: int = 1) -> Any:
    """An ONNX Runtime session on the CPU.

    Raises:
        ValueError: If the extra is missing, or the file is no readable model.
    """
    _needed()
    import onnxruntime as ort

    if not Path(path).is_file():
        raise ValueError(f"no model file {str(path)!r}")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime has many kinds of errors of its own
        raise ValueError(f"{path} is not a readable ONNX model: {str(error).splitlines()[0]}") from error


def read_metadata(opened: Any) -> dict[str, Any]:
    """The facts that :func:`export_onnx` stored.

    Raises:
        ValueError: If the file was not written by this project.
    """
    found = opened.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    try:
        meta = json.loads(found or "")
        meta["input"]["height"], meta["tasks"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"the ONNX file has no {METADATA_KEY!r} metadata: it was not exported by cut") from error
    return meta


def parity(path: str | Path, network: nn.Module, batches: Iterable[Tensor]) -> dict[str, float]:
    """The largest absolute difference of each output between ONNX Runtime and PyTorch, over the given inputs."""
    opened = session(path)
    names = [o.name for o in opened.get_outputs()]
    worst = dict.fromkeys(names, 0.0)
    network.eval()
    for image in batches:
        with torch.no_grad():
            expected = network(image)
        for name, found in zip(names, opened.run(names, {"image": image.cpu().numpy()}), strict=True):
            worst[name] = max(worst[name], float((expected[name].cpu() - torch.from_numpy(found)).abs().max()))
    return worst


def check_parity(
    path: str | Path, network: nn.Module, batches: Iterable[Tensor], tolerance: float = 1e-3
) -> dict[str, float]:
    """:func:`parity`, refused where a task differs by more than the tolerance.

    Raises:
        ValueError: Naming the task and its difference.
    """
    worst = parity(path, network, batches)
    for task, difference in worst.items():
        if not difference <= tolerance:
            raise ValueError(f"{path}: output {task!r} differs from PyTorch by {difference:.2e}, more than {tolerance:.0e}")
    return worst
