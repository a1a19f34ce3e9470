"""``cut fit``: train a model on all its tasks, or train a pruned one further; what is cut stays cut."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cut.commands import options
from cut.commands.terminal import Terminal, finite, table

if TYPE_CHECKING:
    from cut.commands.source import Source

EXAMPLES = """examples:
  cut fit mobilenetv2_100 --tasks seg depth --steps 1000 --out runs/dense     (any timm name; trained on --data)
  cut fit runs/pruned --steps 500 --out runs/longer                           (what is cut stays cut)
  cut fit mine:setup --steps 1000 --out runs/mine
"""


def add(commands: Any) -> None:
    """The command's options."""
    parser = options.add_command(
        commands,
        "fit",
        help="train a model, or fine-tune a pruned one further",
        description="Train a multi-task model with AdamW; of a pruned model, what is cut stays cut.",
        epilog=options.RESUMES + EXAMPLES,
    )
    options.add_source(parser)
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="of a new model's data, or the tasks to train")
    options.add_training(parser, steps=1000, lr=2e-3)
    options.add_out(parser, "folder for the trained model")
    options.add_output(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Fit.

    Raises:
        ValueError: For options that do not fit the model, before any work starts.
    """
    terminal = Terminal(args)
    import torch

    from cut import checkpoint
    from cut.commands.resuming import resumable, seconds_of, told
    from cut.commands.source import CUT, device_of, held
    from cut.decomposition import check_tasks
    from cut.objectives import evaluate
    from cut.recovery import recover

    device = device_of(args.device)
    torch.manual_seed(args.seed)
    source = _source(args)
    with resumable(args, source) as snapshot:
        data, network, mask = source.labelled(), source.network, held(source)
        tasks = check_tasks(args.tasks or source.tasks, source.tasks)
        wanted = {t: data.objectives[t] for t in tasks}
        recover(
            network.to(device),
            data.train,
            {t: o.loss for t, o in wanted.items()},
            tasks,
            steps=args.steps,
            lr=args.lr,
            mask=mask,
            weights={t: o.weight for t, o in wanted.items()},
            progress=lambda steps: told(terminal, steps, "training"),
            resume=snapshot,
        )
        seconds = seconds_of(snapshot)
        found = evaluate(network, terminal.track(data.test, "evaluating"), wanted)
        network.cpu()
        facts = {"tasks": source.tasks, "metrics": found, "steps": args.steps}
        kept = {k: v for k, v in source.meta.items() if k == CUT}
        if kept:
            kept[CUT] = {**kept[CUT], "metrics": {**kept[CUT].get("metrics", {}), "fitted": found}}
        size = checkpoint.save(network, args.out, metadata=finite({**source.meta, **kept}))
    rows = [(k, f"{v:.4g}") for k, v in found.items()]
    shown = {**facts, "out": str(args.out), "bytes": size, "seconds": round(seconds, 2)}
    terminal.result(shown, [table(("task/metric", "value"), rows), f"model: {args.out}"])


def _source(args: argparse.Namespace) -> Source:
    """What is trained: what there is under the name, or a new network on a timm backbone."""
    from cut.commands.opening import fresh, open_source

    if ":" in args.source or Path(args.source).exists():
        return open_source(args.source, args.weights, args.data, args.seed, labels=True)
    return fresh(args.source, args.data, args.tasks, args.seed)
