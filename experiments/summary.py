"""Summary: records of one comparison as rows, in files and on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from cut.delta import delta_m
from cut.records import Record

# The forms a row can describe: which of a record's costs belong to it.
WEIGHTS, CHANNELS = "unstructured: single weights", "structured: whole channels"


def against_dense(record: Record, dense: Record) -> dict[str, float]:
    """Delta_m on test against the dense record on the same tasks: plain, and with changes clipped to 100 %."""
    reference = {k: v for k, v in dense.metrics["test"].items() if k.split("/")[0] in record.tasks}
    found = {k: v for k, v in record.metrics["test"].items() if k in reference}
    better = record.higher_is_better
    return {
        "delta_m": round(delta_m(found, reference, better), 3),
        "delta_m_bounded": round(delta_m(found, reference, better, clip=100.0), 3),
    }


def what_is_cut(record: Record) -> str:
    """Single weights or whole channels, as the record's config says."""
    units = (record.config.get("pruning") or {}).get("units", "weights")
    return WEIGHTS if units == "weights" else CHANNELS


def _row(
    record: Record, method: str, form: str, tasks: Sequence[str], delta: dict[str, float], kind: str
) -> dict[str, Any]:
    cost = record.cost[form]
    timed = cost.get("onnx", {}).get("latency") or cost["latency"]
    return {
        "method": method,
        "tasks": list(tasks),
        "kind": kind,
        "sparsity": round(record.sparsity.get("kept", 0.0), 6),
        **delta,
        "params": cost["params"],
        "nonzero": cost["nonzero"],
        "bytes": cost["bytes"],
        "macs": cost["macs"],
        "latency_ms": round(timed["median_ms"], 3),
        "latency_p95_ms": round(timed["p95_ms"], 3),
        "latency_runtime": timed["runtime"],
        "metrics": {k: round(v, 5) for k, v in record.metrics["test"].items() if k.split("/")[0] in tasks},
        "record": record.id,
    }


def rows(dense: Record, pruned: Sequence[Record]) -> list[dict[str, Any]]:
    """One row per model: the dense one with all heads, the dense one with the kept heads, then each pruned one.

    Args:
        dense: The record of the dense model.
        pruned: Records of models cut from it, all for the same tasks, the first of which also measured the dense model
            with the kept heads only.

    Returns:
        Rows with ``method``, ``tasks``, ``sparsity``, ``delta_m``, ``params``, ``nonzero``, ``bytes``, ``macs``,
        ``latency_ms``, ``metrics`` and more. Costs of pruned rows are those of the compact model; metrics are on test.

    Raises:
        ValueError: If the records are of different tasks.
    """
    kept = pruned[0].tasks if pruned else dense.tasks
    odd = [r.id for r in pruned if r.tasks != kept]
    if odd:
        raise ValueError(f"record {odd[0]} is of other tasks than {kept}")
    none = {"delta_m": 0.0, "delta_m_bounded": 0.0}
    found = [_row(dense, "dense", "dense_all_heads", dense.tasks, none, "dense, all heads")]
    if pruned and list(kept) != list(dense.tasks):
        row = _row(pruned[0], "dense", "kept_heads", kept, none, "dense, kept heads")
        row["metrics"] = {k: v for k, v in found[0]["metrics"].items() if k.split("/")[0] in kept}
        row |= {"sparsity": 0.0, "record": dense.id}
        found.append(row)
    return found + [_row(r, r.method, "compact", r.tasks, against_dense(r, dense), what_is_cut(r)) for r in pruned]


def _cell(value: float, key: str) -> str:
    percent = any(key.endswith(k) for k in ("miou", "pixel_acc", "accuracy")) or "within" in key or "delta" in key
    return f"{100 * value:.1f}" if percent else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def print_table(found: Sequence[dict[str, Any]], metrics: dict[str, str]) -> None:
    """The rows on the terminal.

    Args:
        found: From :func:`rows`.
        metrics: The metrics to show and their short headings; all are in the report and in ``summary.json``.
    """
    table = Table(
        title="Test set. Pruned rows are cuts of single weights, of whole channels where named so; compacted.",
        caption="par, nz: parameters and non-zeros in millions; ms: median of one picture",
        padding=(0, 1, 0, 0),
        box=None,
        pad_edge=False,
    )
    table.add_column("method", no_wrap=True)
    for head in ("cut", "Δm %", *metrics.values(), "par", "nz", "MB", "MMACs", "ms"):
        table.add_column(head, justify="right", no_wrap=True)
    for r in found:
        delta = "0" if r["method"] == "dense" else f"{r['delta_m']:+.2f}"
        shown = [_cell(r["metrics"][m], m) if m in r["metrics"] else "-" for m in metrics]
        size = [f"{r[k] / 1e6:.{digits}f}" for k, digits in (("params", 2), ("nonzero", 2), ("bytes", 2), ("macs", 0))]
        name = f"{r['method']}, {len(r['tasks'])} heads" if r["method"] == "dense" else r["method"]
        style = "bold" if r["method"].startswith("cut") else ""
        cells = [name, f"{r['sparsity']:.4f}", delta, *shown, *size, f"{r['latency_ms']:.1f}"]
        table.add_row(*cells, style=style)
    console = Console()
    (console if console.width >= 80 else Console(width=80)).print(table)
