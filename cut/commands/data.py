"""``cut data check``: validate a published data set on disk."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from cut.commands import options
from cut.commands.terminal import Terminal

EXAMPLE = """examples:
  cut data check /data/nyu_v2
  cut data check /data/taskonomy --set taskonomy --json
"""
SHOWN = 50  # lines of what is wrong


def add(commands: Any) -> None:
    """The command's options."""
    data = commands.add_parser("data", help="look at a data set")
    kinds = data.add_subparsers(dest="kind", required=True, metavar="WHAT")
    check = options.add_command(
        kinds,
        "check",
        help="open every file of NYU-v2, Cityscapes or Tiny-Taskonomy and list what is wrong",
        epilog=EXAMPLE,
    )
    options.folders(check.add_argument("path", type=Path, help="folder of the set"))
    check.add_argument("--set", help="nyuv2, cityscapes or taskonomy; default: found from the folder")
    check.add_argument("--legacy", action="store_true", help="for the published protocol: repeated pictures only warn")
    options.add_output(check)
    check.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Check a set and say what is wrong; an error if anything is.

    Raises:
        ValueError: If it is no set, or something is wrong with it.
    """
    from cut.data.check import check

    terminal = Terminal(args)
    report = check(args.path, args.set, lambda examples: terminal.track(examples, "checking"), args.legacy)
    shown = [report.summary]
    for kind, lines in (("wrong", report.wrong), ("warning", report.warnings)):
        shown += [f"{kind}: {line}" for line in lines[:SHOWN]]
        if len(lines) > SHOWN:
            shown.append(f"... and {len(lines) - SHOWN} more (--json lists all)")
    terminal.result(dataclasses.asdict(report), shown)  # not on stderr, where lines are broken at 80 columns
    if report.wrong:
        count = "1 thing is" if len(report.wrong) == 1 else f"{len(report.wrong)} things are"
        raise ValueError(f"{args.path}: {count} wrong, the first: {report.wrong[0]}")
