"""Resuming: the file beside a command's output from which the same command goes on after it was stopped."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cut.commands.source import Source
from cut.commands.terminal import Terminal
from cut.recovery import SECTION
from cut.snapshot import Snapshot, digest

# Options that change nothing in the result.
_FREE = ("out", "json", "quiet", "restart", "run", "command", "print_completion")


@contextmanager
def resumable(args: argparse.Namespace, source: Source) -> Iterator[Snapshot]:
    """Where a command stands, kept in ``OUT.resume.pt`` while the block runs.

    Args:
        args: The command's options; with ``restart``, what is there is deleted first.
        source: The opened model, as it was when the command began.

    Yields:
        The snapshot. It is deleted when the block ends well, or ends by bad input before anything was trained.

    Raises:
        ValueError: If the file is of a command with other options, or of another model.
        KeyboardInterrupt: At Ctrl-C; it says whether there is something to go on from.
    """
    path = args.out.parent / f"{args.out.name}.resume.pt"
    if args.restart:
        path.unlink(missing_ok=True)
    snapshot = Snapshot(path, key_of(args, source), "give the same options to go on, or --restart to begin anew")
    try:
        yield snapshot
    except KeyboardInterrupt as stop:
        if path.exists():
            raise KeyboardInterrupt(f"stopped; the same command goes on from {path}, --restart begins anew") from stop
        raise
    except ValueError:
        if snapshot.get(SECTION) is None:
            snapshot.remove()
        raise
    snapshot.remove()


def key_of(args: argparse.Namespace, source: Source) -> dict[str, Any]:
    """What a command's result depends on: options, the model with its weights, an example input, the data's file."""
    options = {f"--{k}": _plain(v) for k, v in sorted(vars(args).items()) if k not in _FREE}
    options["model"] = options.pop("--source")
    if (contents := contents_of(args.data)) is not None:
        options["contents of --data"] = contents
    weights, example = digest(source.network.state_dict()), digest({"": source.example})
    return {**options, "tasks of the model": source.tasks, "weights of the model": weights, "example input": example}


def contents_of(data: str | None) -> str | None:
    """Short digest of the file that ``--data`` names, None if it names a class or there is none."""
    if data is None or not Path(data).is_file():
        return None
    return hashlib.sha256(Path(data).read_bytes()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """An option as JSON holds it."""
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def told(terminal: Terminal, steps: Iterable[int], what: str) -> Iterable[int]:
    """The steps with a progress bar; of a training that goes on, a line says from where."""
    if isinstance(steps, range) and steps.start:
        terminal.say(f"going on: {steps.start} of {steps.stop} steps of {what} are done")
    return terminal.track(steps, what)


def seconds_of(snapshot: Snapshot) -> float:
    """How long the training took until it was kept last, interruptions left out; 0 if there was none."""
    return float((snapshot.get(SECTION) or {}).get("seconds", 0.0))
