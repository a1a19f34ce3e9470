"""ExecuTorch: a ``.pte`` program for phones and small boards, run by XNNPACK. Needs the extra ``executorch``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cut.conversion import Exported, Ordered, check_outputs, evaluating, needed, quiet
from cut.files import write_atomically
from cut.runtime import METADATA_KEY, muted

_EXIR, _BACKEND = "executorch.exir", "executorch.backends.xnnpack"
_FOLDING = f"{_EXIR}.passes.constant_prop_pass"
_PARTITIONER = f"{_BACKEND}.partition.xnnpack_partitioner"
_QUANTISER = (f"{_BACKEND}.quantizer.xnnpack_quantizer", "torchao.quantization.pt2e.quantize_pt2e")


def export_executorch(
    network: nn.Module,
    path: str | Path,
    image: Tensor,
    *,
    tasks: Sequence[str],
    meta: Mapping[str, Any] | None = None,
    calibration: Iterable[Tensor] | None = None,
) -> Exported:
    """Write a network as one ExecuTorch program whose convolutions and matrix products XNNPACK runs.

    The input's size, one picture, is fixed, so that all memory is planned in advance. The method ``forward`` takes
    float32 [1, 3, H, W] and gives the tasks' outputs in order; the method ``cut`` gives the facts as JSON, the names
    of the outputs among them.

    Args:
        network: Forward gives ``{task: Tensor}``; left as it is.
        path: Where to.
        image: An input of the size that the file is for; its first entry is used.
        tasks: The outputs, in this order.
        meta: JSON-able facts to keep in the file; see :func:`cut.export.metadata`.
        calibration: Inputs [N, 3, H, W], of training pictures: then weights (by channel) and activations are stored
            and computed in int8, their ranges taken from what the network does on these.

    Raises:
        ValueError: If the extra is missing, no task is given, the network has no such output or cannot be exported,
            or there are no calibration pictures.
        OSError: If the file cannot be written; nothing is left then.
    """
    with quiet():
        exir, *_ = needed("executorch", _EXIR, _PARTITIONER, *_QUANTISER)
    facts = json.dumps({**(meta or {}), "outputs": list(tasks)}, allow_nan=False)
    example = (image[:1].cpu().clone(),)
    with evaluating(network), quiet(), muted():
        check_outputs(network, example[0], tasks)
        ordered = Ordered(network, tasks).eval()
        try:
            program = _folded(torch.export.export(ordered, example))
            if calibration is not None:
                program = torch.export.export(_int8(program.module(), calibration), example)
            buffer = _lowered(exir, program, facts)
        except (RuntimeError, TypeError, NotImplementedError, torch._dynamo.exc.TorchDynamoException) as error:
            raise ValueError(f"the network cannot be exported to ExecuTorch: {str(error).splitlines()[0]}") from error
    write_atomically(Path(path), buffer)
    return Exported(Path(path), len(buffer))


def _folded(program: Any) -> Any:
    """The program with what depends on no input computed: for one, position embeddings resampled to the input's size.

    The portable kernels lack the operators for that, and it would be done again for every picture.
    """
    (folding,) = needed("executorch", _FOLDING)
    return folding.constant_prop_pass(program, custom_skip_targets={torch.ops.aten.full.default})


def _lowered(exir: Any, program: Any, facts: str) -> bytes:
    """The program's file: what XNNPACK takes goes to it, the portable kernels run the rest."""
    (partition,) = needed("executorch", _PARTITIONER)
    edge = exir.to_edge_transform_and_lower(
        program, partitioner=[partition.XnnpackPartitioner()], constant_methods={METADATA_KEY: facts}
    )
    return bytes(edge.to_executorch().buffer)


def _int8(graph: Any, calibration: Iterable[Tensor]) -> Any:
    """An exported module with int8 weights and activations, its ranges observed on the calibration inputs."""
    quantiser, pt2e = needed("executorch", *_QUANTISER)
    config = quantiser.get_symmetric_quantization_config(is_per_channel=True)
    prepared = pt2e.prepare_pt2e(graph, quantiser.XNNPACKQuantizer().set_global(config))
    seen = 0
    for images in calibration:
        for image in images.cpu().split(1):  # the exported graph takes one picture
            prepared(image)
            seen += 1
    if not seen:
        raise ValueError("no calibration pictures; give at least one batch")
    return pt2e.convert_pt2e(prepared)
