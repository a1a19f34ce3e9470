"""Export: ONNX with named outputs, metadata and a parity check per task. Needs the extra ``export``."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cut.files import write_atomically

if TYPE_CHECKING:  # metrics take seconds to import, and a device that only predicts needs none
    from cut.tasks import Task

METADATA_KEY = "cut"
OPSET = 18
_LARGEST = 2**31 - 1  # bytes in one protocol buffer


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


@contextlib.contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
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
def _quiet() -> Iterator[None]:
    """No chatter from the exporter on the terminal."""
    names = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")
    levels = {n: logging.getLogger(n).level for n in names}
    for name in names:
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


def _needed(*names: str) -> Any:
    """The first of some modules of the extra, all of which must be there."""
    try:
        modules = [importlib.import_module(name) for name in names]
    except ImportError as error:
        message = f"ONNX needs the extra 'export' (pip install 'cut[export]'): {error}"
        raise ValueError(message) from error
    return modules[0]


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
        ValueError: If the extra is missing, no task is given, the network has no such output, or it is
            larger than the 2 GB that one ONNX file can hold.
        OSError: If the file cannot be written; nothing is left then.
    """
    onnx = _needed("onnx", "onnxscript", "onnxruntime")
    if not tasks:
        raise ValueError("no tasks to export; give at least one output of the network")
    facts = json.dumps(dict(meta or {}), allow_nan=False)
    with _evaluating(network):
        found = network(image)
        missing = sorted(set(tasks) - set(found))
        if missing:
            raise ValueError(f"the network has no output {missing[0]!r}; its outputs are {sorted(found)}")
        model = _converted(network, image, tasks)
    _clean(model)
    onnx.helper.set_model_props(model, {METADATA_KEY: facts})
    onnx.checker.check_model(model)
    if model.ByteSize() >= _LARGEST:
        raise ValueError(f"the model takes {model.ByteSize()} bytes; one ONNX file holds at most {_LARGEST}")
    write_atomically(Path(path), model.SerializeToString())
    return Exported(Path(path), Path(path).stat().st_size, OPSET)


def _converted(network: nn.Module, image: Tensor, tasks: Sequence[str]) -> Any:
    """The network as an ONNX protocol buffer, weights inside."""
    example = image if len(image) > 1 else torch.cat([image, image])  # a batch of one would be baked in
    with _quiet():
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
    assert program is not None
    return program.model_proto


def _clean(model: Any) -> None:
    """Leave out the exporter's notes on where each node came from: they name files of this machine."""
    model.producer_name = "cut"
    del model.metadata_props[:]
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in [*model.graph.value_info, *model.graph.input, *model.graph.output]:
        del value.metadata_props[:]


def session(path: str | Path, threads: int = 1) -> Any:
    """An ONNX Runtime session on the CPU.

    Raises:
        ValueError: If ONNX Runtime is missing, or the file is no readable model.
    """
    ort = _needed("onnxruntime")
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
        message = f"the ONNX file has no {METADATA_KEY!r} metadata: it was not exported by cut"
        raise ValueError(message) from error
    return meta


def parity(path: str | Path, network: nn.Module, batches: Iterable[Tensor]) -> dict[str, float]:
    """The largest absolute difference of each output between ONNX Runtime and PyTorch over given inputs.

    A value that is not finite makes the difference infinite.

    Raises:
        ValueError: If the file is not readable or there are no inputs.
    """
    opened = session(path)
    names = [o.name for o in opened.get_outputs()]
    worst: dict[str, float] = {}
    with _evaluating(network):
        for image in batches:
            expected = network(image)
            for name, found in zip(names, opened.run(names, {"image": image.cpu().numpy()}), strict=True):
                difference = float((expected[name].cpu() - torch.from_numpy(found)).abs().max())
                # max() would drop a NaN, and with it the worst fault there is.
                difference = difference if math.isfinite(difference) else math.inf
                worst[name] = max(worst.get(name, 0.0), difference)
    if not worst:
        raise ValueError("no inputs to compare the ONNX file on; give at least one batch")
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
        if difference > tolerance:
            message = f"output {task!r} differs from PyTorch by {difference:.2e}, more than {tolerance:.0e}"
            raise ValueError(f"{path}: {message}")
    return worst
