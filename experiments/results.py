"""Results: the records of a grid as a tidy frame, one row per row of the grid."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from cut.delta import delta_m
from cut.records import Record, read
from experiments.cell import Cell
from experiments.grid import Grid, Row
from experiments.selection import select

COSTS = ("params", "nonzero", "macs", "bytes")
# Numbers of every row, after the variant columns and before the metrics.
DELTAS = ("delta_m", "delta_m_std", "delta_m_bounded", "delta_m_vs_longer")
NUMBERS = (*DELTAS, *COSTS, "score_seconds", "finetune_seconds", "peak_memory")
Records = Mapping[str, Record]


def collect(grid: Grid, folder: str | Path) -> dict[str, Record]:
    """Id to record of the grid's cells that have one in a folder.

    Raises:
        ValueError: If a record is damaged.
    """
    paths = {c.id: Path(folder) / f"{c.id}.json" for c in grid.cells()}
    return {name: read(path) for name, path in paths.items() if path.is_file()}


def variants(grid: Grid) -> list[str]:
    """The grid's variant columns, in the order of the rows."""
    return list(dict.fromkeys(k for row in grid.rows for k in row.variant))


def union(cells: Sequence[Cell]) -> list[str]:
    """The tasks of several cells, in their order."""
    return list(dict.fromkeys(t for c in cells for t in c.tasks))


def is_dense(cell: Cell) -> bool:
    """Whether the cell prunes nothing."""
    return (cell.config.get("pruning") or {}).get("budget") is None


def level(row: Row, achieved: float) -> float:
    """The sparsity that a row belongs to: its own level, its cells' target, else the achieved one to the nearest 0.005.

    Args:
        row: Of a grid.
        achieved: The row's sparsity, NaN without records.

    Returns:
        0 for a row that prunes nothing; NaN if neither is known.
    """
    if row.level is not None:
        return row.level
    cells = [c for run in row.runs for c in run]
    if all(is_dense(c) for c in cells):
        return 0.0
    targets = {c.target for c in cells}
    target = targets.pop()
    if not targets and target is not None and target < 1:  # other budgets count parameters
        return float(target)
    return achieved if math.isnan(achieved) else round(achieved * 200) / 200


def levels(grid: Grid, frame: pd.DataFrame) -> list[float]:
    """:func:`level` of every row of a grid's tidy frame."""
    return [level(row, float(achieved)) for row, achieved in zip(grid.rows, frame["sparsity"], strict=True)]


def _form(record: Record) -> str:
    """What a record's run puts out: the compact model, or the dense one with the kept heads.

    A run without a budget whose tasks have tensors of their own beside the network's puts out more than the dense
    network is: all of that is deployed, and counts.
    """
    sizes = {form: cost.get("params", 0) for form, cost in record.cost.items()}
    grown = sizes.get("compact", 0) > sizes.get("dense_all_heads", 0)
    if record.budget.get("target") is not None or grown:
        return "compact"
    return "kept_heads" if record.dropped_tasks else "dense_all_heads"


def costs(record: Record) -> dict[str, float]:
    """Size and MACs of what a record's run puts out."""
    return {k: record.cost[_form(record)][k] for k in COSTS}


def latency(record: Record) -> float:
    """Median milliseconds for one picture of what a record's run puts out, in PyTorch on one thread."""
    return float(record.cost[_form(record)]["latency"]["median_ms"])


def _joined_sparsity(found: Sequence[Record]) -> float:
    """Removed weights over all weights of several models."""
    kept = [r.sparsity.get("kept", 0.0) for r in found]
    if len(kept) == 1:
        return kept[0]
    return float(np.average(kept, weights=[r.cost["kept_heads"]["params"] for r in found]))


def _metrics(cells: Sequence[Cell], found: Sequence[Record | None], grid: Grid) -> dict[str, float]:
    """The grid's metrics of the cells' tasks, joined, from one record per cell; a cell without a record gives none."""
    joined: dict[str, float] = {}
    for cell, record in zip(cells, found, strict=True):
        if record is not None:
            shown = select(record, grid.selection)[grid.split]
            joined |= {k: v for k, v in shown.items() if k.split("/")[0] in cell.tasks}
    return joined


def delta(
    metrics: Mapping[str, float], reference: Mapping[str, float], better: Mapping[str, bool], clip: float | None = None
) -> float:
    """Delta_m, NaN if the reference lacks a metric or there are none."""
    if not metrics or set(metrics) - set(reference):
        return math.nan
    return delta_m(metrics, {k: reference[k] for k in metrics}, better, clip)


def _start(cell: Cell, grid: Grid) -> str:
    """Id of the dense cell to compare with: the grid's, its start, itself if it is dense, empty if there is none."""
    if cell.id in grid.against:
        return grid.against[cell.id].id
    return cell.start.id if cell.start else cell.id if is_dense(cell) else ""


