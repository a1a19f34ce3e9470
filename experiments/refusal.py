"""Refusal: bad input on an experiment's command line ends with the reason and exit code 2, without a traceback."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Protocol


class Main(Protocol):
    """The entry point of a command: arguments (default: the process's) to an exit code."""

    def __call__(self, argv: Sequence[str] | None = None) -> int:
        """Run it."""
        ...


def refusing(main: Callable[..., int]) -> Main:
    """A command's ``main`` that prints what was wrong with its input and gives 2 instead of raising it.

    Bad input is a ValueError, as everywhere in this project, or a file that cannot be read or written.

    Example:
        >>> @refusing
        ... def main(argv=None):
        ...     raise ValueError("sparsity 2; allowed: below 1")
        >>> main([])
        2
    """

    @functools.wraps(main)
    def told(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    return told
