"""The ``cut`` command: one module per command in :mod:`cut.commands`."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
import sysconfig
import traceback
from collections.abc import Sequence
from pathlib import Path

from cut.commands import bench, compact, data, export, fit, info, newtask, predict, prune

COMMANDS = (fit, prune, newtask, compact, export, predict, bench, info, data)
DESCRIPTION = "Cut a multi-task vision model down to the tasks a device needs."
EPILOG = """MODEL is one of
  a folder          that holds a model of ours: a run, or what fit, prune and compact write
  a file .ckpt      that a Lightning trainer wrote of cut.model.MultiTaskModel
  module:function   of your own (found in the folder you are in), called without arguments; it returns
                      (model, loader, tasks, example), then, if you like, a test loader (or None) and facts
                    model's forward gives {task: tensor}; tasks are {task: loss} or {task: (loss, {name: metric})},
                    each a function of (output, batch); example is an input tensor
                    facts are what exported files say and cannot be seen: as much as you like of
                      {"input": {"mean": [...], "std": [...]}, "tasks": {task: {"kind": "depth", "unit": "m"}}}
                    by default pictures are given as they are, 0 to 1, and an output's shape says its kind
                    --weights FOLDER loads what fit, prune or compact wrote of it
  predict and bench also take a file .onnx or .pte

from a dense model to a file:
  cut fit mobilenetv2_100 --tasks seg depth normal --steps 1000 --out runs/dense
  cut info runs/dense
  cut prune runs/dense --tasks seg depth --sparsity 0.9 --out runs/pruned
  cut compact runs/pruned --out runs/small
  cut export runs/small --out small.onnx
  cut predict small.onnx room.jpg

Exit codes: 0 it worked, 2 bad input, 130 stopped. Tab completion: eval "$(cut --print-completion bash)" (or zsh, tcsh).
"""


def _version() -> str:
    """The installed version; a checkout that is not installed has none."""
    try:
        return importlib.metadata.version("cut")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="cut",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"cut {_version()}")
    top.add_argument("--print-completion", choices=("bash", "zsh", "tcsh"), help="print a completion script")
    commands = top.add_subparsers(dest="command", metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return top


def _completion(top: argparse.ArgumentParser, shell: str) -> int:
    """Print the completion script of a shell."""
    try:
        import shtab
    except ImportError:
        print("cut: completion needs shtab (pip install shtab)", file=sys.stderr)
        return 2
    print(shtab.complete(top, shell=shell))
    if shell == "bash":  # else module:function is three words
        print('COMP_WORDBREAKS="${COMP_WORDBREAKS//:}"')
    return 0


def _place(error: Exception) -> str | None:
    """Where in the user's own code, such as that of ``module:function``, an error arose; None if in none of it."""
    paths = (sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    others = ("<", *(f"{folder}{os.sep}" for folder in (Path(__file__).parent, *paths)))
    own = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(others)]
    return f"{own[-1].filename}, line {own[-1].lineno}, in {own[-1].name}" if own else None


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 if it worked, 2 for bad input, 130 if stopped."""
    top = parser()
    args = top.parse_args(argv)
    if args.print_completion:
        return _completion(top, args.print_completion)
    if args.command is None:
        top.error(f"which command? one of {', '.join(c.__name__.rpartition('.')[2] for c in COMMANDS)}")
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"cut: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Exception as error:
        place = _place(error)
        if place is None:
            raise  # a fault of ours, to be seen whole
        print(f"cut: {type(error).__name__}: {' '.join(str(error).split())} ({place})", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"cut: {str(stop) or 'stopped'}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
