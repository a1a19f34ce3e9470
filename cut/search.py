"""Search: the largest model that is fast enough, found by cutting, building, exporting and timing.

Latency cannot be computed from a mask, so this lies above export: a callable makes a model of a given density and
times its file; the search narrows the density down. It knows nothing of networks or clocks.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from cut.files import write_atomically
from cut.latency import compare, ratio


class TooSlowError(ValueError):
    """Even the smallest model takes longer than the target."""


@dataclass(frozen=True)
class Target:
    """The latency to stay within.

    Attributes:
        value: Milliseconds, or the share of the dense model's latency.
        unit: ``"ms"`` or ``"x"``.

    Raises:
        ValueError: If the value is not above 0, the unit unknown, or a share above 1.
    """

    value: float
    unit: Literal["ms", "x"] = "ms"

    def __post_init__(self) -> None:
        if self.unit not in ("ms", "x"):
            raise ValueError(f"unit {self.unit!r} of a latency; allowed: 'ms', 'x'")
        if not 0 < self.value < float("inf") or (self.unit == "x" and self.value > 1):
            raise ValueError(f"latency {self}; allowed: above 0 ms, or above 0x and at most 1x of the dense model's")

    def __str__(self) -> str:
        return f"{self.value:g}{self.unit}"


@dataclass(frozen=True)
class Reading:
    """A latency in the target's unit: the middle one, and the lowest and highest of several rounds.

    Attributes:
        value: The middle one.
        low: The lowest.
        high: The highest.
        load: Processes that wanted to run in the minute before, the search's own work among them; None = not timed.
    """

    value: float
    low: float
    high: float
    load: float | None = None


@dataclass(frozen=True)
class Found:
    """What a search reached.

    Attributes:
        density: Of the largest model that is fast enough, in (0, 1].
        reading: Its latency, in the target's unit.
        readings: Density to reading of all models that the search made, in order of density.
    """

    density: float
    reading: Reading
    readings: dict[float, Reading]


def search(
    measure: Callable[[float], Reading],
    target: Target,
    *,
    highest: float = 1.0,
    lowest: float = 0.02,
    tolerance: float = 0.02,
    resolution: float = 0.005,
    most: int = 12,
    cache: Path | None = None,
    key: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Found:
    """The largest density whose latency is within the target.

    Latency need not grow evenly with density, only not fall but for noise. Each step tries where a straight line
    through the ends of the bracket meets the target, kept off the ends, so that few models are made. A density is
    never made twice.

    Args:
        measure: A density in (0, 1] (the dense model: 1) to the latency of a model of it; slow.
        target: What to stay within.
        highest: Where to begin: the density that other budgets allow.
        lowest: The smallest density worth making.
        tolerance: Stop at a model that is at most so much faster than the target, relative.
        resolution: Stop when the density is known to this.
        most: Models to make at most.
        cache: A JSON file with the readings so far: an interrupted search goes on from it.
        key: What the readings depend on (model, tasks, machine, runtime, threads); a file with another key is begun
            anew.
        progress: Show a bar on stderr.

    Raises:
        TooSlowError: If the smallest model is; the message says how slow.
        ValueError: If a number is out of range.
    """
    from rich.console import Console  # not needed by who only loads a model
    from rich.progress import Progress

    _check(highest, lowest, tolerance, resolution, most)
    notes = _Notes(measure, cache, {"target unit": target.unit, **(key or {})})
    with Progress(console=Console(stderr=True), transient=True, disable=not progress) as bar:
        task = bar.add_task(f"latency {target}", total=most)

        def value(density: float) -> float:
            bar.update(task, description=f"latency {target}: density {density:.3f}")
            reading = notes.read(density)
            bar.advance(task)
            return reading.value

        best = _narrow(value, target.value, (lowest, highest), tolerance, resolution, most)
    if best is None:
        slow = notes.readings[lowest]
        raise TooSlowError(
            f"latency {target} cannot be met: the smallest model, of density {lowest:g}, takes "
            f"{slow.value:.3g}{target.unit} ({slow.low:.3g} to {slow.high:.3g})"
        )
    return Found(best, notes.readings[best], dict(sorted(notes.readings.items())))


def _narrow(
    value: Callable[[float], float],
    target: float,
    ends: tuple[float, float],
    tolerance: float,
    resolution: float,
    most: int,
) -> float | None:
    """The largest density tried that meets the target, None if the smallest does not."""
    lowest, high = ends
    high_value = value(high)
    if high_value <= target:
        return high
    if lowest == high:
        return None
    low, low_value = 0.0, 0.0  # nothing takes no time: a guess, replaced by the first model that is fast enough
    for left in range(most - 2, -1, -1):
        if low and (high - low <= resolution or low_value >= target * (1 - tolerance)):
            break
        # Aimed a little below the target, so that the first model that lands there can be the last.
        aim = target * (1 - tolerance / 2)
        share = (aim - low_value) / (high_value - low_value) if high_value > low_value else 0.5
        middle = low + (high - low) * min(0.95, max(0.05, share))
        if not low and (middle <= lowest or left == 0):
            middle = lowest
        middle = round(middle, 6)
        found = value(middle)
        if found <= target:
            low, low_value = middle, found
        elif middle == lowest:
            return None
        else:
            high, high_value = middle, found
    return low or None


def _check(highest: float, lowest: float, tolerance: float, resolution: float, most: int) -> None:
    if not 0 < lowest <= highest <= 1:
        raise ValueError(f"densities {lowest} to {highest}; allowed: 0 < lowest <= highest <= 1")
    if not 0 <= tolerance < 1 or resolution <= 0 or most < 2:
        raise ValueError(
            f"tolerance {tolerance}, resolution {resolution}, most {most}; "
            "allowed: 0 <= tolerance < 1, resolution > 0, most >= 2"
        )


class _Notes:
    """Readings by density, made once, and kept in a file."""

    def __init__(self, measure: Callable[[float], Reading], path: Path | None, key: dict[str, Any]) -> None:
        self.measure, self.path = measure, path
        self.key = json.loads(json.dumps(key))
        self.readings: dict[float, Reading] = {}
        self.known = self._load()

    def _load(self) -> dict[float, Reading]:
        """The file's readings, none if it is missing, damaged or of another key: then they are made again."""
        if self.path is None or not self.path.is_file():
            return {}
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            if stored["key"] == self.key:
                return {float(d): Reading(**r) for d, r in stored["readings"].items()}
        return {}

    def read(self, density: float) -> Reading:
        """The reading of a density."""
        if density not in self.known:
            self.known[density] = self.measure(density)
            if self.path is not None:
                readings = {repr(d): asdict(r) for d, r in sorted(self.known.items())}
                write_atomically(self.path, json.dumps({"key": self.key, "readings": readings}, indent=1))
        self.readings[density] = self.known[density]
        return self.readings[density]


