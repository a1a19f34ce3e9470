"""Delivered: the files of a grid's models by runtime and precision, as plain JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from experiments import devices, plots, render
from experiments.cell import Cell
from experiments.delivery import Delivery
from experiments.grid import Grid
from experiments.report.table import Json, Source, axes, bottom, cell, column, coordinates, finite, styles
from experiments.results import Records, variants

# Column of devices.by_file to heading, factor, digits.
SHOWN: dict[str, tuple[str, float, int]] = {
    "file_bytes": ("MB", 1e-6, 2),
    "latency_ms": ("ms, median", 1.0, 2),
    "latency_p95_ms": ("ms, p95", 1.0, 2),
    "latency_ratio": ("of dense", 1.0, 3),
    "latency_low": ("lowest round", 1.0, 3),
    "latency_high": ("highest round", 1.0, 3),
    "peak_bytes": ("peak MB", 1e-6, 0),
}


def table(grid: Grid, records: Records, deliveries: Mapping[str, Delivery], source: Source) -> Json | None:
    """A row per model, runtime and precision of a grid that is told by file; None if no file is measured."""
    mine = {c.id: deliveries[c.id] for c in grid.cells() if c.id in deliveries}
    if not mine:
        return None
    found = [(row, line) for row in grid.rows for line in _lines(replace(grid, rows=(row,)), records, mine)]
    names = [line["label"] for _, line in found]
    colours = styles(names, [False] * len(names))
    identity = ["method", "tasks", "backbone", *variants(grid), "runtime", "precision"]
    rows = []
    for row, line in found:
        level = finite(line["sparsity"], 3)
        rows.append(
            {
                "label": line["label"],
                "style": colours[line["label"]],
                **{k: line[k] for k in ("method", "tasks", "backbone")},
                "level": level,
                "heading": render.heading(level if level is not None else math.nan),
                "state": "all",
                "seeds": str(int(line["seeds"])),
                "cells": {**{k: cell(None, plots.shown(line[k])) for k in identity}, **_numbers(line)},
                "x": coordinates({**line, "bytes": line["file_bytes"]}),
                "y": finite(line["delta_m"]),
                "std": finite(line["delta_m_std"]),
                "runs": [_run(r[0], mine[r[0].id], source) for r in row.runs if r[0].id in mine],
            }
        )
    heads = [column(k, k, text=True) for k in identity] + [column("seeds", "seeds"), column("delta_m", "Δm %")]
    return {
        "id": f"{grid.name}-files",
        "group": source.group,
        "title": f"{grid.title}: files as delivered",
        "caption": devices.how(mine),
        "how": ["Δm of fp32 files is the record's; int8 files were judged on the test set themselves."],
        "folder": source.folder,
        "columns": [*heads, *(column(k, label) for k, (label, _, _) in SHOWN.items())],
        "rows": rows,
        "axes": axes(rows),
        "bottom": bottom(rows),
        "recovery": [],
        "networks": [],
        "layers": [],
        "overlaps": [],
    }


def _lines(grid: Grid, records: Records, deliveries: Mapping[str, Delivery]) -> list[Json]:
    """The measured lines of a grid of one row, each with its label."""
    frame = devices.by_file(grid, records, deliveries)
    frame = frame[frame["runtime"].notna()].reset_index(drop=True)
    names = plots.labels(frame.drop(columns=[*devices.FORMS, "file_bytes", "peak_bytes"]))
    lines = [{str(k): v for k, v in line.items()} for line in frame.to_dict("records")]
    return [{**x, "label": f"{n}, {x['runtime']} {x['precision']}"} for n, x in zip(names, lines, strict=True)]


def _numbers(line: Json) -> dict[str, Json]:
    """The cells of numbers."""
    spread = "" if math.isnan(line["delta_m_std"]) else f" ± {render.number(line['delta_m_std'])}"
    found = {
        "seeds": cell(int(line["seeds"]), str(int(line["seeds"]))),
        "delta_m": cell(finite(line["delta_m"]), render.number(line["delta_m"]) + spread),
    }
    for key, (_, scale, digits) in SHOWN.items():
        found[key] = cell(finite(line[key] * scale), render.number(line[key] * scale, digits))
    return found


def _run(run: Cell, delivery: Delivery, source: Source) -> Json:
    """The delivery behind a row."""
    timed = f"timed with {delivery.reference}, {delivery.threads} thread, load {delivery.load:.2f}"
    blank = dict.fromkeys(("commit", "ended", "score", "train", "memory", "weights", "start"), "")
    record = {**blank, "id": run.id, "budget": timed, "machine": str(delivery.machine.get("processor", ""))}
    return {
        "seed": run.seed,
        "y": None,
        "text": "",
        "x": {},
        "records": [record],
        "missing": [],
        "commands": [source.command(run.id, True)],
    }
