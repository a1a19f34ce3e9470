"""Curves: how fast models for new tasks adapt, as tables of steps, areas and pairwise differences.

The change is Delta_m against the unpruned model of the same task and seed at the end of its own adaptation. Each
metric's change is clipped to [-100, 100] %, because an error that is small to begin with can grow many times before the
first step. The area is the mean of that curve over the steps (by trapezoids): 0 = at once as good as the unpruned
model in the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cut.records import Record
from experiments.cell import Cell
from experiments.grid import Grid, Row
from experiments.newtask import ALL, DEFAULT, RANDOM, SIMILAR, UNPRUNED
from experiments.render import caption, number, write_formats
from experiments.results import Records, collect, costs, delta, variants
from experiments.selection import epoch_metrics
from experiments.typeset import Table, Text, markdown

CLIP = 100.0
FACTS = ("head_seconds", "ready_seconds", "ready_memory")


def area(steps: Sequence[float], values: Sequence[float]) -> float:
    """The mean of a curve over its steps, by trapezoids.

    Example:
        >>> area([0, 20, 100], [-100.0, -20.0, 0.0])
        -20.0
    """
    return float(np.trapezoid(values, steps) / (steps[-1] - steps[0]))


def _line(cell: Cell, record: Record, dense: Record | None, variant: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A run's points: one line a step."""
    task, points = cell.tasks[0], record.newtask.get("curve", [])
    reference = {} if dense is None else dense.metrics["test"]
    found = []
    for point in points:
        metrics = epoch_metrics(point, "test")
        change = [delta(metrics, reference, record.higher_is_better, clip) for clip in (None, CLIP)]
        own = {k.partition("/")[2]: v for k, v in metrics.items()}
        found.append({"step": point["step"], "delta_m": change[0], "delta_m_bounded": change[1], **own})
    told: dict[str, Any] = {"method": cell.method, **variant, "task": task, "seed": cell.seed}
    told |= {k: record.newtask.get(k, math.nan) for k in FACTS}
    told |= {"sparsity": record.sparsity.get("kept", 0.0), **{k: costs(record)[k] for k in ("params", "bytes")}}
    told["area"] = area([p["step"] for p in found], [p["delta_m_bounded"] for p in found]) if found else math.nan
    return [{**told, **point} for point in found]


def points(grid: Grid, records: Records) -> pd.DataFrame:
    """A line per run and step.

    Args:
        grid: A table of new tasks.
        records: Id of a cell to its record.

    Returns:
        ``method``, the grid's variant columns, ``task``, ``seed``, seconds and bytes until the sub-network was ready
        (:class:`experiments.adaptation.Adaptation`), ``sparsity``, ``params``, ``bytes``, ``area``, ``step``,
        ``delta_m``, ``delta_m_bounded`` in percent, then metrics without the task's name.
    """
    lines: list[dict[str, Any]] = []
    for row in grid.rows:
        variant = {k: row.variant.get(k, "") for k in variants(grid)}
        for cell in (c for run in row.runs for c in run if c.id in records):
            dense = grid.against.get(cell.id)
            lines += _line(cell, records[cell.id], records.get(dense.id) if dense else None, variant)
    first = ["method", *variants(grid), "task", "seed", *FACTS, "sparsity", "params", "bytes"]
    first += ["area", "step", "delta_m", "delta_m_bounded"]
    names = list(dict.fromkeys(k for line in lines for k in line if k not in first))
    return pd.DataFrame(lines, columns=[*first, *names])


def runs(frame: pd.DataFrame) -> pd.DataFrame:
    """A line per run, with the bounded change after each step in columns ``0``, ``20``, ..."""
    lines = []
    for _, part in frame.groupby(_keys(frame), sort=False, dropna=False):
        steps = {str(s): v for s, v in zip(part["step"], part["delta_m_bounded"], strict=True)}
        last: dict[str, Any] = {str(k): v for k, v in part.iloc[-1].items()}
        lines.append(last | steps)
    return pd.DataFrame(lines, columns=None if lines else frame.columns)


def _keys(frame: pd.DataFrame) -> list[str]:
    """The columns that tell runs apart."""
    columns = list(frame.columns)
    return columns[: columns.index("seed") + 1]


def chosen(found: pd.DataFrame, method: str, **variant: str) -> pd.DataFrame:
    """The runs of a method and variant."""
    here = found["method"] == method
    for key, value in variant.items():
        here &= found[key] == value
    return found[here]


