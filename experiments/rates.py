"""Rates: choose every method's learning rate on validation, from the records of the grid ``rates``.

    python -m experiments.rates

writes ``configs/recipe/rates.yaml``. A method whose runs at a sparsity are not all there keeps the rate it has.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from cut.delta import delta_m
from cut.files import write_atomically
from cut.records import Record, read
from experiments.cell import CONFIGS
from experiments.grid import Grid
from experiments.grids import GRIDS
from experiments.recipe import rates
from experiments.refusal import refusing

ROOT = Path(__file__).parent.parent
HEAD = """\
# Highest learning rate of every method's recovery by sparsity: the best of three by Delta_m on validation, seed 1.
# Written by python -m experiments.rates from the records of the grid "rates".
"""


def on_validation(record: Record, dense: Record) -> float:
    """Delta_m on validation, in percent, against the dense record on the kept tasks."""
    reference = {k: v for k, v in dense.metrics["val"].items() if k.split("/")[0] in record.tasks}
    return delta_m(record.metrics["val"], reference, record.higher_is_better)


def choose(grid: Grid, records: Mapping[str, Record]) -> dict[str, dict[float, float]]:
    """Method to sparsity to the rate with the highest Delta_m on validation; nothing where a run is missing."""
    found: dict[tuple[str, float], dict[float, float | None]] = {}
    for row in grid.rows:
        cell = row.runs[0][0]
        record, dense = records.get(cell.id), records.get(cell.start.id) if cell.start else None
        value = None if record is None or dense is None else on_validation(record, dense)
        found.setdefault((row.method, cell.target or 0.0), {})[float(row.variant["rate"])] = value
    chosen: dict[str, dict[float, float]] = {}
    for (method, sparsity), by_rate in found.items():
        there = {r: v for r, v in by_rate.items() if v is not None}
        if len(there) == len(by_rate):
            chosen.setdefault(method, {})[sparsity] = max(there, key=lambda r: there[r])
    return chosen


@refusing
def main(argv: Sequence[str] | None = None) -> int:
    """Write the file; 2 for records that are damaged or cannot be compared."""
    parser = argparse.ArgumentParser(prog="python -m experiments.rates", description=__doc__.split("\n\n")[0])
    parser.add_argument("--records", type=Path, default=ROOT / "experiments/records/rooms")
    parser.add_argument("--out", type=Path, default=CONFIGS / "recipe/rates.yaml")
    args = parser.parse_args(argv)
    grid = GRIDS["rates"]()
    ids = {c.id for c in grid.cells()}
    records = {i: read(args.records / f"{i}.json") for i in ids if (args.records / f"{i}.json").is_file()}
    now, new = rates(), choose(grid, records)
    for row in grid.rows:
        cell = row.runs[0][0]
        if cell.id in records and cell.start is not None and cell.start.id in records:
            value = on_validation(records[cell.id], records[cell.start.id])
            print(f"{row.method:18} {cell.target or 0:<5g} {row.variant['rate']:<8g} {value:+.2f}")
    chosen = {m: {**now.get(m, {}), **new.get(m, {})} for m in {*now, *new}}
    write_atomically(args.out, HEAD + yaml.safe_dump(chosen, sort_keys=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
