"""Latency: shipped files timed side by side on this machine, each in a process of its own, in turns.

A machine's speed wanders, so files are timed in rounds (a, b, c, a, b, c, ...), and a ratio is the median of the ratios
within a round.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cut.cost import Latency, size_on_disk, summary
from cut.runtime import kind

# The package without its __init__, which imports PyTorch: a process that runs an ONNX file should not hold it.
_START = """
import sys, types
package = types.ModuleType("cut")
package.__path__ = [sys.argv[1]]
sys.modules["cut"] = package
from cut.stopwatch import main
main()
"""
# With a builder: code of the user's, which may use the whole package.
_START_WHOLE = """
import os, sys
sys.path.insert(1, os.path.dirname(sys.argv[1]))
from cut.stopwatch import main
main()
"""


IDLE = 0.3  # of a core: where processes that want to run are more, they take time that is measured as the model's


def load_of_machine() -> float:
    """Processes that wanted to run, average of the last minute."""
    return os.getloadavg()[0]


def told_load(load: float) -> str:
    """A load in words.

    Example:
        >>> told_load(0.125).partition(" on ")[0]
        'load 0.12'
    """
    return f"load {load:.2f} on {os.cpu_count()} cores"


def warning_of(load: float) -> str:
    """What to tell someone who times on a machine with this load; empty if it is idle."""
    if load <= IDLE * (os.cpu_count() or 1):
        return ""
    return f"the machine is not idle: {told_load(load)}, above {IDLE} a core; latencies will mean little"


@dataclass(frozen=True)
class Timing(Latency):
    """Latency of a file for one picture, and what its process takes.

    Attributes:
        runtime: What ran it.
        rounds_ms: Median of each round, in order; those of files timed together belong together.
        bytes: The file's, or the folder's, size.
        peak_bytes: The process's memory at its highest: interpreter, runtime, model and activations.
        model_bytes: How much of it came on top when the file was opened and run.
        load: Processes that wanted to run, average of the minute before; an idle machine has less than about 0.3 a
            core.
    """

    runtime: str
    rounds_ms: tuple[float, ...]
    bytes: int
    peak_bytes: int
    model_bytes: int
    load: float


@dataclass(frozen=True)
class Ratio:
    """A ratio of two files' latencies: the median over rounds, and the lowest and highest of them."""

    median: float
    low: float
    high: float


def compare(
    files: Mapping[str, str | Path],
    *,
    threads: int = 1,
    warmup: int = 5,
    repeats: int = 50,
    rounds: int = 5,
    size: Sequence[int] | None = None,
    builder: str | None = None,
    progress: bool = True,
) -> dict[str, Timing]:
    """Time files side by side; the machine should be idle.

    Args:
        files: Name to ``.onnx``, ``.pte``, or the folder of a compact model; any mixture, such as the dense, the
            masked and the compact form in three runtimes.
        threads: Of each runtime.
        warmup: Calls of each before the first round.
        repeats: Timed calls of each in all.
        rounds: Turns that they are dealt to.
        size: Height and width of the input; None = what the file says.
        builder: ``module:function`` that builds the dense network of folders with a foreign model: it returns the
            network, or a tuple that begins with it.
        progress: Show a bar on stderr.

    Raises:
        ValueError: If there are no files, a number is out of range, or a file cannot be opened; the message names it.
    """
    from rich.console import Console  # not needed by who only loads a model
    from rich.progress import Progress

    _check(files, threads, warmup, repeats, rounds)
    load = load_of_machine()
    job = {"threads": threads, "warmup": warmup, "size": list(size) if size else None}
    times: dict[str, list[list[float]]] = {name: [] for name in files}
    peaks: dict[str, int] = {}
    share = [repeats // rounds + (i < repeats % rounds) for i in range(rounds)]
    with contextlib.ExitStack() as stack:
        # On stderr: stdout is the caller's, who may print JSON.
        bar = stack.enter_context(Progress(console=Console(stderr=True), transient=True, disable=not progress))
        task = bar.add_task("timing", total=len(files) * (rounds + 1))
        workers = {}
        for name, path in files.items():
            mine = {**job, "path": str(path), "builder": builder if kind(path) == "PyTorch" else None}
            workers[name] = stack.enter_context(_worker(name, mine))
            bar.advance(task)
        for count in share:
            for name, worker in workers.items():
                answer = worker.ask(count)
                times[name].append(answer["times"])
                peaks[name] = answer["peak"]
                bar.advance(task)
    result = {}
    for name, worker in workers.items():
        whole = summary([t for part in times[name] for t in part], threads)
        result[name] = Timing(
            **vars(whole),
            runtime=worker.facts["runtime"],
            rounds_ms=tuple(statistics.median(part) for part in times[name]),
            bytes=size_on_disk(files[name]),
            peak_bytes=peaks[name],
            model_bytes=max(0, peaks[name] - worker.facts["before"]),
            load=load,
        )
    return result


def ratio(timing: Timing, reference: Timing) -> Ratio:
    """How long a file takes relative to another that was timed with it.

    Raises:
        ValueError: If they have different numbers of rounds.
    """
    if len(timing.rounds_ms) != len(reference.rounds_ms):
        raise ValueError(
            f"{len(timing.rounds_ms)} and {len(reference.rounds_ms)} rounds: files must be timed together to compare"
        )
    ratios = [a / b for a, b in zip(timing.rounds_ms, reference.rounds_ms, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def _check(files: Mapping[str, str | Path], threads: int, warmup: int, repeats: int, rounds: int) -> None:
    if not files:
        raise ValueError("no files to time; give at least one")
    if threads < 1 or warmup < 0 or not 1 <= rounds <= repeats:
        raise ValueError(
            f"threads {threads}, warmup {warmup}, repeats {repeats}, rounds {rounds}; "
            "allowed: threads >= 1, warmup >= 0, 1 <= rounds <= repeats"
        )
    for path in files.values():
        kind(path)


class _Worker:
    """The other end of :mod:`cut.stopwatch`."""

    def __init__(self, name: str, process: subprocess.Popen[str], errors: IO[str]) -> None:
        self.name, self.process, self.errors = name, process, errors
        self.facts: dict[str, Any] = {}

    def ask(self, message: Any) -> dict[str, Any]:
        """Send a line and wait for the answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
            found: dict[str, Any] = json.loads(self.process.stdout.readline())
        except (OSError, ValueError) as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=10)
            self.errors.seek(0)
            last = (self.errors.read().strip().splitlines() or ["it gave no answer"])[-1]
            raise ValueError(f"{self.name}: timing failed ({self.process.returncode}): {last}") from error
        if "error" in found:
            raise ValueError(f"{self.name}: {found['error']}")
        return found


@contextlib.contextmanager
def _worker(name: str, job: dict[str, Any]) -> Iterator[_Worker]:
    """A fresh process that has a file open."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(job["threads"]), "MKL_NUM_THREADS": str(job["threads"])}
    start = _START_WHOLE if job["builder"] else _START
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", start, str(Path(__file__).parent)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            text=True,
        )
        try:
            worker = _Worker(name, process, errors)
            worker.facts = worker.ask(job)
            yield worker
        finally:
            process.kill()  # it holds nothing that must be put away
            process.communicate()
