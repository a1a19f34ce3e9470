"""Delivery: the finished models of a table as files of every runtime and precision, measured.

    python -m experiments.delivery edge

takes the compact models that the sweep kept (``python -m experiments.sweep edge --models``), exports each to ONNX
Runtime and ExecuTorch, some in int8 too, times all its files in turns with the dense model's, and judges the int8 ones
on the test set. One JSON per run in ``experiments/records/delivery``. A run with such a file is not measured again, nor
is one whose network has the same layers as a measured one: only the accuracy in int8 depends on weights.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from cut import checkpoint, export
from cut.compact import keep_tasks
from cut.data.base import MultiTaskData
from cut.data.rooms import Rooms
from cut.evaluation import evaluate_file
from cut.executorch import export_executorch
from cut.files import write_atomically
from cut.latency import Timing, compare, ratio
from cut.quantisation import quantise_onnx
from cut.records import machine
from experiments import idleness
from experiments.cell import Cell
from experiments.grid import Grid
from experiments.grids import GRIDS
from experiments.refusal import refusing
from experiments.results import is_dense
from experiments.run import load_dense, parsed

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "experiments/records/delivery"
CALIBRATION = 16  # training pictures
TIMING: dict[str, Any] = {"threads": 1, "repeats": 60, "rounds": 6}
SHOWN = ("cut-channels", 0.5)  # method and latency of the models that are timed masked too
Job = tuple[Cell, Cell, Path, bool, bool]  # as :func:`made` takes it
SAME = 1e-3  # an exported file's outputs differ from PyTorch's by no more than this, relative to the largest


@dataclass(frozen=True)
class Form:
    """One file of a model.

    Attributes:
        runtime: What ran it.
        precision: ``"fp32"`` or ``"int8"``.
        bytes: On disk.
        latency_ms: Median for one picture.
        latency_p95_ms: 95th percentile.
        latency_ratio: Median over rounds of its share of the dense model's fp32 latency in the same runtime.
        latency_low: The lowest of the rounds' shares.
        latency_high: The highest.
        peak_bytes: Of the process that ran it.
        metrics: On test, of int8 files only: fp32 ones give the record's.
    """

    runtime: str
    precision: str
    bytes: int
    latency_ms: float
    latency_p95_ms: float
    latency_ratio: float
    latency_low: float
    latency_high: float
    peak_bytes: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Delivery:
    """All files of one run's model.

    Attributes:
        run: The cell's id.
        reference: Id of the dense run with the same kept tasks, whose files it was timed with.
        forms: The files.
        threads: Of the runtimes.
        load: Processes that wanted to run in the minute before; an idle machine has less than about 0.3.
        machine: Processor and versions.
        beside: What else was timed in the same turns, where all forms of a model are shown: the fp32 files of the
            ``"dense"`` model, and of the ``"masked"`` one, which has the cut weights as zeros.
    """

    run: str
    reference: str
    forms: tuple[Form, ...]
    threads: int
    load: float
    machine: dict[str, Any]
    beside: dict[str, tuple[Form, ...]] = field(default_factory=dict)

    def write(self, folder: str | Path) -> Path:
        """Write ``<run>.json``, whole or not at all; returns its path."""
        path = Path(folder) / f"{self.run}.json"
        write_atomically(path, json.dumps(asdict(self), indent=1) + "\n")
        return path


def read(path: str | Path) -> Delivery:
    """What :meth:`Delivery.write` wrote.

    Raises:
        ValueError: If the file is no such JSON.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        beside = {name: tuple(Form(**f) for f in forms) for name, forms in found.get("beside", {}).items()}
        return Delivery(**{**found, "forms": tuple(Form(**f) for f in found["forms"]), "beside": beside})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no delivery: {error}") from error


def collect(grid: Grid, folder: str | Path = FOLDER) -> dict[str, Delivery]:
    """Id to delivery of the grid's cells that have one, be it that of a cell with the same layers.

    Raises:
        ValueError: If a file is damaged.
    """
    found = {c.id: measured(c, grid, folder) for c in grid.cells()}
    return {name: read(path) for name, path in found.items() if path}


def measured(cell: Cell, grid: Grid, folder: str | Path, alike: bool = True) -> Path | None:
    """The file of a cell's delivery, else, if ``alike``, of one with the same layers, else None.

    Sizes and times are those of the layers, whatever the weights are.
    """
    others = grid.alike.get(cell.id, ()) if alike else ()
    paths = [Path(folder) / f"{one.id}.json" for one in (cell, *others)]
    return next((path for path in paths if path.is_file()), None)


def references(grid: Grid) -> dict[str, Cell]:
    """Id of a cell to the dense cell with the same kept tasks that it is timed against, itself for a dense one."""
    dense = {(_key(c, grid)): c for row in grid.rows for run in row.runs for c in run if is_dense(c) and c.start}
    cells = [c for row in grid.rows for run in row.runs for c in run]
    return {c.id: dense[_key(c, grid)] for c in cells if _key(c, grid) in dense}


