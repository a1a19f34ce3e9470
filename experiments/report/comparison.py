"""Comparison: a dense model and those cut from it, the demo's table, as plain JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from cut.delta import delta_m
from cut.records import Record
from experiments.report import views
from experiments.report.table import Json, Source, axes, bottom, cell, column, coordinates, styles, told
from experiments.summary import CHANNELS, rows

NAMES = {
    "seg": "segmentation",
    "normal": "surface normals",
    "depth": "depth",
    "edge": "edges",
    "keypoint": "keypoints",
    "scene": "room type",
}
# Metrics in words, with the factor and digits they are shown with.
WORDS: dict[str, tuple[str, float, int]] = {
    "miou": ("mIoU %", 100, 1),
    "pixel_acc": ("pixel accuracy %", 100, 1),
    "mean": ("mean angle °", 1, 1),
    "median": ("median angle °", 1, 1),
    "within_11": ("within 11.25° %", 100, 1),
    "within_22": ("within 22.5° %", 100, 1),
    "within_30": ("within 30° %", 100, 1),
    "abs": ("abs. error m", 1, 3),
    "rel": ("rel. error", 1, 3),
    "delta1": ("δ < 1.25 %", 100, 1),
    "delta2": ("δ < 1.25² %", 100, 1),
    "delta3": ("δ < 1.25³ %", 100, 1),
    "l1": ("L1 error", 1, 4),
    "accuracy": ("accuracy %", 100, 1),
}
SIZES: dict[str, tuple[str, float, int]] = {
    "params": ("params M", 1e-6, 2),
    "nonzero": ("non-zero M", 1e-6, 3),
    "bytes": ("MB", 1e-6, 2),
    "macs": ("MMACs", 1e-6, 0),
    "latency_ms": ("ms, median", 1.0, 1),
    "latency_p95_ms": ("ms, p95", 1.0, 1),
}
TINY = 0.05  # of a percent: no change


def listed(words: Sequence[str]) -> str:
    """Words as a list in a sentence.

    Example:
        >>> listed(["a", "b", "c"]), listed(["a"])
        ('a, b and c', 'a')
    """
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _metric(row: Json, key: str, whole: Mapping[str, float], better: Mapping[str, bool]) -> Json:
    """A metric and, of a cut model, its change against the dense one."""
    value = row["metrics"].get(key)
    if value is None:
        return cell(None, "-")
    _, scale, digits = WORDS.get(key.split("/")[-1], ("", 1.0, 3))
    text, base = f"{scale * value:.{digits}f}", whole.get(key)
    if row["method"] == "dense" or not base or key not in better:
        return cell(scale * value, text)
    change = delta_m({key: value}, {key: base}, better)
    tone = "good" if change > TINY else "bad" if change < -TINY else ""
    return cell(scale * value, text, note=f"{change:+.1f} %", tone=tone)


def _heading(key: str, better: Mapping[str, bool]) -> str:
    words = WORDS.get(key.split("/")[-1], (key.split("/")[-1], 1.0, 3))[0]
    return f"{key.split('/')[0]} {words}" + ({True: " ↑", False: " ↓"}[better[key]] if key in better else "")


def label(row: Json) -> str:
    """What a row of :func:`experiments.summary.rows` is called."""
    return str(row["kind"] if row["method"] == "dense" else row["method"])


def _cells(row: Json, tasks: Sequence[str]) -> dict[str, Json]:
    """The cells of a row besides its metrics; ``tasks``: those of the dense model."""
    is_dense = row["method"] == "dense"
    what = row["kind"].split(":")[-1].strip()
    if is_dense:
        what = "heads" if row["tasks"] != list(tasks) else "nothing"
    changes = {k: cell(row[k], "0" if is_dense else f"{row[k]:+.2f}") for k in ("delta_m", "delta_m_bounded")}
    return {
        "method": cell(None, label(row)),
        "what": cell(None, what),
        "tasks": cell(None, "+".join(row["tasks"])),
        "sparsity": cell(row["sparsity"], f"{100 * row['sparsity']:.2f}"),
        **changes,
        **{k: cell(row[k] * s, f"{row[k] * s:.{digits}f}") for k, (_, s, digits) in SIZES.items()},
    }


def table(dense: Record, pruned: Sequence[Record], source: Source) -> Json:
    """The comparison as a table like those of :func:`experiments.report.table.of_grid`; every run is its own row."""
    found = rows(dense, pruned)
    better, whole = dict(dense.higher_is_better), found[0]["metrics"]
    kept = (pruned[0] if pruned else dense).tasks
    metrics = [m for m in dict.fromkeys(k for r in found for k in r["metrics"]) if m.split("/")[0] in kept]
    first = list({m.split("/")[0]: m for m in reversed(metrics)}.values())[::-1]
    metrics = [*first, *(m for m in metrics if m not in first)]
    colours = styles([label(r) for r in found], [r["method"] == "dense" for r in found])
    records = {r.id: r for r in [dense, *pruned]}
    shown = [
        {
            "label": label(row),
            "style": colours[label(row)],
            "method": row["method"],
            "tasks": "+".join(row["tasks"]),
            "backbone": records[row["record"]].backbone,
            "level": round(row["sparsity"], 3),
            "heading": "dense" if row["method"] == "dense" else f"{100 * row['sparsity']:.3g} %",
            "state": "all",
            "seeds": "1",
            "mine": row["method"].startswith(views.OURS),
            "cells": {**_cells(row, dense.tasks), **{m: _metric(row, m, whole, better) for m in metrics}},
            "x": coordinates(row),
            "y": row["delta_m"],
            "std": None,
            "runs": [_run(row, records[row["record"]], source)],
        }
        for row in found
    ]
    heads = [column(k, n, text=True) for k, n in (("method", "model"), ("what", "what is cut"), ("tasks", "tasks"))]
    heads += [column("sparsity", "sparsity %"), column("delta_m", "Δm % ↑", better=True)]
    heads += [column(m, _heading(m, better), better=better.get(m)) for m in first]
    heads += [column(k, name, better=False) for k, (name, _, _) in SIZES.items()]
    heads += [column("delta_m_bounded", "Δm bounded %", better=True)]
    heads += [column(m, _heading(m, better), better=better.get(m)) for m in metrics if m not in first]
    said = f"Seed {dense.seed}, last epoch, test set; ms: one picture, one thread, {found[0]['latency_runtime']}. "
    runs = [[records[r["record"]]] if r["method"] != "dense" else [] for r in found]
    return {
        "id": "demo",
        "group": source.group,
        "title": f"make demo: {listed([NAMES.get(t, t) for t in kept])}",
        "caption": said + "Small figures: change of the metric against the dense model, positive is better.",
        "how": [
            "Metrics: the test set, last epoch.",
            "Δm: against the dense record of the same seed on the same tasks; one seed, no spread.",
        ],
        "folder": source.folder,
        "columns": heads,
        "rows": shown,
        "axes": axes(shown),
        "bottom": bottom(shown),
        "recovery": [],
        **views.by_layer(runs),
    }


def _run(row: Json, record: Record, source: Source) -> Json:
    return {
        "seed": record.seed,
        "y": row["delta_m"],
        "text": f"{row['delta_m']:+.2f}",
        "x": coordinates(row),
        "records": [told(record)],
        "missing": [],
        "commands": [source.command(record.id, True)],
    }


def facts(dense: Record, pruned: Sequence[Record]) -> list[Json]:
    """The headline: what the first cut of ours did to size, speed and metrics; nothing without one."""
    found = rows(dense, pruned)
    cut = next((r for r in found if r["method"].startswith(views.OURS)), None)
    if cut is None:
        return []
    whole = found[0]
    # A metric near 0 in the dense model makes its relative change, and so the plain mean, as large as one likes.
    wild = abs(cut["delta_m"]) > 100
    shown = cut["delta_m_bounded"] if wild else cut["delta_m"]
    more = f", each clipped to ±100 % (unclipped {cut['delta_m']:+.0f} %)" if wild else ""
    return [
        {"value": f"{100 * cut['sparsity']:.1f} %", "text": "of the weights of backbone and kept heads are cut"},
        {
            "value": f"{shown:+.1f} %",
            "tone": "good" if shown >= 0 else "bad",
            "text": f"Δm: mean change over the kept tasks against the dense model{more}; positive is better",
        },
        {
            "value": f"{whole['bytes'] / 1e6:.1f} → {cut['bytes'] / 1e6:.2f} MB",
            "text": "on disk, dense with all heads → cut",
        },
        {
            "value": f"{whole['nonzero'] / 1e6:.2f} → {cut['nonzero'] / 1e6:.2f} M",
            "text": "parameters that are not zero",
        },
        {
            "value": f"{whole['latency_ms']:.1f} → {cut['latency_ms']:.1f} ms",
            "text": f"for one picture, one thread, {cut['latency_runtime']}",
        },
    ]


def story(dense: Record, pruned: Sequence[Record], note: str = "") -> list[str]:
    """What was done, in paragraphs."""
    kept = (pruned[0] if pruned else dense).tasks
    dropped = [t for t in dense.tasks if t not in kept]
    weights = "random" if dense.weights_source == "random" else dense.weights_source
    on = f" on {dense.data['splits'].get('train', '?')} pictures" if "splits" in dense.data else ""
    begun = (
        f"A dense multi-task model ({dense.backbone} with one head per task; first weights: {weights}) was trained for "
        f"{_named(dense.tasks)}{on}. The wanted tasks are {_named(kept)}"
    )
    verb = "heads for {} are" if len(dropped) > 1 else "head for {} is"
    begun += f"; the {verb.format(_named(dropped))} dropped." if dropped else "."
    target = pruned[0].budget.get("target") if pruned else None
    if target:
        begun += (
            f" Each method then cuts {100 * target:g} % of the weights of backbone and kept heads (or what the table "
            "says) and trains what is left for the same number of epochs."
        )
    epochs = {len(r.history) for r in pruned}
    if dense.history and len(epochs) == 1 and (more := epochs.pop()):
        begun += (
            f" The dense model had {_count(len(dense.history), 'epoch')}, each cut model {more} more, which the dense "
            "model did not get: a gain over it may come from the longer training and not from the cut. The methods "
            "among themselves were trained alike."
        )
    return [begun, _methods(pruned), " ".join(filter(None, [_kinds(dense, pruned), note]))]


def _named(tasks: Sequence[str]) -> str:
    return listed([NAMES.get(t, t) for t in tasks])


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"


def _methods(pruned: Sequence[Record]) -> str:
    methods = {r.method for r in pruned}
    text = (
        "CUT scores every weight once for each wanted task, by |weight x gradient of that task's loss| on a little "
        "data, and lets the tasks vote on the weights they share."
    )
    text += " Magnitude looks at the size of the weights alone." if "magnitude" in methods else ""
    return text + (" DiSparse keeps what any one of the tasks would keep." if "disparse" in methods else "")


def _kinds(dense: Record, pruned: Sequence[Record]) -> str:
    whole = [r["method"] for r in rows(dense, pruned) if r["kind"] == CHANNELS]
    text = "Single"
    if whole:
        text = (
            f"{', '.join(whole)} cuts whole channels, so that multiply-accumulates and latency fall in any runtime. In "
            "the other rows single"
        )
    return text + (
        " weights are cut (unstructured), not whole channels: the file shrinks because zeros are stored as a bit mask; "
        "multiply-accumulates and latency fall only where heads are dropped and whole channels end up empty."
    )


def timing(dense: Record, pruned: Sequence[Record]) -> str:
    """How the latencies were taken, and how much those of one and the same network varied between runs."""
    cost = dense.cost["dense_all_heads"]
    timed = (cost.get("onnx") or {}).get("latency") or cost["latency"]
    threads = _count(timed["threads"], "thread")
    text = (
        f"{timed.get('runtime', 'PyTorch')}, one picture, {threads}, median and 95th percentile of {timed['repeats']} "
        "runs after warm-up"
    )
    again = [(r.cost.get("kept_heads") or {}).get("onnx", {}).get("latency", {}).get("median_ms") for r in pruned]
    found = [a for a in again if a is not None and not math.isnan(a)]
    if len(set(found)) > 1:
        return text + (
            "; each model was timed in its own run, not side by side. The same dense network with the kept heads took "
            f"{min(found):.1f} to {max(found):.1f} ms in {len(found)} runs: differences within that spread say nothing"
        )
    return text + ("; the models took turns on one machine" if found else "")
