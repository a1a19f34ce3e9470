"""``cut newtask``: cut a pre-trained model for a task that it was never trained for, by the masks of similar tasks."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cut.commands import budgets, options
from cut.commands.prune import check_units, save
from cut.commands.terminal import Terminal, table

if TYPE_CHECKING:
    import torch

    from cut.commands.source import Source
    from cut.library import Library
    from cut.neighbours import SimilarTasks
    from cut.snapshot import Snapshot

SIMILARITIES = ("overlap", "leep", "cka", "gradient", "random", "all")
FILL_BATCHES, BATCHES = 50, 6
EXAMPLES = """examples:
  cut newtask runs/dense --library runs/library --fill --sparsity 0.9
  cut newtask runs/dense --library runs/library --task scene --sparsity 0.9 --steps 60 --out runs/scene
  cut newtask runs/dense --library runs/channels --task scene --units channels --budget bytes=2MB --out runs/scene
"""


def add(commands: Any) -> None:
    """The command's options."""
    parser = options.add_command(
        commands,
        "newtask",
        help="cut a model for a task it was never trained for, by the masks of similar tasks",
        description="Let the masks of the most similar tasks of a library vote, cut once, adapt in a few steps. "
        "With --fill: cut the model for each of its own tasks and keep the masks in the library.",
        epilog=options.RESUMES + EXAMPLES,
    )
    options.add_source(parser, "dense pre-trained model")
    library = parser.add_argument("--library", type=Path, required=True, metavar="FOLDER", help="of the task masks")
    options.folders(library)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--task", metavar="TASK", help="the new task, one of the data's")
    what.add_argument("--fill", action="store_true", help="add a mask of each of the model's own tasks instead")
    parser.add_argument("--similarity", choices=SIMILARITIES, default="overlap", help="what makes a task similar")
    parser.add_argument("--k", type=options.whole(1), default=3, help="neighbours that vote (default: 3)")
    parser.add_argument("--temperature", type=options.rate, help="votes by softmax(similarity / T) (default: equal)")
    parser.add_argument("--soft", action="store_true", help="let ranks vote instead of masks")
    parser.add_argument("--tie", choices=("magnitude", "taylor"), default="magnitude", help="orders equal votes")
    budgets.add(parser, "such as params=2e6")
    parser.add_argument(
        "--batches",
        type=options.whole(1),
        help=f"batches for similarity (default: {BATCHES}), or with --fill for scores (default: {FILL_BATCHES})",
    )
    options.add_training(parser, steps=60, lr=1e-3)
    options.add_out(parser, "folder for the masked model", required=False)
    options.add_output(parser)
    parser.set_defaults(run=run, share=0.5, reduce="sum", inside=None)


def run(args: argparse.Namespace) -> None:
    """Cut for a new task, or fill the library.

    Raises:
        ValueError: For options that do not fit each other or the model, an empty library, or no similar task.
    """
    budgets.check(args.budget, args.sparsity, args.units, args.floor)
    check_units(args)
    if any(w.kind == "latency" for w in args.budget):
        raise ValueError("--budget latency: cut newtask cuts once and measures nothing; use macs, bytes or params")
    if args.out is None and not args.fill:
        raise ValueError("--out is missing: where shall the masked model go?")
    terminal = Terminal(args)
    import torch

    from cut.commands.opening import open_source, with_new_head
    from cut.commands.resuming import resumable
    from cut.commands.source import device_of
    from cut.library import Library

    device = device_of(args.device)
    torch.manual_seed(args.seed)
    library = Library(args.library)
    if args.fill:
        source = open_source(args.source, args.weights, args.data, args.seed, labels=True)
        terminal.result(*_filled(args, source, device, library, terminal))
        return
    library.entries()  # an empty or damaged one is told before the data are read
    if ":" in args.source and not Path(args.source).exists():
        source = open_source(args.source, args.weights, args.data, args.seed, labels=True)
    else:
        source = with_new_head(args.source, args.task, args.data, args.seed, args.similarity == "gradient")
    with resumable(args, source) as snapshot:
        facts, shown = _adapted(args, source, device, snapshot, terminal)
    terminal.result(facts, shown)


def _filled(
    args: argparse.Namespace, source: Source, device: torch.device, library: Library, terminal: Terminal
) -> tuple[dict[str, Any], list[Any]]:
    """Cut the model for each of its tasks alone and keep the masks; returns facts and what is shown."""
    from cut.commands.cutting import prepare
    from cut.commands.source import whole
    from cut.library import base_hash, shared_weights
    from cut.objectives import moved
    from cut.scores import Sensitivity

    if source.cut:
        raise ValueError(f"{source.name} is cut already; a library's masks are over the dense pre-trained model")
    data, network = source.labelled(), whole(source).to(device)
    added = {}
    for task in terminal.track(list(source.tasks), "cutting for each task"):
        job = prepare(args, source, network, [task])
        shared = shared_weights(network, job.first, job.losses)
        batches = (moved(b, device) for b in data.score(args.batches or FILL_BATCHES))
        scores = Sensitivity()(network, batches, job.losses, [task])
        mask = job.mask(scores)
        told = {
            "task": task,
            "units": args.units,
            "budget": ", ".join([*map(str, args.budget), *([f"sparsity={args.sparsity}"] if args.sparsity else [])]),
            "score": "sensitivity",
            "data": {"name": args.data or source.name},
            "base": base_hash(network, shared),
        }
        kept = {n: m for n, m in mask.items() if n in shared and n in scores[task]}
        added[task] = library.add(kept, told, scores[task], shared)
    rows = [(name, f"{library.read(name).density:.1%}") for name in added.values()]
    return {"library": str(library.folder), "added": added}, [table(("entry", "kept"), rows)]