def clock(
    build: Callable[[float], Path], dense: str | Path, target: Target, **options: Any
) -> Callable[[float], Reading]:
    """What :func:`search` calls: build a model's file and time it, in turns with the dense model's file.

    Args:
        build: A density to the file of a model, exported; not called for the dense model.
        dense: The dense model's file, with the kept heads only; the reference of a share, and the model of density 1.
        target: Says in which unit.
        options: As of :func:`cut.latency.compare`: ``threads``, ``repeats``, ``rounds`` and so on.

    Returns:
        A density to its reading. A share is the median of the shares of each round, so a slow spell of the machine
        does not matter; milliseconds are as they were.
    """

    def measure(density: float) -> Reading:
        if density == 1 and target.unit == "x":
            return Reading(1.0, 1.0, 1.0)
        return timed(dense if density == 1 else build(density), dense, target, **options)

    return measure


def timed(file: str | Path, dense: str | Path, target: Target, **options: Any) -> Reading:
    """The reading of one file, timed in turns with the dense model's; arguments as of :func:`clock`."""
    both = compare({"dense": dense, "model": file}, progress=False, **options)
    if target.unit == "x":
        found = ratio(both["model"], both["dense"])
        return Reading(found.median, found.low, found.high, both["model"].load)
    rounds = both["model"].rounds_ms
    return Reading(both["model"].median_ms, min(rounds), max(rounds), both["model"].load)
