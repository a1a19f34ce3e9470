"""Idleness: whether the machine does nothing else, without which what is timed on it is worth nothing."""

from __future__ import annotations

import argparse
import os
import sys
import time

LIMIT = 0.3  # processes that want to run, per core
PATIENCE, POLL = 300.0, 5.0  # seconds; the load of what has just ended fades in two or three minutes


def load() -> float:
    """Processes that wanted to run in the last minute, per core."""
    return os.getloadavg()[0] / (os.cpu_count() or 1)


def wait(patience: float = PATIENCE) -> None:
    """Wait until the machine is idle.

    Args:
        patience: Seconds at most.

    Raises:
        ValueError: If it is still busy then.
    """
    end, told = time.monotonic() + patience, False
    while (now := load()) > LIMIT:
        if time.monotonic() >= end:
            raise ValueError(
                f"load {now:.2f} per core; allowed: at most {LIMIT:g}, as a busy machine's latencies are wrong: "
                "end what else runs, or time all the same (--busy)"
            )
        if not told:
            print(f"waiting for an idle machine: load {now:.2f} per core, wanted: at most {LIMIT:g}", file=sys.stderr)
        told = True
        time.sleep(POLL)


def option(parser: argparse.ArgumentParser) -> None:
    """Add ``--busy`` to a command that times."""
    parser.add_argument("--busy", action="store_true", help=f"time even at a load above {LIMIT:g} per core")
