"""Timing: several exported models timed in turns, so that what else the machine does hits all of them alike."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from cut.records import Record, machine

ROUNDS, WARMUP = 60, 5


def in_turns(paths: Mapping[str, Path], image: np.ndarray, rounds: int = ROUNDS) -> dict[str, Any]:
    """Median and 95th percentile of one run of each file on one thread of ONNX Runtime, the files taking turns.

    Args:
        paths: Name to ONNX file.
        image: One input [1, 3, H, W].
        rounds: How often each file is run.

    Returns:
        ``latency`` by name, as in a record's cost, and the machine.
    """
    from cut import export

    opened = {name: export.session(path) for name, path in paths.items()}
    times: dict[str, list[float]] = {name: [] for name in paths}
    for i in track(range(WARMUP + rounds), "timing the exported models in turns", transient=True):
        for name, model in opened.items():
            start = time.perf_counter()
            model.run(None, {"image": image})
            if i >= WARMUP:
                times[name].append(1e3 * (time.perf_counter() - start))
    latency = {
        name: {
            "median_ms": round(float(np.median(t)), 4),
            "p95_ms": round(float(np.percentile(t, 95)), 4),
            "repeats": rounds,
            "threads": 1,
            "runtime": "ONNX Runtime",
        }
        for name, t in times.items()
    }
    return {"latency": latency, "machine": machine()}


def timed(dense: Record, pruned: Sequence[Record], timing: Mapping[str, Any]) -> tuple[Record, list[Record]]:
    """Copies of records whose latencies are those of one timing in turns.

    Args:
        dense: The dense record; its name in the timing is ``dense_all_heads``.
        pruned: Records cut from it, timed under their methods' names; the first one's ``kept_heads`` too.
        timing: From :func:`in_turns`.
    """
    dense, others = copy.deepcopy(dense), copy.deepcopy(list(pruned))
    latency = timing["latency"]
    dense.cost["dense_all_heads"].setdefault("onnx", {})["latency"] = latency["dense_all_heads"]
    for record in others:
        record.cost["kept_heads"].setdefault("onnx", {})["latency"] = latency["kept_heads"]
        record.cost["compact"].setdefault("onnx", {})["latency"] = latency[record.method]
    return dense, others
