"""Options that several commands share, in the words of the YAML files, and their values' checks."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESUMES = "Stopped or killed, the same command goes on where it was; --restart begins anew.\n\n"
SOURCE = "a folder with a model or a run, a Lightning checkpoint of ours, or module:function (see cut --help)"


def number(low: float, high: float, what: str, closed: bool = True) -> Callable[[str], float]:
    """A parser of numbers from ``low`` to ``high``; without ``closed``, the upper end is not allowed."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not (low <= value <= high if closed else low <= value < high):
            raise argparse.ArgumentTypeError(f"{text!r}; allowed: {what}")
        return value

    return read


def whole(least: int) -> Callable[[str], int]:
    """A parser of whole numbers of at least ``least``."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r}; allowed: whole numbers of at least {least}")
        return value

    return read


def rate(text: str) -> float:
    """A learning rate: above 0 and at most 10."""
    value = number(0, 10, "a number above 0")(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a number above 0")
    return value


def positive_share(text: str) -> float:
    """A share above 0 and up to 1."""
    value = share(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: above 0 and up to 1")
    return value


def files(action: argparse.Action) -> argparse.Action:
    """Let the tab key complete an argument with names of files and folders."""
    return _completed(action, "FILE")


def folders(action: argparse.Action) -> argparse.Action:
    """Let the tab key complete an argument with names of folders."""
    return _completed(action, "DIRECTORY")


def _completed(action: argparse.Action, what: str) -> argparse.Action:
    try:
        import shtab
    except ImportError:  # who has it not prints no completion script either
        return action
    action.complete = getattr(shtab, what)  # type: ignore[attr-defined]
    return action


share = number(0, 1, "0 to 1")
sparsity = number(0, 1, "0 <= sparsity < 1 (the fraction removed)", closed=False)


def add_command(
    commands: Any, name: str, help: str, epilog: str, description: str | None = None
) -> argparse.ArgumentParser:
    """A command of its own; its examples are printed as they stand."""
    return commands.add_parser(
        name, help=help, description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_source(parser: argparse.ArgumentParser, what: str = "model") -> None:
    """What the command works on."""
    files(parser.add_argument("source", metavar="MODEL", help=f"the {what}: {SOURCE}"))
    add_weights(parser)
    data = "YAML as in configs/data, or class path, of a folder's data (default: Rooms)"
    files(parser.add_argument("--data", metavar="DATA", help=data))
    parser.add_argument("--seed", type=whole(0), default=0, help="of data order and training (default: 0)")


def add_training(parser: argparse.ArgumentParser, steps: int, lr: float) -> None:
    """How long and how fast to train."""
    parser.add_argument("--steps", type=whole(0), default=steps, help=f"training steps (default: {steps})")
    parser.add_argument("--lr", type=rate, default=lr, help=f"highest learning rate (default: {lr:g})")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    parser.add_argument(
        "--restart", action="store_true", help="begin anew, latencies included, though a stopped run could go on"
    )


def add_weights(parser: argparse.ArgumentParser) -> None:
    """What is loaded into a model of one's own."""
    told = "model file for the model of module:function"
    folders(parser.add_argument("--weights", type=Path, metavar="FOLDER", help=told))


def add_out(parser: argparse.ArgumentParser, what: str, required: bool = True, file: bool = False) -> argparse.Action:
    """The folder, or the file, that the result goes to."""
    kind = new_file if file else new_folder
    action = parser.add_argument("--out", type=kind, required=required, metavar="PATH", help=what)
    return files(action) if file else folders(action)


def new_folder(text: str) -> Path:
    """A folder that can be made, or is there."""
    return _writable(Path(text), "a folder", Path.is_dir)


def new_file(text: str) -> Path:
    """A file that can be made, or is there."""
    return _writable(Path(text), "a file", Path.is_file)


def _writable(path: Path, what: str, is_one: Callable[[Path], bool]) -> Path:
    """The path, if what is there now, and what is above it, lets it be made: told before any work, not after it."""
    if path.exists() and not is_one(path):
        raise argparse.ArgumentTypeError(f"{path} is there and is not {what}")
    above = next((p for p in path.absolute().parents if p.exists()), Path("/"))
    if not above.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: {above} is not a folder")
    if not os.access(path if path.exists() else above, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path} cannot be written")
    return path


def add_output(parser: argparse.ArgumentParser) -> None:
    """How the command talks."""
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--quiet", "-q", action="store_true", help="no progress, no summary")
