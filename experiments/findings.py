"""Findings: ``docs/results.md`` from its template; every number in its prose comes from records.

The template is Jinja with three functions::

    {{ value("rooms", "cut", 0.9, "delta_m") }}         # "-3.12", or "missing" without a record
    {{ value("rooms", "cut", 0.9, "params", digits=1, scale=1e-6, tasks="seg+depth") }}
    {% if raw("rooms", "cut", 0.9, "delta_m") > -1 %}   # the number itself, NaN without a record
    {{ table("rooms") }}  {{ table("rooms", 0.9) }}     # Delta_m of all levels; all metrics at one
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from cut.files import write_atomically
from experiments import render
from experiments.grid import Grid
from experiments.grids import GRIDS
from experiments.results import Records, collect, levels, tidy

ROOT = Path(__file__).parent.parent


def lookup(
    grid: Grid, frame: pd.DataFrame, method: str, sparsity: float, column: str, variant: dict[str, Any] | None = None
) -> float:
    """One number of a grid's tidy frame, NaN if it is missing.

    Args:
        grid: The table.
        frame: Its tidy frame.
        method: Name in the table.
        sparsity: The row's target, 0 for dense; for a row without one, the achieved sparsity to the nearest 0.005.
        column: Of the frame.
        variant: What sets the row apart: variant columns, ``tasks`` or ``backbone``.

    Raises:
        ValueError: If the column is unknown, or not exactly one row is meant.
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
    if column not in frame:
        if "/" in column and not frame["seeds"].any():  # which metrics there are is known from records only
            return math.nan
        raise ValueError(f"grid {grid.name!r} has no column {column!r}; it has {', '.join(frame.columns)}")
    return float(frame[column].iloc[meant[0]])


def rendered(template: str, folder: str | Path) -> str:
    """A page from its template and a folder of records.

    Raises:
        ValueError: If the template is wrong, or asks for a grid, row or column that does not exist.
    """

    @cache
    def built(name: str) -> tuple[Grid, Records, pd.DataFrame]:
        if name not in GRIDS:
            raise ValueError(f"no grid {name!r}; there are: {', '.join(sorted(GRIDS)) or 'none'}")
        grid = GRIDS[name]()
        records = collect(grid, folder)
        return grid, records, tidy(grid, records)

    def value(
        grid: str, method: str, sparsity: float, column: str, digits: int = 2, scale: float = 1.0, **variant: Any
    ) -> str:
        found, _, frame = built(grid)
        return render.number(scale * lookup(found, frame, method, sparsity, column, variant), digits)

    def raw(grid: str, method: str, sparsity: float, column: str, **variant: Any) -> float:
        found, _, frame = built(grid)
        return lookup(found, frame, method, sparsity, column, variant)

    def table(grid: str, sparsity: float | None = None) -> str:
        found, records, frame = built(grid)
        shown = render.overview(found, frame) if sparsity is None else render.details(found, frame, sparsity)
        return f"{render.markdown(shown)}\n{shown.title}. {render.caption(found, records)}"

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False, keep_trailing_newline=True)
    try:
        return environment.from_string(template).render(value=value, raw=raw, table=table)
    except jinja2.TemplateError as error:
        raise ValueError(f"template: {error}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Render the results page; 2 for a wrong template or damaged records."""
    parser = argparse.ArgumentParser(prog="python -m experiments.findings", description="Render docs/results.md.")
    parser.add_argument("--records", type=Path, default=ROOT / "experiments/records/rooms")
    parser.add_argument("--template", type=Path, default=ROOT / "docs/results.template.md")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results.md")
    args = parser.parse_args(argv)
    try:
        write_atomically(args.out, rendered(args.template.read_text(encoding="utf-8"), args.records))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
