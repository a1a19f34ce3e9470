"""Findings: ``docs/results.md`` and others from their templates; every number in the prose comes from records.

The template is Jinja with three functions::

    {{ value("rooms", "cut", 0.9, "delta_m") }}         # "-3.12", or "missing" without a record
    {{ value("rooms", "cut", 0.9, "params", digits=1, scale=1e-6, tasks="seg+depth") }}
    {% if raw("rooms", "cut", 0.9, "delta_m") > -1 %}   # the number itself, NaN without a record
    {{ table("rooms") }}  {{ table("rooms", 0.9) }}     # Delta_m of all levels; all metrics at one
    {{ versus("rooms", "cut", "magnitude", 0.9, "delta_m/depth") }}      # "-0.71 ± 1.67": differences seed by seed
    {{ changed("rooms", "cut", 0.9, "seg/miou") }}      # "-13.78": a metric in percent of the dense model's
    {{ pruned("rooms", "cut", 0.9, "backbone") }}       # "91.9": percent removed of a component or layer
    {{ most_pruned("rooms", "cut", 0.9) }}              # the layer that loses most, and how much of it
    {% for rate, methods in choices(0.9).items() %}     # learning rates and the methods that chose them
    {{ inherited("methods") }}                          # which methods of a grid take whose learning rate

and, for tables of new tasks (:mod:`experiments.curves`)::

    {{ adapted("newtask", "similar-tasks", "area", budget="90%") }}          # "-7.1 ± 2.0", or "missing"
    {{ difference("newtask", "similar-tasks", "cut", budget="90%") }}        # "-1.2 ± 3.0 (4 of 12 better)"
    {% if gap("newtask", "similar-tasks", "cut", budget="90%") > 0 %}        # the mean itself, NaN without records
    {{ matters("newtask") }}  {{ steps("newtask", budget="90%") }}           # tables
    {{ table("newtask") }}                                                   # the caption
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from cut.files import write_atomically
from experiments import curves, render
from experiments.grid import Grid, Row
from experiments.grids import GRIDS
from experiments.recipe import RATES, VARIES, rates
from experiments.refusal import refusing
from experiments.results import Records, by_run, changes, collect, levels, tidy

ROOT = Path(__file__).parent.parent
# What `make results` renders: template to page.
PAGES = {ROOT / f"docs/{name}.template.md": ROOT / f"docs/{name}.md" for name in ("results", "newtask")}


def position(
    grid: Grid, frame: pd.DataFrame, method: str, sparsity: float, variant: dict[str, Any] | None = None
) -> int:
    """Which row of a grid is meant.

    Args:
        grid: The table.
        frame: Its tidy frame.
        method: Name in the table.
        sparsity: The row's target, 0 for dense; for a row without one, the achieved sparsity to the nearest 0.005.
        variant: What sets the row apart: variant columns, ``tasks`` or ``backbone``.

    Raises:
        ValueError: If not exactly one row is meant.
    """
    wanted = variant or {}
    for key in wanted:
        if key not in frame:
            raise ValueError(f"grid {grid.name!r} has no column {key!r}; it has {', '.join(frame.columns)}")
    same = [
        (i, level)
        for i, level in enumerate(levels(grid, frame))
        if frame["method"].iloc[i] == method and all(frame[k].iloc[i] == v for k, v in wanted.items())
    ]
    meant = [i for i, level in same if abs(level - sparsity) < 0.0025]
    meant = meant or [i for i, level in same if math.isnan(level)]  # known from its records, of which there are none
    if len(meant) != 1:
        told = ", ".join(f"{k}={v}" for k, v in wanted.items())
        raise ValueError(
            f"grid {grid.name!r} has {len(meant)} rows of {method!r} at sparsity {sparsity:g} {told}".rstrip()
            + f"; its methods are {', '.join(dict.fromkeys(frame['method']))}"
        )
    return meant[0]


def lookup(
    grid: Grid, frame: pd.DataFrame, method: str, sparsity: float, column: str, variant: dict[str, Any] | None = None
) -> float:
    """One number of a grid's tidy frame, NaN if it is missing; the row as for :func:`position`.

    Raises:
        ValueError: If the column is unknown, or not exactly one row is meant.
    """
    row = position(grid, frame, method, sparsity, variant)
    if column not in frame:
        if "/" in column and not frame["seeds"].any():  # which metrics there are is known from records only
            return math.nan
        raise ValueError(f"grid {grid.name!r} has no column {column!r}; it has {', '.join(frame.columns)}")
    return float(frame[column].iloc[row])


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


class Numbers:
    """What a template may ask for; see the module's docstring.

    Args:
        folder: Of records; None = each grid's own.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = folder
        self._built: dict[str, tuple[Grid, Records, pd.DataFrame]] = {}

    def functions(self) -> dict[str, Callable[..., Any]]:
        """Name in the template to function."""
        own = (self.value, self.raw, self.table, self.versus, self.changed, self.pruned, self.most_pruned, self.choices)
        new = (self.adapted, self.difference, self.gap, self.matters, self.steps)
        return {f.__name__: f for f in (*own, self.inherited, *new)}

    def built(self, name: str) -> tuple[Grid, Records, pd.DataFrame]:
        """A grid, its records and their frame.

        Raises:
            ValueError: If there is no such grid.
        """
        if name not in GRIDS:
            raise ValueError(f"no grid {name!r}; there are: {', '.join(sorted(GRIDS)) or 'none'}")
        if name not in self._built:
            grid = GRIDS[name]()
            records = collect(grid, self.folder or ROOT / "experiments/records" / grid.folder)
            frame = curves.points(grid, records) if grid.by_step else tidy(grid, records)
            self._built[name] = grid, records, frame
        return self._built[name]

    def value(
        self, grid: str, method: str, sparsity: float, column: str, digits: int = 2, scale: float = 1.0, **variant: Any
    ) -> str:
        """One number of a tidy frame as text."""
        return render.number(scale * self.raw(grid, method, sparsity, column, **variant), digits)

    def raw(self, grid: str, method: str, sparsity: float, column: str, **variant: Any) -> float:
        """One number of a tidy frame."""
        found, _, frame = self.built(grid)
        return lookup(found, frame, method, sparsity, column, variant)

    def table(self, grid: str, sparsity: float | None = None) -> str:
        """A grid's overview, or the details of one sparsity, with the caption; of new tasks the caption."""
        found, records, frame = self.built(grid)
        if found.by_step:
            return f"{curves.HOW} {render.caption(found, records)}"
        shown = render.overview(found, frame) if sparsity is None else render.details(found, frame, sparsity)
        return f"{render.markdown(shown)}\n{shown.title}. {render.caption(found, records)}"

    def _row(self, grid: str, method: str, sparsity: float, variant: dict[str, Any]) -> tuple[Grid, Records, Row]:
        found, records, frame = self.built(grid)
        return found, records, found.rows[position(found, frame, method, sparsity, variant)]

    def versus(
        self,
        grid: str,
        ours: str,
        theirs: str,
        sparsity: float,
        column: str = "delta_m",
        digits: int = 2,
        **variant: Any,
    ) -> str:
        """A number of ours minus theirs, seed by seed: the mean and, of several, its standard deviation."""
        found, records, one = self._row(grid, ours, sparsity, variant)
        other = self._row(grid, theirs, sparsity, variant)[2]
        both = zip(by_run(one, found, records), by_run(other, found, records), strict=True)
        each = [a[column] - b[column] for a, b in both if a and b]
        text = render.number(_mean(each), digits)
        return text if len(each) < 2 else f"{text} ± {render.number(statistics.stdev(each), digits)}"

    def changed(self, grid: str, method: str, sparsity: float, metric: str, digits: int = 2, **variant: Any) -> str:
        """The change of one metric in percent of the dense model's, positive = better: the mean over seeds."""
        found, records, row = self._row(grid, method, sparsity, variant)
        return render.number(_mean([c[metric] for c in changes(row, found, records)]), digits)

    def _layers(self, grid: str, method: str, sparsity: float, variant: dict[str, Any]) -> list[dict[str, float]]:
        """Component or layer to the share of its weights that was removed, run by run."""
        _, records, row = self._row(grid, method, sparsity, variant)
        found = [records[r[0].id] for r in row.runs if len(r) == 1 and r[0].id in records]
        return [{**r.sparsity, **r.layer_sparsity} for r in found]

    def pruned(self, grid: str, method: str, sparsity: float, part: str, digits: int = 1, **variant: Any) -> str:
        """Percent removed of a component (``backbone``, a head's task) or of a layer's weight: the mean over seeds."""
        found = self._layers(grid, method, sparsity, variant)
        return render.number(100 * _mean([x[part] for x in found]), digits)

    def most_pruned(self, grid: str, method: str, sparsity: float, digits: int = 2, **variant: Any) -> str:
        """The layer that loses the largest share of its weights in any run, and that share in percent."""
        found = self._layers(grid, method, sparsity, variant)
        layers = [(share, name) for run in found for name, share in run.items() if name.endswith(".weight")]
        share, name = max(layers, default=(math.nan, ""))
        return f"`{name.removesuffix('.weight')}`, {render.number(100 * share, digits)} %" if name else render.MISSING

    def choices(self, sparsity: float) -> dict[float, list[str]]:
        """Every learning rate on offer to the methods for which validation chose it at a sparsity."""
        chosen = {m: by[sparsity] for m, by in rates().items() if sparsity in by}
        return {rate: [m for m, own in chosen.items() if own == rate] for rate in RATES}

    def inherited(self, grid: str) -> str:
        """Which methods of a grid take whose learning rate."""
        groups: dict[str, list[str]] = {}
        for method in dict.fromkeys(row.method for row in self.built(grid)[0].rows):
            if method in VARIES:
                groups.setdefault(VARIES[method], []).append(f"`{method}`")
        return "; ".join(f"from `{of}`: {', '.join(names)}" for of, names in groups.items())

    def _runs(self, grid: str, method: str, variant: dict[str, str]) -> pd.DataFrame:
        found, _, frame = self.built(grid)
        return curves.of_method(found, curves.runs(frame), method, variant)

    def adapted(
        self, grid: str, method: str, column: str = "area", digits: int = 1, scale: float = 1.0, **variant: str
    ) -> str:
        """A number of new tasks: its mean and spread over tasks."""
        mean, std = curves.spread(self._runs(grid, method, variant), column)
        return curves.shown(scale * mean, scale * std, digits)

    def _paired(self, grid: str, ours: str, theirs: str, variant: dict[str, str]) -> tuple[float, float, int, int]:
        other = {k: v for k, v in variant.items() if k != "change"}  # is of ours
        return curves.paired(self._runs(grid, ours, variant), self._runs(grid, theirs, other))

    def difference(self, grid: str, ours: str, theirs: str, **variant: str) -> str:
        """Area of ours minus that of theirs, over pairs of task and seed."""
        return curves.told(*self._paired(grid, ours, theirs, variant))

    def gap(self, grid: str, ours: str, theirs: str, **variant: str) -> float:
        """The mean of that difference, NaN without records."""
        return self._paired(grid, ours, theirs, variant)[0]

    def matters(self, grid: str) -> str:
        """The table that says whether similarity matters."""
        found, _, frame = self.built(grid)
        return render.markdown(curves.matters(found, frame))

    def steps(self, grid: str, **setting: str) -> str:
        """The table of one budget (and model) by step."""
        found, _, frame = self.built(grid)
        return render.markdown(curves.by_step(found, frame, setting))


def rendered(template: str, folder: str | Path | None = None) -> str:
    """A page from its template and a folder of records; None = each grid's own.

    Raises:
        ValueError: If the template is wrong, or asks for a grid, row or column that does not exist.
    """
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False, keep_trailing_newline=True)
    try:
        return environment.from_string(template).render(**Numbers(folder).functions())
    except jinja2.TemplateError as error:
        raise ValueError(f"template: {error}") from error


@refusing
def main(argv: Sequence[str] | None = None) -> int:
    """Render every page, or one template; 2 for a wrong template or damaged records."""
    parser = argparse.ArgumentParser(prog="python -m experiments.findings", description="Render pages of results.")
    parser.add_argument("--records", type=Path, help="default: each grid's folder in experiments/records")
    parser.add_argument("--template", type=Path, help="only this one; needs --out")
    parser.add_argument("--out", type=Path, help="the page of --template")
    args = parser.parse_args(argv)
    if (args.template is None) != (args.out is None):
        parser.error("--template and --out belong together")
    pages = PAGES if args.template is None else {args.template: args.out}
    for template, page in pages.items():
        write_atomically(page, rendered(template.read_text(encoding="utf-8"), args.records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
