"""Shapes: how many multiply-accumulates may stay for a file to be as fast as wanted, found by timing.

    python -m experiments.shapes

searches every method, model and selection of the table ``edge`` on its first seed and writes
``configs/recipe/latency.yaml``. The dense runs must have left their weights (``python -m experiments.sweep edge --only
dense-seg --models``). The machine must do nothing else; a search that was stopped goes on from what it has timed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.progress import Progress

from cut.export import export_onnx
from cut.files import write_atomically
from cut.limits import MACs
from cut.pruning import Pruning
from cut.records import machine
from cut.search import Target, TooSlowError, clock, search
from cut.selection import Mask
from cut.speed import fast_enough
from cut.structured import make_unit_mask, plan
from experiments import edge, idleness
from experiments.cell import CONFIGS, Cell
from experiments.refusal import refusing
from experiments.run import load_dense, parsed

ROOT = Path(__file__).parent.parent
HEAD = """\
# Share of the multiply-accumulates (for width: share of every layer's channels) at which the exported file takes this
# share of the dense model's time for one picture; by model, kept tasks and method. Written by
# python -m experiments.shapes on one thread of ONNX Runtime.
"""
TIMING: dict[str, Any] = {"threads": 1, "repeats": 60, "rounds": 6}
# Rounds of one reading differ by about as much, and what finished models take is measured again: at 0.02 the ViT
# took 12 models for what 5 say, 6 minutes a search.
TOLERANCE = 0.05
LOWEST = 0.05  # the narrowest width that is tried


def searched(
    method: str, model: str, tasks: Sequence[str], runs: Path, notes: Path, progress: bool = True
) -> dict[float, float]:
    """Latency to the share of MACs, or the width, that meets it; a latency that nothing meets is left out.

    Args:
        method: Of the table.
        model: A config under ``configs/model``.
        tasks: The kept tasks.
        runs: Folder of the runs' folders, the dense one's among them.
        notes: Folder of what has been timed so far.
        progress: Show the search.

    Raises:
        ValueError: If a model cannot be made, exported or timed.
    """
    seed = edge.MODELS[model][0]
    options: dict[str, Any] = {"cache": notes / f"{method}-{model}-{'+'.join(tasks)}.json"}
    options |= {"key": key(method, model, tasks)}
    options |= {"progress": progress, "tolerance": TOLERANCE}
    find = _width if method == edge.WIDTH else _cut
    found = {}
    measure = find(method, model, tasks, seed, runs)
    for latency in edge.latencies(tuple(tasks)):
        try:
            found[latency] = measure(Target(latency, "x"), options)
        except TooSlowError as error:
            print(f"{method}, {model}, {'+'.join(tasks)}: {error}", file=sys.stderr)
    return found


def key(method: str, model: str, tasks: Sequence[str]) -> dict[str, Any]:
    """What readings depend on: the dense run, how the method cuts, the network, and how and where they are made."""
    seed = edge.MODELS[model][0]
    cell = edge.scaled(1.0, model, tasks, seed) if method == edge.WIDTH else edge.cut(method, 1.0, model, tasks, seed)
    return {
        "method": method,
        "model": model,
        "tasks": list(tasks),
        "start": edge.start(model, seed).id,
        "settings": {"pruning": cell.config["pruning"], "network": cell.config["model"]["init_args"]["network"]},
        "timing": TIMING,
        "processor": machine()["processor"],
        "torch": torch.__version__,
    }


Measure = Callable[[Target, Mapping[str, Any]], float]


def _cut(method: str, model: str, tasks: Sequence[str], seed: int, runs: Path) -> Measure:
    """Searches with the masks that a run of the method would make."""
    network, mask_of, image = masks(edge.cut(method, 0.5, model, tasks, seed), runs)

    def measure(target: Target, options: Mapping[str, Any]) -> float:
        return fast_enough(network, mask_of, tasks, image, target, **options, **TIMING)[1].density

    return measure


def masks(cell: Cell, runs: Path) -> tuple[torch.nn.Module, Callable[[float], Mask], torch.Tensor]:
    """A cell's dense network, the mask that its cut makes at a share of the MACs, and a picture.

    Raises:
        ValueError: If the dense run has left no weights.
    """
    cli = parsed([*cell.argv(runs / "records", runs), "--trainer.enable_progress_bar=false", "--trainer.logger=false"])
    load_dense(cli.model, runs / cell.start.id if cell.start else runs)
    trainer: Any = cli.trainer
    pruning = next(c for c in trainer.callbacks if isinstance(c, Pruning))
    network, losses = cli.model.network.eval(), cli.model.losses
    batches = cli.datamodule.score_batches(pruning.batches)
    known = plan(network, batches[0], losses, cell.tasks)
    scores = pruning.scorer(network, batches, losses, cell.tasks)

    def mask_of(share: float) -> Mask:
        return make_unit_mask(
            network,
            scores,
            batches[0],
            losses,
            cell.tasks,
            fusion=pruning.fusion,
            budget=MACs(share),
            floor_share=pruning.floor,
            rounding=pruning.rounding,
            cap=pruning.cap,
            reduce=pruning.units.reduce if pruning.units else "sum",
            units=known,
        )

    return network, mask_of, batches[0]["image"]


def _width(method: str, model: str, tasks: Sequence[str], seed: int, runs: Path) -> Measure:
    """Searches over networks with narrower layers."""

    def network(width: float) -> tuple[torch.nn.Module, torch.Tensor]:
        cell = edge.scaled(width, model, tasks, seed)
        cli = parsed([*cell.argv(runs / "records", runs), "--trainer.enable_progress_bar=false"])
        return cli.model.network.eval(), cli.datamodule.score_batches(1, 1)[0]["image"]

    def measure(target: Target, options: Mapping[str, Any]) -> float:
        with tempfile.TemporaryDirectory() as folder:

            def build(width: float) -> Path:
                narrow, image = network(width)
                return export_onnx(narrow, Path(folder) / f"{width}.onnx", image, tasks=tasks).path

            dense = build(1.0)
            return search(clock(build, dense, target, **TIMING), target, lowest=LOWEST, **options).density

    return measure


def told(shares: edge.Shares) -> str:
    """The file's text."""
    plain = {
        model: {tasks: {m: dict(by) for m, by in methods.items()} for tasks, methods in found.items()}
        for model, found in shares.items()
    }
    return HEAD + yaml.safe_dump(plain, sort_keys=False)