def _scorer(args: argparse.Namespace, source: Source) -> SimilarTasks:
    """The similar tasks, as the options choose them."""
    from cut import similarity
    from cut.neighbours import SimilarTasks

    kinds: dict[str, Any] = {
        "overlap": similarity.MaskOverlap,
        "leep": similarity.LEEP,
        "cka": similarity.CKA,
        "gradient": similarity.GradientCosine,
        "all": similarity.Everyone,
    }
    chosen = similarity.RandomSimilarity(args.seed) if args.similarity == "random" else kinds[args.similarity]()
    return SimilarTasks(
        str(args.library),
        chosen,
        None if args.similarity == "all" else args.k,
        args.temperature,
        args.soft,
        args.tie,
        args.batches or BATCHES,
    )


def _adapted(
    args: argparse.Namespace, source: Source, device: torch.device, snapshot: Snapshot, terminal: Terminal
) -> tuple[dict[str, Any], list[Any]]:
    """Vote, cut, adapt and save; returns facts and what is shown."""
    from cut.commands.cutting import prepare
    from cut.commands.resuming import seconds_of, told
    from cut.commands.source import CUT, whole
    from cut.decomposition import check_tasks
    from cut.masks import apply_mask, component_sparsity
    from cut.objectives import evaluate
    from cut.randomness import set_random_state
    from cut.recovery import recover

    data = source.labelled()
    network = whole(source).to(device)
    tasks = check_tasks([args.task], list(data.objectives))
    job = prepare(args, source, network, tasks)
    made = snapshot.get("cut") or _cut(args, source, job, device, snapshot, terminal)
    set_random_state(made["random"], device, data.train)
    apply_mask(network, made["mask"])
    if hasattr(network, "select"):
        network.select(tasks)
    wanted = {t: data.objectives[t] for t in tasks}
    recover(
        network,
        data.train,
        job.losses,
        tasks,
        steps=args.steps,
        lr=args.lr,
        mask=made["mask"],
        progress=lambda steps: told(terminal, steps, "adapting"),
        resume=snapshot,
    )
    after = evaluate(network, terminal.track(data.test, "evaluating"), wanted)
    network.cpu()
    zeros = component_sparsity(network, {n: m.cpu() for n, m in made["mask"].items()}, job.used, tasks)
    facts = {
        "tasks": tasks,
        "units": args.units,
        "budget": [str(b) for b in args.budget],
        "sparsity": zeros,
        "similarity": {"kind": args.similarity, "values": made["similarities"]},
        "neighbours": made["weights"],
        "metrics": {"adapted": after},
    }
    save(source, network, tasks, facts, args.out, CUT)
    rows = [(n, f"{made['similarities'][n]:.4g}", f"{w:.3g}") for n, w in made["weights"].items()]
    shown = [
        table(("neighbour", args.similarity, "weight"), rows),
        table(("task/metric", "adapted"), [(k, f"{v:.4g}") for k, v in after.items()]),
        f"sparsity {zeros['kept']:.1%}; masked model: {args.out}",
    ]
    seconds = {"cut_seconds": round(made["seconds"], 2), "adapt_seconds": round(seconds_of(snapshot), 2)}
    return {**facts, "out": str(args.out), **seconds}, shown


def _cut(
    args: argparse.Namespace,
    source: Source,
    job: Any,
    device: torch.device,
    snapshot: Snapshot,
    terminal: Terminal,
) -> dict[str, Any]:
    """Find the neighbours and cut, once: a command that goes on has it in its file."""
    from dataclasses import replace

    from cut.commands.prune import size_of_facts
    from cut.objectives import moved
    from cut.poll import Poll
    from cut.randomness import random_state

    data, scorer = source.labelled(), _scorer(args, source)
    start = time.perf_counter()
    batches = [moved(b, device) for b in terminal.track(data.score(scorer.batches), "comparing tasks")]
    scores = scorer(job.network, batches, job.losses, job.tasks)
    # The facts that are saved list every entry's similarity; they count in a budget of bytes.
    room = size_of_facts(source.meta, args, dict.fromkeys(data.objectives, 0.0)) + 120 * len(scorer.similarities)
    mask = replace(job, fusion=Poll(0.5 if args.soft else None), facts=room).mask(scores)
    made = {
        "mask": {n: m.cpu() for n, m in mask.items()},
        "similarities": {n: v if abs(v) < float("inf") else None for n, v in scorer.similarities.items()},
        "weights": scorer.weights,
        "seconds": time.perf_counter() - start,
        "random": random_state(device, data.train),
    }
    snapshot.keep("cut", made)
    return made
