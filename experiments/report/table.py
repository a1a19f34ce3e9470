"""Table: a grid as plain JSON: texts to show, numbers to sort and plot by, and the runs behind each row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from cut.records import Record
from experiments import plots, render
from experiments.cell import Cell
from experiments.grid import Grid, Row
from experiments.render import Column
from experiments.report import views
from experiments.results import Records, levels, tidy

BOUNDED = Column("delta_m_bounded", "Δm bounded %")
# What Delta_m is drawn against: label, and the factor on the frame's number. A share that stays has its own scale.
STAYS = "stays"
AXES: dict[str, tuple[str, float]] = {
    "nonzero": plots.AXES["nonzero"],
    "params": ("parameters in millions", 1e-6),
    "bytes": ("bytes on disk in MB", 1e-6),
    "macs": ("multiply-accumulates in millions", 1e-6),
    "latency_ms": ("median latency in ms", 1.0),
}
SHORT = {
    STAYS: "sparsity",
    "nonzero": "non-zeros",
    "params": "parameters",
    "bytes": "bytes",
    "macs": "MACs",
    "latency_ms": "latency",
}
Json = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Where a table's records are and how its runs are made again.

    Attributes:
        group: What the table is listed under.
        folder: Of the records, as a reader of the repository names it.
        command: Id of a run, and whether it has a record, to the command that makes it (again).
    """

    group: str
    folder: str
    command: Callable[[str, bool], str]


def finite(value: Any, digits: int = 6) -> float | None:
    """A number for JSON, None for NaN and for what is missing."""
    return None if value is None or math.isnan(value) else round(float(value), digits)


def cell(value: float | None, text: str, bold: bool = False, note: str = "", tone: str = "") -> Json:
    """One cell: what to sort by, what to show, and a smaller line (``tone`` is ``good`` or ``bad``)."""
    found: Json = {"v": value, "t": text}
    return found | ({"b": True} if bold else {}) | ({"n": note} if note else {}) | ({"tone": tone} if tone else {})


def column(key: str, label: str, text: bool = False, better: bool | None = None) -> Json:
    """One column: its key in the rows' cells and its heading; ``better`` says whether higher is."""
    return {"key": key, "label": label, "text": text, "better": better}


def coordinates(line: Mapping[Any, Any]) -> dict[str, float | None]:
    """Where a row or a run stands on each of the axes, in their units.

    Example:
        >>> coordinates({"sparsity": 0.9, "params": 2e6})[STAYS], coordinates({"params": 2e6})["params"]
        (10.0, 2.0)
    """
    found = {key: finite(line.get(key, math.nan) * scale) for key, (_, scale) in AXES.items()}
    return {STAYS: finite(100 * (1 - line.get("sparsity", math.nan)), 4), **found}


def axes(rows: Sequence[Json]) -> list[Json]:
    """The axes that some row with a Delta_m has a place on, and the ticks that stand for sparsities."""
    known = [r for r in rows if r["y"] is not None]
    found: list[Json] = []
    for key, short in SHORT.items():
        if any(r["x"][key] is not None for r in known):
            label = AXES[key][0] if key in AXES else plots.AXES["sparsity"][0]
            found.append({"key": key, "label": label, "short": short, "log": key != "latency_ms"})
    ticks = sorted({r["level"] for r in known if r["level"] is not None})
    for axis in found:
        if axis["key"] == STAYS:
            axis |= {"ticks": [finite(100 * (1 - t), 4) for t in ticks], "names": [f"{100 * t:g}" for t in ticks]}
    return found


def bottom(rows: Sequence[Json]) -> float | None:
    """Where the axis of Delta_m ends unless all is asked for; see :func:`experiments.plots.floor`."""
    values = [r["y"] for r in rows if r["y"] is not None]
    return finite(plots.floor(values)) if values else None


def styles(names: Sequence[str], last: Sequence[bool]) -> dict[str, int]:
    """Name to number of its colour and marker, in order of appearance; those marked ``last`` come last."""
    order = [n for n, late in zip(names, last, strict=True) if not late]
    return {name: i for i, name in enumerate(dict.fromkeys([*order, *names]))}


