"""``cut compact``: remove what is cut and the heads of dropped tasks; the outputs stay the same."""

from __future__ import annotations

import argparse
from typing import Any

from cut.commands import options
from cut.commands.terminal import Terminal, human, in_bytes, table

EXAMPLES = """examples:
  cut compact runs/pruned --out runs/small
  cut compact runs/demo/dense --tasks seg --out runs/seg-only           (drop heads, cut nothing)
  cut compact mine:setup --weights runs/pruned --out runs/small
"""


def add(commands: Any) -> None:
    """The command's options."""
    parser = options.add_command(
        commands,
        "compact",
        help="make a pruned model small",
        description="Remove dropped heads and dead channels for real; checked to give the same outputs.",
        epilog=EXAMPLES,
    )
    options.add_source(parser, "pruned model")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="the tasks to keep (default: all that it puts out)")
    options.add_out(parser, "folder for the compact model")
    options.add_output(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Compact.

    Raises:
        ValueError: If there is no such model or task.
    """
    terminal = Terminal(args)
    from cut import checkpoint
    from cut.commands.opening import open_source
    from cut.compact import compact
    from cut.cost import cost
    from cut.decomposition import check_tasks

    source = open_source(args.source, args.weights, args.data, args.seed)
    tasks = check_tasks(args.tasks or source.tasks, source.tasks)
    terminal.say("removing what is cut ...")
    small = compact(source.network, tasks, None, source.example)
    difference = largest_difference(source.network, small, source.example, tasks)
    meta = dict(source.meta)
    if "tasks" in meta:
        meta["tasks"] = {t: meta["tasks"][t] for t in tasks}
    size = checkpoint.save(small, args.out, metadata=meta)
    before, after = (cost(n, source.example) for n in (source.network, small))
    facts = {
        "out": str(args.out),
        "tasks": tasks,
        "max_abs_diff": difference,
        "before": {"params": before.params, "nonzero": before.nonzero, "macs": before.macs},
        "after": {"params": after.params, "nonzero": after.nonzero, "macs": after.macs, "bytes": size},
    }
    rows = [(k, human(getattr(before, k)), human(getattr(after, k))) for k in ("params", "nonzero", "macs")]
    lines = [
        table(("", "before", "compact"), rows),
        f"outputs differ by at most {difference:.1e}; {in_bytes(size)} on disk: {args.out}",
    ]
    terminal.result(facts, lines)


def largest_difference(model: Any, small: Any, example: Any, tasks: list[str]) -> float:
    """The largest absolute difference of any kept output on the example."""
    import torch

    with torch.no_grad():
        expected, found = model(example), small(example)
    return max(float((expected[t] - found[t]).abs().max()) for t in tasks)
