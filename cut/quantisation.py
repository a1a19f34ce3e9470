"""Quantisation: an exported ONNX file in int8, its ranges calibrated on pictures. Needs the extra ``export``.

The network's weights are float until this point: quantising comes after the cut. ExecuTorch quantises before it writes
its program, see :func:`cut.executorch.export_executorch`.
"""

from __future__ import annotations

import json
import platform
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from cut.conversion import Exported, needed, quiet
from cut.export import write_onnx
from cut.runtime import METADATA_KEY, onnx_session

Method = Literal["minmax", "entropy", "percentile"]
METHODS = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
_VNNI = {"avx512_vnni", "avx_vnni", "avx512vnni", "avxvnni"}


def has_vnni(info: str | None = None) -> bool:
    """Whether the CPU multiplies int8 with 32-bit sums; older x86 CPUs overflow at 16 bits.

    Args:
        info: Text as in ``/proc/cpuinfo``; None = this machine's.

    Returns:
        True on any CPU that is not x86: the others do not overflow.
    """
    if info is None:
        if platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686"):
            return True
        source = Path("/proc/cpuinfo")
        info = source.read_text(encoding="utf-8", errors="replace") if source.is_file() else ""
    return bool(_VNNI & set(info.lower().split()))


def quantise_onnx(
    source: str | Path,
    path: str | Path,
    calibration: Iterable[Tensor],
    *,
    reduce_range: bool | None = None,
    method: Method = "minmax",
    float_outputs: bool = True,
) -> Exported:
    """Write an int8 copy of an ONNX file: weights by channel, activations with ranges seen on calibration inputs.

    Names of input and outputs, free batch and metadata stay. Quantise and dequantise nodes (QDQ) surround what runs in
    int8, so any runtime reads it.

    Args:
        source: A file from :func:`cut.export.export_onnx`.
        path: Where to.
        calibration: Inputs [N, 3, H, W], of training pictures.
        reduce_range: Weights in 7 bits, so that sums do not overflow on x86 CPUs without VNNI; None = where this CPU
            lacks it.
        method: How an activation's range follows from what was seen: all of it, the least loss of information, or
            99.999 % of it. The last is often the closest; but it and ``"entropy"`` hold all activations of all
            calibration inputs in memory at once.
        float_outputs: Leave the layer that makes each output, and what follows it, in float: a depth in 256 steps is
            coarse, and these layers are small.

    Raises:
        ValueError: If the extra is missing, the file is not readable, there are no calibration inputs, or the method
            is unknown.
        OSError: If the file cannot be written; nothing is left then.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r}; allowed: {', '.join(map(repr, METHODS))}")
    onnx, quantization = needed("export", "onnx", "onnxruntime.quantization")
    opened = onnx_session(source)
    facts = opened.get_modelmeta().custom_metadata_map.get(METADATA_KEY, json.dumps({}))
    name = opened.get_inputs()[0].name
    with tempfile.TemporaryDirectory() as folder, quiet():
        prepared, written = Path(folder) / "prepared.onnx", Path(folder) / "int8.onnx"
        _prepare(Path(source), prepared)
        names = _output_nodes(onnx.load(prepared)) if float_outputs else []
        quantization.quantize_static(
            prepared,
            written,
            _reader(quantization, name, calibration),
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            per_channel=True,
            reduce_range=not has_vnni() if reduce_range is None else reduce_range,
            calibrate_method=getattr(quantization.CalibrationMethod, METHODS[method]),
            nodes_to_exclude=names,
        )
        model = onnx.load(written)
    return write_onnx(model, path, facts)


def _prepare(source: Path, target: Path) -> None:
    """The file with norms folded into convolutions and the shapes of all values noted."""
    (process,) = needed("export", "onnxruntime.quantization.shape_inference")
    process.quant_pre_process(source, target, skip_symbolic_shape=True)


def _reader(quantization: Any, name: str, calibration: Iterable[Tensor]) -> Any:
    """The calibration inputs in the form that ONNX Runtime asks for.

    Raises:
        ValueError: If there are none.
    """
    arrays = [np.ascontiguousarray(images.cpu().numpy(), np.float32) for images in calibration]
    if not arrays:
        raise ValueError("no calibration pictures; give at least one batch")

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.left: Iterator[np.ndarray] = iter(arrays)

        def get_next(self) -> dict[str, np.ndarray] | None:
            array = next(self.left, None)
            return None if array is None else {name: array}

    return Reader()


_WEIGHTED = {"Conv", "Gemm", "MatMul", "ConvTranspose"}


def _output_nodes(model: Any) -> list[str]:
    """Names of the nodes between each output and the last layer with weights before it, that layer among them."""
    made_by = {value: node for node in model.graph.node for value in node.output}
    found: set[str] = set()
    queue = [output.name for output in model.graph.output]
    while queue:
        node = made_by.get(queue.pop())
        if node is None or node.name in found:
            continue
        found.add(node.name)
        if node.op_type not in _WEIGHTED:
            queue.extend(node.input)
    return sorted(found)
