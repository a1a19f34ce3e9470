"""Budgets on the command line: ``params=2e6``, ``macs=0.3``, ``bytes=4MB``, ``latency=0.5x``, ``latency=20ms``."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cut.commands import options

_METRIC = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}
_BYTES = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}
UNITS: Mapping[str, Mapping[str, float]] = {
    "params": _METRIC,
    "macs": _METRIC,
    "bytes": {"": 1.0, **_BYTES},
    "latency": {"ms": 1.0, "s": 1e3},
}
EXAMPLES = "params=2e6, macs=0.3, bytes=4MB, latency=0.5x, latency=20ms"
WHY_NOT_WEIGHTS = {
    "macs": "single weights that are zero are multiplied like others, so the mask does not change the MACs",
    "bytes": "what single zero weights save on disk depends on how the file is stored, not on the mask",
    "latency": "single weights that are zero take as long as others",
}


def add(parser: argparse.ArgumentParser, examples: str = f"such as {EXAMPLES}") -> None:
    """How much is cut, and in what units."""
    parser.add_argument("--sparsity", type=options.sparsity, help="fraction of the weights (or channels) removed")
    parser.add_argument("--budget", type=wish, action="append", default=[], metavar="WHAT=N", help=examples)
    parser.add_argument("--units", choices=("weights", "channels"), default="weights", help="what is cut together")
    multiple = "layers keep a multiple of N channels (default: 1; with a latency 8, where runtimes are fastest)"
    parser.add_argument("--rounding", type=options.whole(1), help=multiple)
    parser.add_argument("--cap", type=options.positive_share, default=1.0, help="largest share of a layer that stays")
    parser.add_argument("--floor", type=options.share, help="share of every layer that stays (default: at most 0.05)")


@dataclass(frozen=True)
class Wish:
    """One budget as a user states it.

    Attributes:
        kind: ``params``, ``macs``, ``bytes`` or ``latency``.
        amount: Parameters, multiply-accumulates, bytes or milliseconds; with ``relative`` a share.
        relative: Whether the amount is a share of the dense model with the same kept heads.
    """

    kind: str
    amount: float
    relative: bool

    def absolute(self, dense: float) -> float:
        """The amount, given the dense model's."""
        return self.amount * dense if self.relative else self.amount

    def __str__(self) -> str:
        unit = "x" if self.relative else "ms" if self.kind == "latency" else ""
        whole = not self.relative and self.amount.is_integer()
        return f"{self.kind}={int(self.amount) if whole else format(self.amount, 'g')}{unit}"


def wish(text: str) -> Wish:
    """A budget from the command line.

    A number with ``x``, or one up to 1 without a unit, is a share of the dense model with the same kept heads.

    Raises:
        argparse.ArgumentTypeError: If it is none; the message says what is allowed.

    Example:
        >>> wish("params=2e6"), str(wish("latency=0.5x")), wish("bytes=4MB").amount
        (Wish(kind='params', amount=2000000.0, relative=False), 'latency=0.5x', 4000000.0)
    """
    kind, _, value = text.partition("=")
    if kind not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: {', '.join(UNITS)}, such as {EXAMPLES}")
    match = re.fullmatch(r"(\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+)\s*([A-Za-z]*)", value)
    units = UNITS[kind]
    if match is None or match[2] not in {*units, "x", ""}:
        names = ", ".join(u for u in (*units, "x") if u)
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a number, then one of {names}, such as {EXAMPLES}")
    amount, unit = float(match[1]), match[2]
    relative = unit == "x" or (unit == "" and amount <= 1)
    if not relative and unit not in units:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: {', '.join(units)}, or a share such as {kind}=0.5x")
    if relative and not 0 < amount <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a share above 0 and up to 1 of the dense model")
    if not relative:
        amount *= units[unit]
    least = 0.0 if relative or kind == "latency" else 1.0
    if not least < amount < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: above {least:g}, and finite")
    return Wish(kind, amount, relative)


def check(wishes: Sequence[Wish], sparsity: float | None, units: str, floor: float | None) -> None:
    """Refuse budgets that cannot be met, before any work.

    Raises:
        ValueError: If there is no budget or one twice, one that weights cannot meet, or a floor above the budget.
    """
    if sparsity is None and not wishes:
        raise ValueError(f"how much to cut? give --sparsity 0.9 or --budget ({EXAMPLES})")
    kinds = [w.kind for w in wishes]
    twice = sorted({k for k in kinds if kinds.count(k) > 1})
    if twice:
        raise ValueError(f"--budget {twice[0]} is given twice")
    if units == "weights":
        for asked in wishes:
            if asked.kind in WHY_NOT_WEIGHTS:
                reason = WHY_NOT_WEIGHTS[asked.kind]
                raise ValueError(f"--budget {asked} cannot be met by cutting weights: {reason}; use --units channels")
    if units == "weights" and sparsity is not None and floor is not None and floor > 1 - sparsity + 1e-9:
        raise ValueError(
            f"--sparsity {sparsity:g} is out of reach: the floor keeps {floor:g} of every layer; "
            f"allowed: --floor up to {1 - sparsity:.4g}"
        )
