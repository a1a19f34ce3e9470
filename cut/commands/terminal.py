"""Terminal: what a command shows: progress on stderr, its result on stdout as text or as JSON."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any, TypeVar

T = TypeVar("T")
WIDTH = 200  # columns where the output is no terminal
_UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


class Terminal:
    """One command's output.

    Args:
        args: With ``json`` and ``quiet``.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.json, self.quiet = bool(getattr(args, "json", False)), bool(getattr(args, "quiet", False))

    def track(self, items: Iterable[T], what: str) -> Iterable[T]:
        """The items, with a progress bar on stderr while they are taken."""
        from rich.console import Console
        from rich.progress import track

        total = len(items) if isinstance(items, Sized) else None
        console = Console(stderr=True)
        return track(items, what, total=total, console=console, transient=True, disable=not self.shows_progress)

    @property
    def shows_progress(self) -> bool:
        """Whether someone looks at a terminal and wants to; a log would only get empty lines."""
        return not self.quiet and sys.stderr.isatty()

    def say(self, text: str) -> None:
        """A line on stderr: what is being done."""
        if not (self.quiet or self.json):
            from rich.console import Console

            Console(stderr=True).print(text, style="dim", highlight=False, markup=False)

    def warn(self, text: str) -> None:
        """A line on stderr that also who reads the result as JSON should see."""
        if not self.quiet:
            print(f"cut: warning: {text}", file=sys.stderr)

    def warn_if_busy(self, load: float) -> None:
        """Warn of latencies that will be those of a busy machine."""
        from cut.latency import warning_of

        if text := warning_of(load):
            self.warn(text)

    def result(self, facts: Mapping[str, Any], shown: Any) -> None:
        """The result: JSON, or what rich can print; nothing if quiet."""
        if self.json:
            print(json.dumps(finite(facts), default=str, allow_nan=False))
        elif not self.quiet:
            from rich.console import Console

            console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else WIDTH)
            for part in shown if isinstance(shown, (list, tuple)) else [shown]:
                console.print(part, soft_wrap=isinstance(part, str))


def finite(facts: Any) -> Any:
    """Facts as JSON can hold them: a number that is not finite, such as the metric of a class that is absent, is null.

    Example:
        >>> finite({"seg/iou": float("nan"), "depth": [1.0, float("inf")]})
        {'seg/iou': None, 'depth': [1.0, None]}
    """
    if isinstance(facts, Mapping):
        return {key: finite(value) for key, value in facts.items()}
    if isinstance(facts, (list, tuple)):
        return [finite(value) for value in facts]
    return None if isinstance(facts, float) and not math.isfinite(facts) else facts


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> Any:
    """A table whose first column is text and whose others are numbers."""
    from rich.box import SIMPLE
    from rich.table import Table

    made = Table(title=title or None, box=SIMPLE, title_justify="left")
    for i, heading in enumerate(headings):
        made.add_column(heading, justify="left" if i == 0 else "right", no_wrap=i > 0, overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def human(value: float) -> str:
    """A number with three digits and k, M or G.

    Example:
        >>> [human(v) for v in (12, 1972000, 4_100_000_000)]
        ['12', '1.97 M', '4.1 G']
    """
    for size, unit in _UNITS:
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def in_bytes(count: float) -> str:
    """Bytes for people.

    Example:
        >>> in_bytes(256), in_bytes(1_040_000)
        ('256 B', '1.04 MB')
    """
    shown = human(count)
    return f"{shown}B" if shown[-1].isalpha() else f"{shown} B"
