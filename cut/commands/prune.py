"""``cut prune``: score, fuse, cut to a budget, fine-tune; a masked model comes out, ready for ``cut compact``."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from cut.commands import budgets, options
from cut.commands.terminal import Terminal, finite, human, table

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cut.commands.cutting import Job
    from cut.commands.source import Source
    from cut.search import Found
    from cut.selection import Mask
    from cut.snapshot import Snapshot

MODELS = 12  # that a search for a latency makes at most
READING = 200  # bytes of one of its readings in a file
EXAMPLES = """examples:
  cut prune runs/demo/dense --tasks seg depth --sparsity 0.9 --out runs/pruned
  cut prune runs/demo/dense --tasks seg depth --units channels --budget macs=0.5 --out runs/half
  cut prune runs/demo/dense --tasks seg --units channels --budget macs=0.5 --rounds 4 --reconstruct 8 --out runs/fit
  cut prune mine:setup --tasks seg --budget params=2e6 --steps 500 --out runs/mine
  cut prune mine:setup --tasks seg --units channels --budget latency=20ms --budget bytes=4MB --out runs/mine
  cut prune mine:setup --tasks seg --units channels --budget latency=0.5x --rounds 4 --reconstruct 8 --out runs/mine
"""


def add(commands: Any) -> None:
    """The command's options."""
    parser = options.add_command(
        commands,
        "prune",
        help="cut a model for chosen tasks to a budget and fine-tune it",
        description="Score every weight for each task, let the tasks vote, cut to an exact budget, fine-tune.",
        epilog=options.RESUMES + EXAMPLES,
    )
    options.add_source(parser, "dense model")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="the tasks to keep (default: all)")
    budgets.add(parser)
    parser.add_argument("--reduce", choices=("sum", "mean", "per_mac"), default="sum", help="how a channel is scored")
    parser.add_argument("--inside", type=options.sparsity, help="sparsity of weights, cut inside the channels left")
    parser.add_argument("--share", type=options.share, default=0.5, help="vote share: 0 any, 0.5 half, 1 all tasks")
    parser.add_argument("--batches", type=options.whole(1), default=50, help="scoring batches (default: 50)")
    parser.add_argument("--rounds", type=options.whole(1), default=1, help="cut in so many, each scored anew")
    fit = "scoring batches on which, after each round, what stays is fitted to the outputs of before (default: 0, none)"
    parser.add_argument("--reconstruct", type=options.whole(0), default=0, metavar="BATCHES", help=fit)
    parser.add_argument(
        "--runtime", choices=("onnx", "executorch"), default="onnx", help="in which a latency is measured"
    )
    parser.add_argument("--threads", type=options.whole(1), default=1, help="of that runtime (default: 1)")
    options.add_training(parser, steps=200, lr=1e-3)
    options.add_out(parser, "folder for the masked model")
    options.add_output(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Prune.

    Raises:
        ValueError: For options that do not fit each other or the model, before any work starts.
    """
    budgets.check(args.budget, args.sparsity, args.units, args.floor)
    check_units(args)
    for name, default in (("runtime", "onnx"), ("threads", 1)):
        if _latency(args) is None and getattr(args, name) != default:
            raise ValueError(f"--{name} {getattr(args, name)}: allowed only with --budget latency=...")
    terminal = Terminal(args)
    import torch

    from cut.commands.opening import open_source
    from cut.commands.resuming import resumable
    from cut.commands.source import device_of
    from cut.latency import load_of_machine

    load = load_of_machine()  # before this command's own work, which loads it too
    device = device_of(args.device)
    torch.manual_seed(args.seed)
    source = open_source(args.source, args.weights, args.data, args.seed, labels=True)
    with resumable(args, source) as snapshot:
        facts, shown = _pruned(args, source, device, snapshot, terminal, load)
    terminal.result(facts, shown)


def _pruned(
    args: argparse.Namespace,
    source: Source,
    device: torch.device,
    snapshot: Snapshot,
    terminal: Terminal,
    load: float,
) -> tuple[dict[str, Any], list[Any]]:
    """Cut, fine-tune and save; returns facts and what is shown."""
    from cut.commands.cutting import prepare
    from cut.commands.resuming import seconds_of, told
    from cut.commands.source import CUT, whole
    from cut.decomposition import check_tasks, kept_parameters
    from cut.masks import apply_mask, component_sparsity
    from cut.objectives import evaluate
    from cut.reconstruction import check_fittable
    from cut.recovery import recover

    data, dense_tasks = source.labelled(), list(source.tasks)
    tasks = check_tasks(args.tasks or dense_tasks, dense_tasks)
    network = whole(source).to(device)
    wanted = {t: data.objectives[t] for t in tasks}
    job = replace(prepare(args, source, network, tasks), load=load)
    if args.reconstruct:
        check_fittable(network, kept_parameters(network, job.used, tasks))
    made = _cut(job, source, snapshot, terminal)
    apply_mask(network, made.mask)
    if hasattr(network, "select"):
        network.select(tasks)
    recover(
        network,
        data.train,
        job.losses,
        tasks,
        steps=args.steps,
        lr=args.lr,
        mask=made.mask,
        weights={t: o.weight for t, o in wanted.items()},
        progress=lambda steps: told(terminal, steps, "fine-tuning"),
        resume=snapshot,
    )
    after = evaluate(network, terminal.track(data.test, "pruned model"), wanted)
    network.cpu()
    zeros = component_sparsity(network, {n: m.cpu() for n, m in made.mask.items()}, job.used, tasks)
    facts = {
        "tasks": tasks,
        "units": args.units,
        "budget": [str(b) for b in args.budget],
        "sparsity": zeros,
        "metrics": {"dense": made.dense, "pruned": after},
    }
    shown = [_shown(made.dense, after), _told(zeros), f"masked model: {args.out}"]
    if job.plan is not None:
        facts["compact"] = sizes = _compact(replace(job, facts=size_of_facts(source.meta, args, made.dense)), made.mask)
        told_ = (f"{human(n)} {w} ({n / sizes['before'][w]:.1%})" for w, n in sizes["after"].items())
        shown.insert(2, f"compact: {', '.join(told_)}")
    if made.found is not None:
        wish = _latency(args)
        timed = {"runtime": args.runtime, "threads": args.threads, "load": made.load, "cores": os.cpu_count()}
        facts["latency"] = {"target": str(wish), **timed, **asdict(made.found)}
        shown.insert(2, _reached(wish, made))
    save(source, network, tasks, facts, args.out, CUT)
    seconds = {"score_seconds": round(made.seconds, 2), "finetune_seconds": round(seconds_of(snapshot), 2)}
    return {**facts, "out": str(args.out), **seconds}, shown


@dataclass(frozen=True)
class Cut:
    """What came out before the fine-tuning.

    Attributes:
        dense: Metrics of the dense model.
        mask: What stays.
        found: What a search for a latency reached, None without one.
        seconds: Of scoring, cutting and search.
        load: Of the machine before that.
    """

    dense: dict[str, float]
    mask: dict[str, Tensor]
    found: Found | None
    seconds: float
    load: float | None


def _cut(job: Job, source: Source, snapshot: Snapshot, terminal: Terminal) -> Cut:
    """Judge the dense model, score and cut, each once: a command that goes on has it in its file."""
    from cut.commands.rounds import in_rounds
    from cut.objectives import evaluate
    from cut.randomness import random_state, set_random_state
    from cut.search import Found, Reading

    data, device = source.labelled(), next(job.network.parameters()).device
    known: dict[str, Any] = dict(snapshot.get("cut") or {})

    def note(**facts: Any) -> None:
        known.update(facts, random=random_state(device, data.train))
        snapshot.keep("cut", known)

    if "dense" not in known:
        wanted = {t: data.objectives[t] for t in job.tasks}
        note(dense=evaluate(job.network, terminal.track(data.test, "dense model"), wanted))
    set_random_state(known["random"], device, data.train)
    if "mask" not in known:
        start = time.perf_counter()
        wish = _latency(job.args)
        if wish and job.load is not None:
            terminal.warn_if_busy(job.load)
        job = replace(job, facts=size_of_facts(source.meta, job.args, known["dense"]))
        mask, found = in_rounds(job, data, terminal, wish)
        seconds = time.perf_counter() - start
        fitted = {n: v.cpu().clone() for n, v in job.network.state_dict().items()} if job.args.reconstruct else None
        note(
            mask={n: m.cpu() for n, m in mask.items()},
            weights=fitted,
            found=None if found is None else asdict(found),
            seconds=seconds,
            load=job.load,
        )
    if known.get("weights") is not None:  # as they were fitted
        job.network.load_state_dict(known["weights"])
    if (stored := known["found"]) is not None:
        readings = {d: Reading(**r) for d, r in stored["readings"].items()}
        stored = Found(stored["density"], Reading(**stored["reading"]), readings)
    return Cut(known["dense"], known["mask"], stored, known["seconds"], known.get("load"))


def _reached(wish: budgets.Wish | None, made: Cut) -> str:
    """What a search reached, in one line."""
    from cut.latency import told_load

    assert made.found is not None
    reading, load = made.found.reading, "" if made.load is None else f"; {told_load(made.load)}"
    return f"{wish}: reached {reading.value:.3g} ({reading.low:.3g} to {reading.high:.3g}){load}"


def _latency(args: argparse.Namespace) -> budgets.Wish | None:
    """The budget of latency, None if there is none."""
    return next((w for w in args.budget if w.kind == "latency"), None)


def check_units(args: argparse.Namespace) -> None:
    """Refuse options of channels where weights are cut, and those that contradict each other.

    Raises:
        ValueError: Naming the first such option.
    """
    if args.units == "channels":
        if (args.floor or 0.0) > args.cap:
            raise ValueError(f"--floor {args.floor:g} is above --cap {args.cap:g}; allowed: a floor up to the cap")
        return
    for name, default in (("reduce", "sum"), ("rounding", None), ("cap", 1.0), ("inside", None)):
        if getattr(args, name) != default:
            raise ValueError(f"--{name} {getattr(args, name)}: allowed only with --units channels")


def size_of_facts(meta: Mapping[str, Any], args: argparse.Namespace, metrics: Mapping[str, float]) -> int:
    """About, and no fewer than, the bytes that facts on the model and its cut will take in its file."""
    several = 2 * len(json.dumps(metrics)) + READING * sum(b.kind == "latency" for b in args.budget) * MODELS
    return len(json.dumps(dict(meta), indent=6)) + several + 1000


def save(source: Source, network: Any, tasks: list[str], facts: dict[str, Any], out: Any, key: str) -> int:
    """Write the network, its outputs reduced to the kept tasks, with its facts; returns bytes on disk."""
    from cut import checkpoint
    from cut.stub import TaskSubset

    meta = {k: v for k, v in source.meta.items() if k != key}
    if "tasks" in meta:
        meta["tasks"] = {t: meta["tasks"][t] for t in tasks}
    shown = network if hasattr(network, "select") else TaskSubset(network, tasks)
    return checkpoint.save(shown, out, metadata=meta | {key: finite(facts)})


def _shown(before: dict[str, float], after: dict[str, float]) -> Any:
    """Losses and metrics before and after."""
    rows = [(key, f"{before[key]:.4g}", f"{after[key]:.4g}") for key in before]
    return table(("task/metric", "dense", "pruned"), rows)


def _compact(job: Job, mask: Mask) -> dict[str, dict[str, float]]:
    """What the model takes before and after ``cut compact``, in the words of budgets; bytes are those of its file."""
    from cut.speed import left_by

    cost = job.units.cost
    found = {}
    for when, left in (("before", cost.dense), ("after", left_by(job.units, mask))):
        size = left["bytes"] + cost.file_overhead
        found[when] = {"params": left["parameters"], "macs": left["macs"], "bytes": size}
    return found


def _told(zeros: dict[str, float]) -> str:
    """Sparsity by component in one line."""
    parts = ", ".join(f"{part} {value:.1%}" for part, value in zeros.items() if part != "kept")
    return f"sparsity {zeros['kept']:.1%} ({parts.replace('_', ' ')})"