def told(record: Record) -> Json:
    """What a reader wants to know of a record: id, commit, when and where it was made, what it cost."""
    target = record.budget.get("target")
    budget = "" if target is None else f"target {target:g}, achieved {record.budget.get('achieved', math.nan):.6g}"
    return {
        "id": record.id,
        "commit": f"{record.commit[:10]}{'+' if record.dirty else ''}",
        "ended": record.time[:16].replace("T", " "),
        "budget": budget,
        "score": f"{record.score_seconds:.1f} s",
        "train": f"{record.finetune_seconds:.0f} s",
        "memory": f"{record.peak_memory / 1e9:.2f} GB",
        "machine": machine(record),
        "weights": record.weights_source,
        "start": record.start,
    }


def machine(record: Record) -> str:
    """Processor and versions in words."""
    known = record.machine
    parts = [f"{known['processor']}, {known.get('cores', '?')} cores"] if known.get("processor") else []
    parts += [f"{p} {known[p]}" for p in ("python", "torch", "lightning", "timm") if p in known]
    return ", ".join(parts)


def _single(grid: Grid) -> Grid:
    """The grid with a row for each run of each row: what one seed gives by itself."""
    return replace(grid, rows=tuple(Row(r.method, (run,), r.variant, r.level) for r in grid.rows for run in r.runs))


def _run(cells: Sequence[Cell], line: Mapping[Any, Any], records: Records, source: Source) -> Json:
    """One seed of a row: its numbers, the records that they come from, and how to make it again."""
    y = finite(line["delta_m"])
    return {
        "seed": cells[0].seed,
        "y": y,
        "text": render.number(line["delta_m"]),
        "x": coordinates(line),
        "records": [told(records[c.id]) for c in cells if c.id in records],
        "missing": [c.id for c in cells if c.id not in records],
        "commands": [source.command(c.id, c.id in records) for c in cells],
    }


def _identity(line: Mapping[Any, Any], keys: Sequence[str]) -> dict[str, Json]:
    """The cells that tell rows apart."""
    found = {}
    for key in keys:
        value = line[key]
        empty = value is None or (isinstance(value, float) and math.isnan(value))
        number = value if isinstance(value, (int, float)) and not empty else None
        found[key] = cell(number, "" if empty else plots.shown(value))
    return found


def _texts(grid: Grid, frame: pd.DataFrame) -> tuple[list[Column], list[dict[str, Json]], list[str]]:
    """The columns of numbers, and for each row its cells and how many seeds it has."""
    columns: dict[str, Column] = {}
    cells: list[dict[str, Json]] = [{} for _ in range(len(frame))]
    seeds = [""] * len(frame)
    for level in render.steps(grid, frame):
        of_level = render.lines(grid, frame, level)
        for i, count in zip(of_level.rows, of_level.seeds, strict=True):
            seeds[i] = count
        for c, texts in zip(of_level.columns, of_level.texts, strict=True):
            columns.setdefault(c.name, c)
            for i, text in texts.items():
                value = finite(frame[c.name].iloc[i] * c.scale) if c.name in frame.columns else None
                cells[i][c.name] = cell(value, text.text, text.bold)
    for i, value in enumerate(frame[BOUNDED.name]):
        cells[i][BOUNDED.name] = cell(finite(value), render.number(value))
    for found in cells:  # another level's columns
        found |= {name: cell(None, render.NONE) for name in columns if name not in found}
    order = {c.name: k for k, c in enumerate(render.DETAILS)}
    dense = dense_only(columns, cells, levels(grid, frame))
    ordered = sorted(columns.values(), key=lambda c: (c.name in dense, order.get(c.name, len(order))))
    at = 1 + max((k for k, c in enumerate(ordered) if c.name.startswith("delta_m") and "/" not in c.name), default=-1)
    return [*ordered[:at], BOUNDED, *ordered[at:]], cells, seeds


