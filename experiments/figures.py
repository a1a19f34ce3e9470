"""Figures: records to ``docs/figures/``, as SVG and PNG; what no record can fill is left out and named.

python -m experiments.figures --records experiments/records/rooms --out docs/figures
"""

from __future__ import annotations

import argparse
import io
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from cut.files import write_atomically
from cut.records import Record
from experiments import curves, delivery, devices, plots
from experiments.grid import Grid
from experiments.grids import GRIDS
from experiments.refusal import refusing
from experiments.results import Records, collect, delta, levels, tidy, variants
from experiments.selection import epoch_metrics

ROOT = Path(__file__).parent.parent
LEVEL = 0.9  # the sparsity that figures of one level show
WATERSHED = "cut"  # the method whose tasks' masks are compared
# What the figure of layers shows, if it has records: more lines than these hide each other.
LAYERED = ("magnitude", "magnitude-erk", "disparse", "cut", "cut-plus")


def _at_level(grid: Grid, records: Records, level: float = LEVEL) -> dict[str, list[Record]]:
    """Label to the records of the rows at a level, single models only, of the first kept tasks and backbone."""
    frame = tidy(grid, records)
    found: dict[str, list[Record]] = {}
    for row, name, at in zip(grid.rows, plots.labels(frame), levels(grid, frame), strict=True):
        runs = [records[r[0].id] for r in row.runs if len(r) == 1 and r[0].id in records]
        if abs(at - level) < 0.0025 and runs:
            found[name] = runs
    kinds = [(r.tasks, r.backbone) for runs in found.values() for r in runs]
    return {name: runs for name, runs in found.items() if (runs[0].tasks, runs[0].backbone) == kinds[0]}


def swept_recovery(grid: Grid, records: Records) -> pd.DataFrame:
    """Points for a recovery figure from rows of different ``steps``: panels by floor, lines by method and rate."""
    frame = tidy(grid, records)
    if "steps" not in variants(grid):
        return frame.iloc[:0]
    rest = [k for k in variants(grid) if k not in ("steps", "floor")]
    told = [
        ", ".join([str(r["method"])] + [f"{k} {plots.shown(r[k])}" for k in rest if not pd.isna(r[k])])
        for _, r in frame.iterrows()
    ]
    of = [f"{100 * x:g} % sparsity" if x > 0 else "dense" for x in levels(grid, frame)]
    floors = [f", floor {x:g}" if not pd.isna(x) else "" for x in frame.get("floor", [math.nan] * len(frame))]
    frame = frame.assign(panel=[a + b for a, b in zip(of, floors, strict=True)], label=told)
    return frame[frame["delta_m"].notna() & frame["steps"].notna()]


def tracked_recovery(grid: Grid, records: Records, level: float = LEVEL) -> pd.DataFrame:
    """Points for a recovery figure from the epochs of the runs at a level that looked at the test set."""
    lines = []
    for name, runs in _at_level(grid, records, level).items():
        for run in (r for r in runs if r.start in records):
            dense = records[run.start].metrics["test"]
            for entry in run.history:
                metrics = {k: v for k, v in epoch_metrics(entry, "test").items() if k.split("/")[0] in run.tasks}
                if metrics and "step" in entry:
                    change = delta(metrics, dense, run.higher_is_better)
                    lines.append({"label": name, "steps": entry["step"], "delta_m": change})
    if not lines:
        return pd.DataFrame(columns=["panel", "label", "steps", "delta_m", "delta_m_std"])
    means = pd.DataFrame(lines).groupby(["label", "steps"], sort=False)["delta_m"].agg(["mean", "std"]).reset_index()
    means = means.rename(columns={"mean": "delta_m", "std": "delta_m_std"})
    return means.assign(panel=f"{100 * level:g} % sparsity")


def _against(x: str) -> Callable[[Grid, Records], Figure | None]:
    def draw(grid: Grid, records: Records) -> Figure | None:
        frame = tidy(grid, records)
        return plots.against(frame, x) if frame["delta_m"].notna().any() else None

    return draw