def _run(cells: Sequence[Cell], grid: Grid, records: Records) -> tuple[dict[str, float], dict[str, float]] | None:
    """One seed's numbers and test metrics; None if a record is missing."""
    found = [records[c.id] for c in cells if c.id in records]
    if len(found) < len(cells):
        return None
    better = {k: v for r in found for k, v in r.higher_is_better.items()}
    metrics = _metrics(cells, found, grid)
    starts = [_start(c, grid) for c in cells]
    longer = [grid.longer[s].id if s in grid.longer else "" for s in starts]
    dense, extra = (_metrics(cells, [records.get(i) for i in ids], grid) for ids in (starts, longer))
    # The longer model has the kept heads only, the dense one may have more.
    shared = {k: v for k, v in metrics.items() if k in extra} if all(map(is_dense, cells)) else metrics
    cost = [costs(r) for r in found]
    numbers = {
        "sparsity": _joined_sparsity(found),
        "delta_m": delta(metrics, dense, better),
        "delta_m_bounded": delta(metrics, dense, better, clip=100.0),
        "delta_m_vs_longer": delta(shared, extra, better),
        **{k: sum(c[k] for c in cost) for k in COSTS},
        "score_seconds": sum(r.score_seconds for r in found),
        "finetune_seconds": sum(r.finetune_seconds for r in found),
        "peak_memory": max(r.peak_memory for r in found),
    }
    if grid.by_latency:
        numbers["latency_ms"] = sum(latency(r) for r in found)
    if grid.by_task:
        for task in union(cells):
            own = {k: v for k, v in metrics.items() if k.split("/")[0] == task}
            numbers[f"delta_m/{task}"] = delta(own, dense, better)
    return numbers, metrics


def by_run(row: Row, grid: Grid, records: Records) -> list[dict[str, float]]:
    """A row's numbers and metrics, run by run; empty for a run that lacks a record."""
    found = [_run(run, grid, records) for run in row.runs]
    return [{} if x is None else {**x[0], **x[1]} for x in found]


def changes(row: Row, grid: Grid, records: Records) -> list[dict[str, float]]:
    """The change of every metric in percent, positive = better, for each run that has all its records.

    Against the dense model that Delta_m compares with; a metric that it lacks is left out.
    """
    lines = []
    for cells in row.runs:
        found = [records.get(c.id) for c in cells]
        dense = _metrics(cells, [records.get(_start(c, grid)) for c in cells], grid)
        if dense and None not in found:
            better = {k: v for r in found if r is not None for k, v in r.higher_is_better.items()}
            metrics = {k: v for k, v in _metrics(cells, found, grid).items() if k in dense}
            lines.append({k: delta({k: v}, dense, better) for k, v in metrics.items()})
    return lines


def _backbone(cells: Sequence[Cell], records: Records) -> str:
    """The cells' backbones, as far as records or configs tell."""
    names = []
    for cell in cells:
        network = cell.config.get("model", {}).get("init_args", {}).get("network") or {}
        names.append(records[cell.id].backbone if cell.id in records else network.get("backbone", ""))
    return "+".join(dict.fromkeys(n for n in names if n))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def _std(values: Sequence[float]) -> float:
    """The sample's standard deviation, NaN for fewer than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def tidy(grid: Grid, records: Records) -> pd.DataFrame:
    """One row per row of the grid: means over the seeds that have records.

    A seed whose dense record is missing leaves the row's Delta_m empty, so that every mean is over ``seeds`` runs.

    Args:
        grid: The table.
        records: Id of a cell to its record; see :func:`collect`.

    Returns:
        ``method``, ``sparsity`` (achieved), ``tasks``, ``backbone``, the grid's variant columns, ``seeds``, then
        :data:`NUMBERS`, then each metric and its standard deviation. Delta_m in percent against the dense model
        of the same seed on the same tasks; numbers of a row without records are NaN. A grid may end with
        ``latency_ms`` and ``delta_m/<task>``.

    Raises:
        ValueError: If a record has no epoch that the grid's selection rule could choose.
    """
    lines, names, extras = [], dict[str, None](), dict[str, None]()
    for row in grid.rows:
        runs = [found for run in row.runs if (found := _run(run, grid, records)) is not None]
        numbers, metrics = [r[0] for r in runs], [r[1] for r in runs]
        names |= dict.fromkeys(k for m in metrics for k in m)
        first = row.runs[0] if row.runs else ()
        cells = [c for run in row.runs for c in run]
        line = {
            "method": row.method,
            "tasks": "+".join(union(first)),
            "backbone": _backbone(cells, records),
            **{k: row.variant.get(k) for k in variants(grid)},
            "seeds": len(runs),
            "delta_m_std": _std([n["delta_m"] for n in numbers]),
            **{k: _mean([n[k] for n in numbers]) for k in ("sparsity", *NUMBERS) if k != "delta_m_std"},
        }
        more = list(dict.fromkeys(k for n in numbers for k in n if k not in ("sparsity", *NUMBERS)))
        line |= {k: _mean([n[k] for n in numbers]) for k in more}
        extras |= dict.fromkeys(more)
        for name in dict.fromkeys(k for m in metrics for k in m):
            values = [m.get(name, math.nan) for m in metrics]
            line |= {name: _mean(values), f"{name}_std": _std(values)}
        lines.append(line)
    columns = ["method", "sparsity", "tasks", "backbone", *variants(grid), "seeds", *NUMBERS]
    columns += [*(c for name in names for c in (name, f"{name}_std")), *extras]
    return pd.DataFrame(lines, columns=columns)
