"""Targets: what a table of equal latencies says to what it was made to show, with a verdict for each comparison."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import pandas as pd

from cut.records import Record
from experiments.devices import aimed
from experiments.grid import Grid
from experiments.render import MISSING, number
from experiments.results import Records, is_dense
from experiments.typeset import Table, Text, markdown

Lines = dict[tuple[str, str, float, str], dict[str, Any]]
Places = dict[tuple[str, float], dict[str, dict[str, Any]]]


def lines(grid: Grid, files: pd.DataFrame) -> Lines:
    """Backbone, kept tasks, latency and method to the numbers of each row that is cut to a latency, or is dense.

    They are those of the file whose latency was aimed at.

    Args:
        grid: The table.
        files: As :func:`experiments.devices.by_file` gives it.
    """
    found: Lines = {}
    for at, rows in files.groupby(level=0):
        row = grid.rows[int(at)]  # type: ignore[call-overload]
        main, latency = aimed(rows), float(row.variant["latency"])
        one = (main if len(main) else rows).iloc[0]
        if latency < 1 or is_dense(row.runs[0][0]):
            found[str(one["backbone"]), str(one["tasks"]), latency, row.method] = {str(k): v for k, v in one.items()}
    return found


def against(found: Lines, ours: Sequence[str], rivals: Sequence[str]) -> Table:
    """Delta_m of each method at each latency, with the share of the dense latency that it really takes.

    Files miss the latency that was aimed at by some per cent, so ours are judged at the latency that each rival really
    takes: by the straight lines through their own files' Delta_m, which begin at the dense model and go on below the
    fastest file.

    Args:
        found: As :func:`lines` gives it.
        ours: Our methods, which are judged.
        rivals: What they are judged against.

    Returns:
        A row per backbone, kept tasks and latency. The last column names those of ours whose Delta_m is above every
        rival's at that one's latency, and is missing while a number is; bold is the highest as they are.
    """
    head = ["network, kept tasks", "aim", *ours, *rivals, "above every rival"]
    body = []
    places = _places(found)
    for place, by in places.items():
        means = {m: by[m]["delta_m"] if m in by else math.nan for m in (*ours, *rivals)}
        if not any(m in by for m in rivals):
            continue
        curves = {m: _curve(places, place[0], m) for m in ours}
        known = {m: x for m, x in means.items() if not math.isnan(x)}
        cells = [Text(_told(by.get(m)), bool(known) and means[m] == max(known.values())) for m in (*ours, *rivals)]
        body.append([Text(place[0]), Text(f"{place[1]:g}"), *cells, Text(_above(by, curves, rivals))])
    return Table("At equal latency", head, body, 1)


def _places(found: Lines) -> Places:
    """Network with its kept tasks, and latency, to method to numbers."""
    by: Places = {}
    for (backbone, tasks, latency, method), line in found.items():
        by.setdefault((f"{backbone}, {tasks.replace('+', ', ')}", latency), {})[method] = line
    return by


def _told(line: dict[str, Any] | None) -> str:
    if line is None:
        return "-"
    text, share = number(line["delta_m"]), line["latency_ratio"]
    return text if text == MISSING or math.isnan(share) else f"{text} ({number(share)})"


def _curve(places: Places, name: str, method: str) -> list[tuple[float, float]]:
    """Share of the dense latency and Delta_m of a method's files, the dense model's first; empty while one lacks."""
    mine = [(latency, by) for (where, latency), by in places.items() if where == name]
    own = [by.get(method, {}) if latency < 1 else next(iter(by.values())) for latency, by in mine]
    points = [(line.get("latency_ratio", math.nan), line.get("delta_m", math.nan)) for line in own]
    if len(points) < 2 or any(math.isnan(x) for point in points for x in point):
        return []
    return sorted(points, reverse=True)


def _at(curve: Sequence[tuple[float, float]], share: float) -> float:
    """What a curve says of a share: on the line through the points on its sides, or the last two if it is below all.

    Example:
        >>> curve = [(1.0, 0.0), (0.5, -4.0), (0.4, -10.0)]
        >>> _at(curve, 0.75), _at(curve, 0.5), round(_at(curve, 0.35), 6)
        (-2.0, -4.0, -13.0)
    """
    below = next((i for i, (x, _) in enumerate(curve) if x <= share), len(curve) - 1)
    (x0, y0), (x1, y1) = curve[max(below, 1) - 1], curve[max(below, 1)]
    return y1 + (y0 - y1) * (min(share, curve[0][0]) - x1) / ((x0 - x1) or math.inf)


def _above(by: dict[str, Any], curves: dict[str, list[tuple[float, float]]], rivals: Sequence[str]) -> str:
    """Which of ours are above all rivals; unknown while one of ours or a rival is."""
    theirs = [(by[m]["latency_ratio"], by[m]["delta_m"]) for m in rivals if m in by]
    if len(theirs) < len(rivals) or not all(curves.values()) or any(math.isnan(x) for point in theirs for x in point):
        return MISSING
    return ", ".join(m for m, mine in curves.items() if all(_at(mine, x) > y for x, y in theirs)) or "none"


def dropped(found: Lines, methods: Sequence[str], few: str, many: str) -> Table:
    """What the tasks that stay gain or lose by the tasks that are dropped with them.

    Args:
        found: As :func:`lines` gives it.
        methods: Whose models are compared.
        few: The smaller selection, its tasks joined by ``+``.
        many: The larger one.

    Returns:
        A row per backbone, method and latency: Delta_m over the tasks of ``few`` with and without the other ones, the
        difference, and both files' latency in milliseconds. The shares of the latency are of each selection's own
        dense model.
    """
    tasks = few.split("+")
    gone = ", ".join(t for t in many.split("+") if t not in tasks)
    head = ["network", "method", "aim", f"Δm % with {gone}", "without", "difference", f"ms with {gone}", "without"]
    body = []
    for (backbone, selection, latency, method), less in found.items():
        more = found.get((backbone, many, latency, method))
        if selection != few or method not in methods or more is None:
            continue
        with_, without = (statistics.fmean(x.get(f"delta_m/{t}", math.nan) for t in tasks) for x in (more, less))
        cells = [number(with_), number(without), number(without - with_)]
        cells += [number(x["latency_ms"], 1) for x in (more, less)]
        body.append([Text(c) for c in (backbone, method, f"{latency:g}", *cells)])
    return Table("Dropping a task", head, body, 2)


def hours(grid: Grid, records: Records) -> Table:
    """What the runs of a table took, dense ones included: hours of one core, as every run has one.

    Args:
        grid: The table.
        records: By id, those that there are.

    Returns:
        A row per backbone, and one for all: number of runs, hours of scoring, fitting and cutting, hours of training.
    """
    by: dict[str, list[Record]] = {}
    for record in (records[c.id] for c in grid.cells() if c.id in records):
        by.setdefault(record.backbone, []).append(record)
    by["all"] = [r for found in by.values() for r in found]
    body = []
    for name, found in by.items():
        took = (sum(getattr(r, key) for r in found) / 3600 for key in ("score_seconds", "finetune_seconds"))
        body.append([Text(name), Text(str(len(found))), *(Text(number(x, 1)) for x in took)])
    return Table("Hours", ["network", "runs", "hours of scoring, fitting, cutting", "hours of training"], body, 1)


def told(grid: Grid, files: pd.DataFrame, ours: Sequence[str], rivals: Sequence[str], few: str, many: str) -> str:
    """Both tables as Markdown; says so while nothing is measured."""
    found = lines(grid, files)
    first, second = against(found, ours, rivals), dropped(found, ours, few, many)
    if not first.body:
        return "Not measured yet: `make table-edge` makes these runs.\n"
    parts = [
        markdown(first),
        "Mean Δm % over the seeds, in parentheses the share of the dense model's latency that the file takes (ONNX "
        "Runtime, fp32); bold: the highest. Files miss the aim by some per cent, so the last column judges ours at the "
        "latency that each rival really takes, on straight lines through our files and the dense model.\n",
        markdown(second),
        f"Δm % over {few.replace('+', ' and ')} only; each selection is cut to a share of its own dense latency.\n",
    ]
    return "\n".join(parts)