def _layers(grid: Grid, records: Records) -> Figure | None:
    found = {name: runs for name, runs in _at_level(grid, records).items() if runs[0].layer_sparsity}
    chosen = {name: runs for name, runs in found.items() if name in LAYERED} or found
    return plots.layers(chosen, list(found)) if found else None


def _watershed(grid: Grid, records: Records) -> Figure | None:
    found = [r for runs in _at_level(grid, records).values() for r in runs if r.method == WATERSHED and r.mask_overlap]
    return plots.watershed(found) if found else None


def _swept(grid: Grid, records: Records) -> Figure | None:
    points = swept_recovery(grid, records)
    return None if points.empty else plots.recovery(points)


def _tracked(grid: Grid, records: Records) -> Figure | None:
    points = tracked_recovery(grid, records)
    return None if points.empty else plots.recovery(points)


def _delivered(x: str) -> Callable[[Grid, Records], Figure | None]:
    """Delta_m of fp32 files against what they take, a line per method."""

    def draw(grid: Grid, records: Records) -> Figure | None:
        files = devices.by_file(grid, records, delivery.collect(grid))
        files = devices.aimed(files)
        files = files.drop(columns=variants(grid)) if files["latency_ratio"].notna().any() else files.iloc[:0]
        return plots.against(files, x, clip=False) if files["delta_m"].notna().any() else None

    return draw


def _adapting(grid: Grid, records: Records) -> Figure | None:
    """How fast models for new tasks adapt: the mean over tasks after each step, a line per method."""
    found = curves.drawn(grid, curves.points(grid, records))
    return None if found.empty else plots.recovery(found)


# A figure's name, then the grids that can fill it, the first that has records does.
FIGURES: dict[str, list[tuple[str, Callable[[Grid, Records], Figure | None]]]] = {
    "sparsity": [("rooms", _against("sparsity"))],
    "size": [("rooms", _against("nonzero"))],
    "layers": [("rooms", _layers)],
    "watershed": [("rooms", _watershed)],
    "recovery": [("recovery", _swept), ("rooms", _tracked)],
    "latency": [("edge", _delivered("latency_ratio"))],
    "megabytes": [("edge", _delivered("file_bytes"))],
    "newtask": [("newtask", _adapting)],
    "newtask-groups": [("newtask-groups", _adapting)],
    "fashion-mnist": [("fashion-mnist", _against("sparsity"))],
}


def save(figure: Figure, path: Path) -> None:
    """Write a figure as ``.svg`` and ``.png`` next to each other, the same bytes for the same figure."""
    with mpl.rc_context(plots.STYLE):
        for kind, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
            content = io.BytesIO()
            figure.savefig(content, format=kind, metadata=metadata)
            write_atomically(path.with_name(f"{path.name}.{kind}"), content.getvalue())


@refusing
def main(argv: Sequence[str] | None = None) -> int:
    """Draw what there are records for; 2 for damaged records."""
    parser = argparse.ArgumentParser(prog="python -m experiments.figures", description="Draw figures from records.")
    parser.add_argument("--records", type=Path, help="default: each grid's folder in experiments/records")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/figures")
    args = parser.parse_args(argv)
    wanted = dict.fromkeys(g for sources in FIGURES.values() for g, _ in sources)
    grids = {name: GRIDS[name]() for name in wanted if name in GRIDS}
    kept = ROOT / "experiments/records"
    records = {name: collect(grid, args.records or kept / grid.folder) for name, grid in grids.items()}
    for name, sources in FIGURES.items():
        drawn = (draw(grids[g], records[g]) for g, draw in sources if g in grids)
        figure = next((f for f in drawn if f is not None), None)
        if figure is None:
            print(f"skipped {name}: no records for it; run the grid {' or '.join(repr(g) for g, _ in sources)}")
        else:
            save(figure, args.out / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