def dense_only(columns: Iterable[str], cells: Sequence[Mapping[str, Json]], of: Sequence[float]) -> set[str]:
    """The columns that say nothing of a pruned row, such as metrics of dropped tasks: shown last."""
    pruned = [row for row, level in zip(cells, of, strict=True) if level != 0]
    return {c for c in columns if pruned and all(row[c]["t"] == render.NONE for row in pruned)}


def how(grid: Grid) -> list[str]:
    """How the numbers of a grid's rows were made, in sentences."""
    split = {"test": "the test set", "val": "the validation set: this table is there to choose something by"}[
        grid.split
    ]
    return [
        f"Metrics: {split}, {render.RULES[grid.selection].replace('**', '')}.",
        "Δm: each run against the dense record of the same seed on the same tasks; then mean ± standard deviation over "
        "seeds.",
    ]


def of_grid(grid: Grid, records: Records, source: Source) -> Json:
    """A grid as plain JSON.

    Args:
        grid: The table.
        records: Id of a cell to its record.
        source: Where they are.

    Returns:
        ``columns``; ``rows`` with ``cells`` by column key, the numbers for plots (``x``, ``y``, ``std``), ``state``
        (``all``, ``some`` or ``missing``) and ``runs``; ``axes`` and ``bottom`` of the plot; ``recovery``, ``layers``
        and ``overlaps`` (:mod:`experiments.report.views`). All numbers are those of :func:`experiments.results.tidy`.

    Raises:
        ValueError: If a record has no epoch that the grid's selection rule could choose.
    """
    frame, single = tidy(grid, records), tidy(_single(grid), records)
    names, of = plots.labels(frame), levels(grid, frame)
    colours = styles(names, [x == 0 for x in of])
    columns, cells, seeds = _texts(grid, frame)
    identity = render.lines(grid, frame, of[0]).identity if len(frame) else ["method"]
    rows, lines = [], iter(single.to_dict("records"))
    for i, line in enumerate(frame.to_dict("records")):
        row = grid.rows[i]
        found, planned = int(line["seeds"]), len(row.runs)
        rows.append(
            {
                "label": names[i],
                "style": colours[names[i]],
                "method": str(line["method"]),
                "tasks": str(line["tasks"]),
                "backbone": str(line["backbone"]),
                "level": finite(of[i]),
                "heading": render.heading(of[i]),
                "mine": str(line["method"]).startswith(views.OURS),
                "state": "all" if found == planned else "some" if found else "missing",
                "seeds": seeds[i],
                "cells": {
                    **_identity(line, identity),
                    "sparsity": cell(finite(line["sparsity"]), _sparsity(line["sparsity"], of[i])),
                    "seeds": cell(found, seeds[i]),
                    **cells[i],
                },
                "x": coordinates(line),
                "y": finite(line["delta_m"]),
                "std": finite(line["delta_m_std"]),
                "runs": [_run(run, next(lines), records, source) for run in row.runs],
            }
        )
    runs = [[records[r[0].id] for r in row.runs if len(r) == 1 and r[0].id in records] for row in grid.rows]
    heads = [column(k, k, text=True) for k in identity]
    heads += [column("sparsity", "sparsity %"), column("seeds", "seeds")]
    return {
        "id": grid.name,
        "group": source.group,
        "title": grid.title,
        "caption": render.caption(grid, records).replace("**", ""),
        "how": how(grid),
        "folder": source.folder,
        "columns": [*heads, *(column(c.name, c.heading, better=c.higher) for c in columns)],
        "rows": rows,
        "axes": axes(rows),
        "bottom": bottom(rows),
        "recovery": views.recovery(grid, records, colours),
        **views.by_layer(runs),
    }


def _sparsity(achieved: float, level: float) -> str:
    """What a row achieved; of one without records, what was asked for."""
    if math.isnan(achieved):
        return "" if math.isnan(level) else f"{100 * level:g} (asked for)"
    return f"{100 * achieved:.2f}"