@refusing
def main(argv: Sequence[str] | None = None) -> int:
    """Search what has no share yet and write the file after each; 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m experiments.shapes", description=__doc__.split("\n\n")[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/rooms")
    parser.add_argument("--notes", type=Path, default=ROOT / "runs/shapes", help="what has been timed")
    parser.add_argument("--out", type=Path, default=CONFIGS / "recipe/latency.yaml")
    parser.add_argument("--only", default="", help="only models whose name contains this")
    idleness.option(parser)
    args = parser.parse_args(argv)
    shares: dict[str, Any] = {m: {t: dict(by) for t, by in found.items()} for m, found in edge.shares().items()}
    todo = [(m, t, how) for m, t, how in edge.wanted() if how not in shares.get(m, {}).get("+".join(t), {})]
    todo = [one for one in todo if args.only in one[0] and one[2] not in edge.SHARES_OF]
    if todo and not args.busy:
        idleness.wait()
    with Progress() as bar:
        task = bar.add_task("shapes", total=len(todo))
        for model, tasks, method in todo:
            bar.update(task, description=f"{method}, {model}, {'+'.join(tasks)}")
            found = searched(method, model, tasks, args.runs, args.notes, progress=False)
            shares.setdefault(model, {}).setdefault("+".join(tasks), {})[method] = found
            write_atomically(args.out, told(shares))
            bar.advance(task)
    return 0


if __name__ == "__main__":
    sys.exit(main())