def _key(cell: Cell, grid: Grid) -> tuple[str, tuple[str, ...]]:
    start = grid.against.get(cell.id, cell.start)
    return start.id if start else "", tuple(cell.tasks)


def shown(grid: Grid) -> list[Cell]:
    """The cells whose dense, masked and compact form are timed side by side: one per dense model, of the first seed."""
    found: dict[str, Cell] = {}
    for row in grid.rows:
        if (row.method, row.variant.get("latency")) == SHOWN:
            cell = row.runs[0][0]
            found.setdefault(cell.start.id if cell.start else "", cell)
    return list(found.values())


def masked(cell: Cell, runs: Path) -> Path:
    """Write a cut run's model with its zeros in place and the kept heads, as a compact one is; returns its folder.

    Raises:
        ValueError: If the run has left no weights, or they do not give what its compact model gives.
    """
    target = runs / cell.id / "masked/model"
    if target.is_dir():
        return target
    if not (runs / cell.id / "last.ckpt").is_file():
        raise ValueError(f"no weights of {cell.id} in {runs}: run the sweep with --models")
    cli = parsed([*cell.argv(runs / "records", runs), "--trainer.enable_progress_bar=false", "--trainer.logger=false"])
    load_dense(cli.model, runs / cell.id)
    image = cli.datamodule.score_batches(1, 4)[0]["image"]
    small = runs / cell.id / "compact"
    whole = keep_tasks(cli.model.network.eval(), cell.tasks, image)
    _same(small, whole, image)
    checkpoint.save(whole, target, metadata=checkpoint.read_metadata(small))
    return target


def files(model: Path, tasks: Sequence[str], data: MultiTaskData, int8: bool) -> dict[str, Path]:
    """Export a compact model beside its folder; name (``"onnx-fp32"``, ...) to file. What is there is not made again.

    Raises:
        ValueError: If a file's outputs differ from the model's.
    """
    folder, network = model.parent, checkpoint.load(model)
    pictures = [b["image"] for b in data.score_batches(1, CALIBRATION)]
    image, meta = pictures[0][:1], checkpoint.read_metadata(model)
    plain = folder / model.name
    found = {"PyTorch-fp32": model, "onnx-fp32": plain.with_suffix(".onnx"), "pte-fp32": plain.with_suffix(".pte")}
    if int8:
        found |= {"onnx-int8": folder / "int8.onnx", "pte-int8": folder / "int8.pte"}
    makers = {
        "onnx-fp32": lambda to: export.export_onnx(network, to, image, tasks=tasks, meta=meta),
        "pte-fp32": lambda to: export_executorch(network, to, image, tasks=tasks, meta=meta),
        "onnx-int8": lambda to: quantise_onnx(found["onnx-fp32"], to, pictures),
        "pte-int8": lambda to: export_executorch(network, to, image, tasks=tasks, meta=meta, calibration=pictures),
    }
    for name, path in found.items():
        if not path.exists():
            makers[name](path)
            if name.endswith("fp32"):
                _same(path, network, pictures[0][:4])
    return found


def _same(path: Path, network: torch.nn.Module, image: torch.Tensor) -> None:
    with torch.no_grad():
        largest = {t: float(o.abs().max()) for t, o in network(image).items()}
    worst = {t: d / largest[t] for t, d in export.parity(path, network, [image]).items()}
    task = max(worst, key=lambda t: worst[t])
    if worst[task] > SAME:
        if path.is_file():
            path.unlink()
        raise ValueError(f"{path}: output {task!r} differs by {worst[task]:.1e} of its largest value; allowed: {SAME}")


def pictures(cell: Cell) -> MultiTaskData:
    """What a cell's files are calibrated and judged on."""
    return Rooms(tasks=cell.tasks, seed=cell.seed, batch_size=16)


def made(
    cell: Cell, reference: Cell, runs: Path, int8: bool, beside: bool
) -> tuple[dict[str, Path], dict[str, dict[str, Path]]]:
    """Make the files that :func:`deliver` times, as far as they are not there: the model's, and others' by form.

    Raises:
        ValueError: If a model is not there, or a file differs from its model.
    """
    for one in (cell, reference):
        if not (runs / one.id / "compact").is_dir():
            raise ValueError(f"no compact model of {one.id} in {runs}: run the sweep with --models")
    data = pictures(cell)
    mine = files(runs / cell.id / "compact", cell.tasks, data, int8)
    others: dict[str, dict[str, Path]] = {}
    if cell.id != reference.id:
        others["dense"] = files(runs / reference.id / "compact", cell.tasks, data, False)
    if beside:
        others["masked"] = files(masked(cell, runs), cell.tasks, data, False)
    return mine, others