def spread(found: pd.DataFrame, column: str) -> tuple[float, float]:
    """Mean over tasks, and the standard deviation over tasks, of the means over seeds; NaN without runs."""
    if found.empty or column not in found:
        return math.nan, math.nan
    means = found.groupby("task", sort=False)[column].mean().dropna()
    return (float(means.mean()) if len(means) else math.nan, float(means.std(ddof=1)) if len(means) > 1 else math.nan)


def paired(ours: pd.DataFrame, theirs: pd.DataFrame, column: str = "area") -> tuple[float, float, int, int]:
    """Mean and standard deviation of the difference over tasks and seeds, wins of ours, and pairs."""
    key = ["task", "seed"]
    both = ours.set_index(key)[column].to_frame("a").join(theirs.set_index(key)[column].to_frame("b"), how="inner")
    differences = (both["a"] - both["b"]).dropna()
    if not len(differences):
        return math.nan, math.nan, 0, 0
    std = float(differences.std(ddof=1)) if len(differences) > 1 else math.nan
    return float(differences.mean()), std, int((differences > 0).sum()), len(differences)


def shown(mean: float, std: float, digits: int = 1) -> str:
    """A mean with its spread."""
    return number(mean, digits) + ("" if math.isnan(std) else f" ± {number(std, digits)}")


# ------------------------------------------------------------------------------------------------------ tables


def _name(row: Row) -> str:
    """A row's name in tables; the default similarity is not named."""
    change = row.variant.get("change", "")
    return f"{row.method} ({change})" if change not in ("", DEFAULT) else row.method


def _settings(grid: Grid) -> list[dict[str, str]]:
    """Models and budgets, in the order of the rows."""
    found = [
        {k: r.variant[k] for k in ("model", "budget") if r.variant.get(k)} for r in grid.rows if r.method != UNPRUNED
    ]
    return [dict(pairs) for pairs in dict.fromkeys(tuple(f.items()) for f in found)]


def _of(grid: Grid, setting: Mapping[str, str]) -> list[Row]:
    """The rows of a setting, the unpruned model's first."""
    whole = [r for r in grid.rows if r.method == UNPRUNED and r.variant.get("model") == setting.get("model")]
    rest = [r for r in grid.rows if r.method != UNPRUNED and all(r.variant.get(k) == v for k, v in setting.items())]
    return [*whole, *rest]


def of_method(grid: Grid, found: pd.DataFrame, method: str, variant: Mapping[str, str]) -> pd.DataFrame:
    """The runs of the row of a method; what the variant leaves out is the row's without it.

    Raises:
        ValueError: If not exactly one row is meant.
    """
    rows = [
        r
        for r in grid.rows
        if r.method == method
        and all(r.variant.get(k, "") == v for k, v in variant.items())
        and r.variant.get("change", "") in (variant.get("change", ""), *([DEFAULT] if "change" not in variant else []))
    ]
    if len(rows) != 1:
        asked = ", ".join(f"{k}={v}" for k, v in variant.items())
        raise ValueError(f"grid {grid.name!r} has {len(rows)} rows of {method!r} {asked}; name one")
    return _found(rows[0], found, grid) if len(found) else found


def _found(row: Row, found: pd.DataFrame, grid: Grid) -> pd.DataFrame:
    return chosen(found, row.runs[0][0].method, **{k: row.variant.get(k, "") for k in variants(grid)})


def _ran(row: Row, found: pd.DataFrame) -> str:
    planned = sum(len(run) for run in row.runs)
    return str(planned) if len(found) == planned else f"{len(found)} of {planned}"


def title(setting: Mapping[str, str]) -> str:
    """A setting as a heading."""
    return ", ".join(setting.values())


def by_step(grid: Grid, frame: pd.DataFrame, setting: Mapping[str, str]) -> Table:
    """Change after each step, area, and what it took until the sub-network was ready: a row per method."""
    found, steps = runs(frame), _steps(grid)
    body = []
    for row in _of(grid, setting):
        mine = _found(row, found, grid) if len(found) else found
        cells = [shown(*spread(mine, str(s))) for s in steps] + [shown(*spread(mine, "area"))]
        ready = [(spread(mine, "ready_seconds")[0], 1), (spread(mine, "ready_memory")[0] / 2**20, 0)]
        cells += [number(*value) for value in ready] + [_ran(row, mine)]
        body.append([Text(_name(row)), *map(Text, cells)])
    heads = ["method", *(f"after {s} steps" for s in steps), "area", "s to ready", "MiB to ready", "runs"]
    return Table(f"{grid.title}: {title(setting)}", heads, body, 1)


