"""Cells that cost nothing: a run function told by files what to do, and a small grid of such cells.

Imports nothing heavy, since every worker's process imports it. Beside the folder of runs: ``fail-<id>`` makes a cell
fail, ``kill-<id>`` makes it kill its own process once, ``hold-<id>`` makes it wait until the file is gone. Every start
adds a line "id pid" to ``started.txt``, every end to ``finished.txt``.
"""

import os
import signal
import time
from pathlib import Path

from experiments.backends import Job
from experiments.cell import Cell
from experiments.grid import Grid, Row

METHODS = ("cut", "magnitude", "snip")
SEEDS = (1, 2)


def dense(seed: int) -> Cell:
    return Cell(("data/synthetic", "pruning/dense"), {"seed_everything": seed})


def cell(method: str, seed: int) -> Cell:
    return Cell(("data/synthetic", f"pruning/{method}"), {"seed_everything": seed}, dense(seed))


def grid() -> Grid:
    """Two dense cells, and three pruned ones of each."""
    return Grid("toy", "Toy", tuple(Row(m, tuple((cell(m, s),) for s in SEEDS)) for m in METHODS))


def _note(path: Path, name: str) -> None:
    with path.open("a") as file:  # one short line is written whole
        file.write(f"{name} {os.getpid()}\n")


def run(job: Job) -> None:
    name, base = job.cell.id, job.runs.parent
    _note(base / "started.txt", name)
    while (base / f"hold-{name}").exists():
        time.sleep(0.02)
    if (base / f"kill-{name}").exists():
        (base / f"kill-{name}").unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    if (base / f"fail-{name}").exists():
        raise RuntimeError(f"{name} shall fail")
    if job.cell.start is None:
        (job.runs / name).mkdir(parents=True, exist_ok=True)
        (job.runs / name / "last.ckpt").touch()
    job.records.mkdir(parents=True, exist_ok=True)
    _note(base / "finished.txt", name)
    (job.records / f"{name}.json").write_text("{}")


def main(base: str, *more: str) -> int:
    """The sweep's command line over the toy grid, with this run function, two workers, in the folder ``base``."""
    from functools import partial

    from experiments import sweep

    sweep.GRIDS, sweep.run_cell, sweep.POLL = {"toy": grid}, run, 0.02
    sweep.Local = partial(sweep.Local, preload=("tests.experiments.sweep_stub",))
    return sweep.main(["toy", f"--records={base}/records", f"--runs={base}/runs", "--workers=2", *more])