def _ahead(job: Job) -> None:
    """Make one job's files; what goes wrong is told when it is delivered."""
    torch.set_num_threads(1)
    with contextlib.suppress(ValueError):
        made(*job)


def ahead(jobs: Sequence[Job], workers: int) -> None:
    """Make the files of many jobs side by side, before any is timed; dense models first, which the others share."""
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool, Progress() as bar:
        task = bar.add_task("files", total=len(jobs))
        for dense in (True, False):
            for _ in pool.map(_ahead, [job for job in jobs if (job[0].id == job[1].id) == dense]):
                bar.advance(task)


def deliver(
    cell: Cell, reference: Cell, runs: Path, int8: bool, beside: bool = False, progress: bool = False
) -> Delivery:
    """Export, time and judge one run's model.

    Args:
        cell: The run.
        reference: The dense run with the same kept tasks.
        runs: Folder of the runs' folders, with the compact models in them.
        int8: Whether int8 files are made and judged too.
        beside: Whether the masked model is timed too, and the dense one's times are kept.
        progress: Show a bar for the timing.

    Raises:
        ValueError: If a model is not there, or a file differs from its model.
    """
    data = pictures(cell)
    mine, others = made(cell, reference, runs, int8, beside)
    size = list(data.score_batches(1, 1)[0]["image"].shape[-2:])
    together = {**mine, **{f"{form}-{name}": path for form, paths in others.items() for name, path in paths.items()}}
    timed = compare(together, size=size, progress=progress, **TIMING)

    def told(name: str, metrics: Mapping[str, float]) -> Form:
        kind, precision = name.split("-")[-2:]
        return _form(timed[name], timed.get(f"dense-{kind}-fp32", timed[f"{kind}-fp32"]), precision, metrics)

    judged = {
        n: evaluate_file(p, data, tasks=cell.tasks, progress=progress) if n.endswith("int8") else {}
        for n, p in mine.items()
    }
    forms = tuple(told(name, metrics) for name, metrics in judged.items())
    sides = {form: tuple(told(f"{form}-{name}", {}) for name in paths) for form, paths in others.items() if beside}
    return Delivery(cell.id, reference.id, forms, TIMING["threads"], timed["onnx-fp32"].load, machine(), sides)


def _form(timing: Timing, dense: Timing, precision: str, metrics: Mapping[str, float]) -> Form:
    share = ratio(timing, dense)
    return Form(
        timing.runtime,
        precision,
        timing.bytes,
        round(timing.median_ms, 4),
        round(timing.p95_ms, 4),
        round(share.median, 5),
        round(share.low, 5),
        round(share.high, 5),
        timing.peak_bytes,
        {k: round(v, 6) for k, v in metrics.items()},
    )


@refusing
def main(argv: Sequence[str] | None = None) -> int:
    """Measure what has a model and no delivery; 2 for bad input, 1 if a model is missing."""
    parser = argparse.ArgumentParser(prog="python -m experiments.delivery", description=__doc__.split("\n\n")[0])
    parser.add_argument("grid", help=f"of {', '.join(GRIDS)}")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/rooms")
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument(
        "--int8",
        nargs="*",
        default=["cut-channels", "cut-channels-plus", "dense-longer"],
        help="methods with int8 files",
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that make files; they are timed one by one")
    parser.add_argument("--every-seed", action="store_true", help="not only each row's first: shapes hardly differ")
    idleness.option(parser)
    args = parser.parse_args(argv)
    if args.grid not in GRIDS:
        raise ValueError(f"no grid {args.grid!r}; allowed: {', '.join(GRIDS)}")
    if args.workers < 1:
        raise ValueError(f"workers {args.workers}; allowed: at least 1")
    grid = GRIDS[args.grid]()
    known, by_id = references(grid), {c.id: c for c in grid.cells()}
    beside, first = {c.id for c in shown(grid)}, min((c.seed for c in by_id.values()), default=0)
    wanted = [by_id[name] for name in known if args.every_seed or by_id[name].seed == first]
    todo = [c for c in wanted if not measured(c, grid, args.out, alike=c.method not in args.int8)]
    jobs = [(c, known[c.id], args.runs, c.method in args.int8 and c.seed == first, c.id in beside) for c in todo]
    if args.workers > 1:
        ahead(jobs, args.workers)
    if jobs and not args.busy:
        idleness.wait()
    left = 0
    with Progress() as bar:
        task = bar.add_task("delivery", total=len(jobs))
        for job in jobs:
            bar.update(task, description=job[0].id)
            try:
                deliver(*job).write(args.out)
            except ValueError as error:
                left += 1
                bar.console.print(f"{job[0].id}: {error}")
            bar.advance(task)
    return int(bool(left))


if __name__ == "__main__":
    sys.exit(main())