def by_task(grid: Grid, frame: pd.DataFrame, setting: Mapping[str, str]) -> Table:
    """Area by task, mean over seeds: a row per method."""
    found = runs(frame)
    tasks = list(dict.fromkeys(c.tasks[0] for c in grid.rows[0].runs[0]))
    body = []
    for row in _of(grid, setting):
        mine = _found(row, found, grid) if len(found) else found
        means = [float(mine.loc[mine["task"] == t, "area"].mean()) if len(mine) else math.nan for t in tasks]
        body.append([Text(_name(row)), *(Text(number(m, 1)) for m in means)])
    return Table(f"{grid.title}: area by task, {title(setting)}", ["method", *tasks], body, 1)


def matters(grid: Grid, frame: pd.DataFrame) -> Table:
    """Does similarity matter? The area of each measure's neighbours minus that of random ones and of all."""
    found = runs(frame)
    body = []
    for setting in _settings(grid):
        rows = _of(grid, setting)
        for row in (r for r in rows if r.method == SIMILAR):
            cells = []
            for control in (RANDOM, ALL):
                other = next(r for r in rows if r.method == control)
                cells.append(_difference(row, other, found, grid))
            body.append([Text(title(setting)), Text(row.variant.get("change") or DEFAULT), *map(Text, cells)])
    heads = ["setting", "neighbours by", "minus random neighbours", "minus all"]
    return Table(f"{grid.title}: does similarity matter", heads, body, 2)


def _difference(row: Row, other: Row, found: pd.DataFrame, grid: Grid) -> str:
    if found.empty:
        return number(math.nan)
    return told(*paired(_found(row, found, grid), _found(other, found, grid)))


def told(mean: float, std: float, wins: int, count: int) -> str:
    """A difference over pairs, as :func:`paired` gives it."""
    return number(mean) if not count else f"{'+' * (mean > 0)}{shown(mean, std)} ({wins} of {count} better)"


def _steps(grid: Grid) -> list[int]:
    """The steps that the runs look at."""
    callbacks = grid.rows[0].runs[0][0].config["trainer"]["callbacks"]
    return list(next(c["init_args"]["at"] for c in callbacks if "at" in c.get("init_args", {})))


def tables(grid: Grid, frame: pd.DataFrame) -> list[Table]:
    """Whether similarity matters, then each setting by step, then by task."""
    settings = _settings(grid)
    return [
        matters(grid, frame),
        *(by_step(grid, frame, s) for s in settings),
        *(by_task(grid, frame, s) for s in settings),
    ]


HOW = (
    "Change in % against the unpruned model of the same task and seed after its last step, each metric's clipped to "
    "±100 %: mean over tasks of means over seeds ± standard deviation over tasks. Area: mean of the change over the "
    "steps. Differences of areas: mean ± standard deviation over pairs of task and seed. s and MiB to ready: from the "
    "new task's arrival, head included, to the cut model."
)


def page(grid: Grid, frame: pd.DataFrame, records: Records) -> str:
    """All tables as a Markdown page."""
    parts = [f"# {grid.title}", HOW, caption(grid, records)]
    for table in tables(grid, frame):
        parts += [f"## {table.title.removeprefix(grid.title + ': ')}", markdown(table)]
    return "\n\n".join(p.rstrip("\n") for p in parts) + "\n"


def write(grid: Grid, records: str | Path, out: str | Path) -> list[Path]:
    """Write ``<grid>.md``, ``.csv`` (:func:`points`) and ``.tex``, each whole or not at all.

    Raises:
        ValueError: If a record is damaged.
    """
    found = collect(grid, records)
    frame = points(grid, found)
    said = f"{HOW} {caption(grid, found)}"
    return write_formats(grid, out, page(grid, frame, found), frame, tables(grid, frame), said)


def drawn(grid: Grid, frame: pd.DataFrame) -> pd.DataFrame:
    """Points for :func:`experiments.plots.recovery`: a panel per setting, a line per method."""
    found, lines = runs(frame), []
    for setting in _settings(grid):
        for row in _of(grid, setting):
            mine = _found(row, found, grid) if len(found) else found
            for step in _steps(grid):
                mean, std = spread(mine, str(step))
                told = {"panel": title(setting), "label": _name(row), "steps": step}
                lines.append({**told, "delta_m": mean, "delta_m_std": std})
    columns = ["panel", "label", "steps", "delta_m", "delta_m_std"]
    result = pd.DataFrame(lines, columns=columns)
    return result[result["delta_m"].notna()]
