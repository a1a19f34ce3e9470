"""Devices: a grid's rows by runtime and precision, as its delivered files were measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.delivery import FOLDER, SHOWN, Delivery, Form, collect, shown
from experiments.grid import Grid
from experiments.render import caption, number, write_formats
from experiments.results import Records, delta, is_dense, level, tidy
from experiments.results import collect as collect_records
from experiments.typeset import Table, Text, markdown

FORMS = ("runtime", "precision", "latency_ms", "latency_p95_ms", "latency_ratio", "latency_low", "latency_high")
MEASURED = (*FORMS[2:], "file_bytes", "peak_bytes")
MAIN = ("ONNX Runtime", "fp32")  # whose latency was aimed at
OTHERS = (("ExecuTorch", "fp32"), ("PyTorch", "fp32"))
INT8 = (("ONNX Runtime", "int8"), ("ExecuTorch", "int8"))
FROM_FP32 = "delta_m_from_fp32"
Deliveries = Mapping[str, Delivery]


def by_file(grid: Grid, records: Records, deliveries: Deliveries) -> pd.DataFrame:
    """The tidy frame with a row per runtime and precision.

    Args:
        grid: The table.
        records: Id of a cell to its record.
        deliveries: Id of a cell to what was measured on its files; a row without any has one line without a runtime.

    Returns:
        The columns of :func:`experiments.results.tidy`, with :data:`FORMS`, ``file_bytes``, ``peak_bytes`` and
        ``delta_m_from_fp32`` behind ``seeds``. Means over the seeds that were delivered. Delta_m and metrics of int8
        files are those that they gave themselves, ``delta_m_from_fp32`` is their Delta_m less that of the same seeds'
        models. The index is the number of the grid's row.
    """
    frame = tidy(grid, records)
    lines: list[dict[str, Any]] = []
    places: list[int] = []
    for at, (row, (_, line)) in enumerate(zip(grid.rows, frame.iterrows(), strict=True)):
        found: dict[tuple[str, str], list[tuple[str, Form]]] = {}
        for run in row.runs:
            for form in deliveries[run[0].id].forms if len(run) == 1 and run[0].id in deliveries else ():
                found.setdefault((form.runtime, form.precision), []).append((run[0].id, form))
        plain: dict[str, Any] = {str(k): v for k, v in line.items()}
        own = [{**plain, **_measured(forms, grid, records)} for forms in found.values()] or [plain]
        lines, places = lines + own, places + [at] * len(own)
    columns = list(frame.columns)
    behind = columns.index("seeds") + 1
    columns[behind:behind] = [*FORMS, "file_bytes", "peak_bytes", FROM_FP32]
    return pd.DataFrame(lines, columns=columns, index=places)


def aimed(files: pd.DataFrame) -> pd.DataFrame:
    """The lines of the files whose latency was aimed at, of what :func:`by_file` gives."""
    return files[(files["runtime"] == MAIN[0]) & (files["precision"] == MAIN[1])]


def _measured(forms: Sequence[tuple[str, Form]], grid: Grid, records: Records) -> dict[str, Any]:
    """One runtime and precision of a row, over its seeds."""
    first = forms[0][1]
    values = [{**vars(f), "file_bytes": f.bytes} for _, f in forms]
    line: dict[str, Any] = {"runtime": first.runtime, "precision": first.precision}
    line |= {k: float(np.mean([v[k] for v in values])) for k in MEASURED}
    if any(f.metrics for _, f in forms):
        line |= _own_metrics(forms, grid, records)
    return line


def _own_metrics(forms: Sequence[tuple[str, Form]], grid: Grid, records: Records) -> dict[str, Any]:
    """Metrics and Delta_m that files gave themselves, in place of the record's."""
    starts = {c.id: grid.against.get(c.id, c.start) for row in grid.rows for run in row.runs for c in run}
    changes, costs = [], []
    for name, form in forms:
        dense = starts[name]
        reference = records[dense.id].metrics["test"] if dense is not None and dense.id in records else {}
        better = records[name].higher_is_better if name in records else {}
        own = {k: v for k, v in form.metrics.items() if k in better}
        changes.append(delta(own, reference, better))
        plain = {k: v for k, v in records[name].metrics["test"].items() if k in own} if name in records else {}
        costs.append(changes[-1] - delta(plain, reference, better))
    found: dict[str, Any] = {"delta_m": float(np.mean(changes)), "delta_m_std": math.nan, "seeds": len(forms)}
    found |= {"delta_m_bounded": math.nan, "delta_m_vs_longer": math.nan, FROM_FP32: float(np.mean(costs))}
    for key in forms[0][1].metrics:
        found |= {key: float(np.mean([f.metrics[key] for _, f in forms])), f"{key}_std": math.nan}
    return found


