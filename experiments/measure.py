"""Measure: what a run's models take, and where they were cut, for the record."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cut import checkpoint, export
from cut.compact import compact, keep_tasks
from cut.cost import cost, latency
from cut.decomposition import components, owners, prunable
from cut.masks import component_sparsity, layer_sparsity
from cut.network import MultiTaskNet
from cut.pruning import Pruning


def _cost(network: torch.nn.Module, image: torch.Tensor) -> dict[str, Any]:
    """Cost and latency of a network for one picture, in PyTorch on one thread."""
    numbers = {k: v for k, v in asdict(cost(network, image)).items() if v is not None}
    with torch.no_grad():
        numbers["latency"] = asdict(latency(lambda: network(image), threads=1)) | {"runtime": "PyTorch"}
    return numbers


def _onnx(
    network: torch.nn.Module,
    path: Path,
    batch: dict[str, torch.Tensor],
    tasks: Sequence[str],
    meta: dict[str, Any],
) -> dict[str, Any]:
    """Export a network, check every output on real pictures, and time the file; empty without the extra."""
    try:
        exported = export.export_onnx(network, path, batch["image"][:1], tasks=tasks, meta=meta)
    except ValueError as error:
        if "extra 'export'" in str(error):
            return {}
        raise
    worst = export.check_parity(path, network, [batch["image"]])
    opened, image = export.session(path), batch["image"][:1].numpy()
    timed = asdict(latency(lambda: opened.run(None, {"image": image}), threads=1)) | {"runtime": "ONNX Runtime"}
    return {"bytes": exported.bytes, "opset": exported.opset, "max_abs_diff": worst, "latency": timed}


def measure(
    network: MultiTaskNet,
    dense: MultiTaskNet,
    pruning: Pruning,
    batch: dict[str, torch.Tensor],
    losses: Any,
    folder: Path,
    meta: dict[str, Any],
    exported: bool = True,
) -> dict[str, Any]:
    """Compact the network and save it; sparsity by component and layer, mask overlap, and the cost of every form.

    Args:
        network: The trained network with all its heads, under the mask.
        dense: The network before the cut: what a pruned one is compared with.
        pruning: The callback that made the mask.
        batch: A real batch, on the CPU.
        losses: Losses of all tasks.
        folder: The run's folder; the compact model goes into ``compact/``.
        meta: Facts to keep with the model.
        exported: Whether ONNX files are written and timed too.

    Returns:
        The record's entries ``cost``, ``sparsity``, ``layer_sparsity``, ``layer_component`` and ``mask_overlap``.
    """
    tasks, image = list(pruning.tasks or network.outputs), batch["image"][:1]
    mask = {n: m.cpu() for n, m in pruning.mask.items()}
    for whole in (dense, network):
        whole.cpu().eval().select(list(whole.outputs))
    used = owners(network, batch, losses, list(losses))
    small = compact(network, tasks, mask, batch)
    kept = keep_tasks(dense, tasks, batch)
    size = checkpoint.save(small, folder / "compact", metadata=meta)
    forms: dict[str, tuple[torch.nn.Module, list[str]]] = {
        "dense_all_heads": (dense, list(dense.outputs)),
        "kept_heads": (kept, tasks),
        "compact": (small, tasks),
    }
    weights = prunable(network)
    result: dict[str, Any] = {
        "cost": {
            "dense_all_heads": _cost(dense, image),
            "kept_heads": _cost(kept, image),
            "compact": _cost(small, image) | {"bytes": size},
        },
        "sparsity": component_sparsity(network, mask, used, tasks),
        "layer_sparsity": layer_sparsity(network, mask),
        "layer_component": {n: c for n, c in components(used, tasks).items() if n in weights},
        "mask_overlap": {n: {k: round(v, 4) for k, v in pairs.items()} for n, pairs in pruning.overlap.items()},
    }
    for form, (net, outputs) in forms.items():
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            if form != "compact":
                result["cost"][form]["bytes"] = checkpoint.save(net, Path(temporary) / "model")
            if exported and (form == "compact" or (form == "kept_heads") == bool(mask)):
                result["cost"][form]["onnx"] = _onnx(net, folder / f"{form}.onnx", batch, outputs, meta)
    network.select(tasks)
    return result
