"""Stopwatch: a process that opens one shipped file and times it whenever it is told to.

:mod:`cut.latency` starts one for each file, so that each has a memory of its own, and lets them run in turns. It reads
lines of JSON (a number of calls) and answers each with a line of JSON; an empty line ends it.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cut import runtime

_AHEAD = 2  # calls before the clock starts when it is a file's turn again: caches hold the other file's data


def memory(key: str) -> int:
    """Bytes of this process's memory.

    Args:
        key: ``VmRSS`` = now, ``VmHWM`` = at its highest. Where the system tells no such thing, the highest.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split(f"{key}:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return highest if sys.platform == "darwin" else highest * 1024


def _builder(name: str | None) -> Callable[[], Any] | None:
    """The dense network of ``module:function``, which the user gave; a model file never does.

    What the function makes beside it (it may read a data set) stays, and is not counted as the model's.
    """
    if name is None:
        return None
    import importlib

    module, _, function = name.partition(":")
    made = getattr(importlib.import_module(module), function)()

    def network() -> Any:
        # All that was made stays as long as this does: freed while the model runs, it would hide what the model takes.
        return made[0] if isinstance(made, (tuple, list)) and made else made

    return network


def _warm_imports(kind: str) -> None:
    """Import a runtime, so that what it takes is not counted as the model's; opening tells if it is not there."""
    with contextlib.suppress(ImportError):
        _imports(kind)


def _imports(kind: str) -> None:
    if kind == "ONNX Runtime":
        import onnxruntime  # noqa: F401
    elif kind == "ExecuTorch":
        with runtime.muted():
            import executorch.runtime  # noqa: F401
    else:
        import cut.checkpoint
        import cut.network  # noqa: F401


def _open(job: dict[str, Any]) -> tuple[Callable[[], Any], dict[str, Any]]:
    """A call of the model on one input, and what there is to say before the first."""
    kind = runtime.kind(job["path"])
    _warm_imports(kind)
    builder = _builder(job["builder"])
    if builder is not None:
        with contextlib.suppress(OSError):  # where the system cannot, what the function took for a while counts
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the highest so far is forgotten
    before = memory("VmRSS")
    opened = runtime.open_file(job["path"], job["threads"], builder)
    image = np.random.default_rng(0).standard_normal((1, *_shape(job, opened)), dtype=np.float32)
    return lambda: opened.run(image), {"runtime": opened.runtime, "before": before}


def _shape(job: dict[str, Any], opened: runtime.Opened) -> tuple[int, ...]:
    """Of one entry of the input: of the size that is asked for, else as the file says."""
    if job["size"]:
        return (opened.shape[0] if opened.shape else 3, *job["size"])
    if opened.shape is None:
        raise ValueError(f"{job['path']} does not say its input's size; give height and width")
    return opened.shape


def _timed(call: Callable[[], Any], count: int) -> list[float]:
    """Milliseconds of each of some calls."""
    times = []
    for _ in range(count):
        start = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - start) / 1e6)
    return times


def main() -> None:
    """Serve."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a runtime that prints would spoil the answers

    def answer(**facts: Any) -> None:
        print(json.dumps(facts), file=answers, flush=True)

    job = json.loads(sys.stdin.readline())
    try:
        call, facts = _open(job)
        _timed(call, job["warmup"])
    except (ValueError, ImportError, AttributeError) as error:
        answer(error=str(error))
        return
    answer(**facts)
    for line in sys.stdin:
        if not line.strip():
            break
        _timed(call, _AHEAD)
        answer(times=_timed(call, int(line)), peak=memory("VmHWM"))