def table(grid: Grid, files: pd.DataFrame, backbone: str, tasks: str) -> Table:
    """One backbone and selection: a row per method and latency, with all runtimes and precisions beside each other."""
    part = files[(files["backbone"] == backbone) & (files["tasks"] == tasks)]
    head = ["method", "aim", "seeds", "Δm %", "params M", "MMACs", "MB", "ms", "of dense"]
    head += [f"{runtime} of dense" for runtime, _ in OTHERS]
    head += [f"{file} {what}" for file in ("int8", "int8 .pte") for what in ("Δm %", "less fp32's", "MB", "ms")]
    body = []
    for at, rows in part.groupby(level=0):
        row, sparsity = grid.rows[int(at)], float(rows["sparsity"].iloc[0])  # type: ignore[call-overload]
        method, latency = row.method, float(row.variant["latency"])
        by = {(r["runtime"], r["precision"]): r for _, r in rows.iterrows()}
        main = by.get(MAIN, rows.iloc[0])
        spread = "" if math.isnan(main["delta_m_std"]) else f" ± {number(main['delta_m_std'])}"
        whole = latency < 1 or is_dense(row.runs[0][0])
        own = method if whole else f"{method} ({level(row, sparsity):.0%} of weights)"
        cells = [own, f"{latency:g}", str(int(main["seeds"])), number(main["delta_m"]) + spread]
        cells += [number(main["params"] / 1e6), number(main["macs"] / 1e6, 1), number(main["file_bytes"] / 1e6)]
        cells += [number(main["latency_ms"], 1), number(main["latency_ratio"])]
        cells += [number(by[k]["latency_ratio"]) if k in by else "-" for k in OTHERS]
        for key in INT8:
            one = by.get(key)
            shown = ("delta_m", 1), (FROM_FP32, 1), ("file_bytes", 1e6), ("latency_ms", 1)
            cells += ["-"] * 4 if one is None else [number(one[k] / scale) for k, scale in shown]
        body.append([Text(c) for c in cells])
    return Table(f"{grid.title}: {backbone}, {tasks.replace('+', ', ')}", head, body, 1)


def tables(grid: Grid, files: pd.DataFrame) -> list[Table]:
    """One table per backbone and selection, in the order of the grid."""
    kinds = files[["backbone", "tasks"]].drop_duplicates().to_numpy().tolist()
    return [table(grid, files, str(b), str(t)) for b, t in kinds]


def how(deliveries: Deliveries) -> str:
    """How the files were measured, for the caption."""
    if not deliveries:
        return "No file is measured yet."
    processors = sorted({d.machine["processor"] for d in deliveries.values()})
    load = max(d.load for d in deliveries.values())
    threads = sorted({d.threads for d in deliveries.values()})
    return (
        "MB, ms and of dense: the exported fp32 file, ONNX Runtime; of dense: median over rounds, timed in turns with "
        f"the dense model's file of the same runtime; {', '.join(map(str, threads))} thread, {', '.join(processors)}, "
        f"load at most {load:.1f}. int8: calibrated on training pictures, first seed; less fp32's: of "
        "that seed."
    )


def side_by_side(grid: Grid, deliveries: Deliveries) -> str:
    """Dense, masked and compact form of a model per network, in every runtime, as Markdown; says so if none is timed.

    Args:
        grid: The table.
        deliveries: Id of a cell to what was measured on its files.
    """
    runtimes = (MAIN, *OTHERS)
    head = ["network, kept tasks", "form"]
    head += [f"{runtime} {what}" for runtime, _ in runtimes for what in ("ms", "of dense")] + ["ONNX MB"]
    body = []
    cells = [c for c in shown(grid) if c.id in deliveries and deliveries[c.id].beside]
    for cell in cells:
        sides = {**deliveries[cell.id].beside, "compact": deliveries[cell.id].forms}
        name = f"{cell.config['model']['init_args']['network']['backbone']}, {', '.join(cell.tasks)}"
        for side in ("dense", "masked", "compact"):
            by = {(f.runtime, f.precision): f for f in sides.get(side, ())}
            line = [name, side]
            for kind in runtimes:
                one = by.get(kind)
                line += ["-", "-"] if one is None else [number(one.latency_ms, 1), number(one.latency_ratio)]
            body.append([Text(c) for c in [*line, number(by[MAIN].bytes / 1e6) if MAIN in by else "-"]])
    if not body:
        return "Not measured yet: `make table-edge` times these files.\n"
    method, latency = SHOWN
    timed = [deliveries[c.id] for c in cells]
    threads = ", ".join(map(str, sorted({d.threads for d in timed})))
    said = (
        f"`{method}` at {latency:g} of the dense latency, first seed, fp32; one picture, {threads} thread, "
        f"{', '.join(sorted({d.machine['processor'] for d in timed}))}, load at most {max(d.load for d in timed):.1f}. "
        "All files of a network were timed in turns; of dense: the dense file's of the same runtime."
    )
    return f"{markdown(Table(grid.title, head, body, 2))}\n{said}\n"


def write(grid: Grid, records: str | Path, out: str | Path, folder: str | Path = FOLDER) -> list[Path]:
    """Write ``<grid>.md``, ``.csv`` (:func:`by_file`) and ``.tex``, each whole or not at all.

    Args:
        grid: The table.
        records: Folder of records.
        out: Folder of tables.
        folder: Folder of deliveries.

    Raises:
        ValueError: If a record or a delivery is damaged.
    """
    found, deliveries = collect_records(grid, records), collect(grid, folder)
    files = by_file(grid, found, deliveries)
    said = f"{caption(grid, found)} {how(deliveries)}"
    parts = [f"# {grid.title}", said]
    for one in tables(grid, files):
        parts += [f"## {one.title.removeprefix(grid.title + ': ')}", markdown(one).rstrip("\n")]
    content = "\n\n".join(parts) + "\n"
    return write_formats(grid, out, content, files, tables(grid, files), said.replace("**", ""))
