"""``cut bench``: size, memory and latency of models side by side, timed in turns; their accuracy on request."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cut.commands import options
from cut.commands.terminal import Terminal, in_bytes, table

EXAMPLES = """examples:
  cut bench runs/demo/dense runs/small small.onnx
  cut bench dense.onnx small.onnx int8.onnx --threads 4 --data configs/data/rooms.yaml --json
  cut bench mine:setup small.onnx                    (one's own model is exported to ONNX to be timed)
"""


def add(commands: Any) -> None:
    """The command's options."""
    parser = options.add_command(
        commands,
        "bench",
        help="measure size, memory and latency of models side by side",
        description="Time models for one picture, each in a fresh process, in turns, on this machine, which should be "
        "idle. Ratios are to the first.",
        epilog=EXAMPLES,
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a file .onnx or .pte, a folder, or module:function")
    parser.add_argument("--weights", type=Path, metavar="FOLDER", help="model file for the model of module:function")
    parser.add_argument("--data", metavar="DATA", help="judge each on the test pictures too: YAML, or class path")
    parser.add_argument("--threads", type=options.whole(1), default=1, help="threads (default: 1)")
    parser.add_argument("--warmup", type=options.whole(0), default=5, help="runs before the clock starts (default: 5)")
    parser.add_argument("--repeats", type=options.whole(1), default=50, help="timed runs of each (default: 50)")
    options.add_output(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Measure.

    Raises:
        ValueError: If a model cannot be opened or a runtime is missing.
    """
    terminal = Terminal(args)
    from cut.latency import compare, ratio

    with tempfile.TemporaryDirectory() as folder:
        files = {str(i): file_of(name, args.weights, Path(folder), i) for i, name in enumerate(args.models)}
        timings = compare(
            files,
            threads=args.threads,
            warmup=args.warmup,
            repeats=args.repeats,
            rounds=min(5, args.repeats),
            progress=terminal.shows_progress,
        )
        found: list[dict[str, Any]] = []
        for (key, timing), name in zip(timings.items(), args.models, strict=True):
            facts = {"model": name, **asdict(timing), "ratio": asdict(ratio(timing, timings["0"]))}
            if args.data is not None:
                facts["metrics"] = _judged(files[key], args.data)
            found.append(facts)
    shown = [table(("model", "runtime", "size", "memory", "ms", "p95", "ratio"), map(_row, found))]
    if args.data is not None:
        keys = list(dict.fromkeys(k for f in found for k in f["metrics"]))
        rows = [[k, *(f"{f['metrics'][k]:.4g}" if k in f["metrics"] else "-" for f in found)] for k in keys]
        shown.append(table(("task/metric", *(Path(m).name for m in args.models)), rows))
    terminal.result({"threads": args.threads, "repeats": args.repeats, "models": found}, shown)


def file_of(name: str, weights: Path | None, folder: Path, number: int) -> Path:
    """The file or folder that is timed; one's own model is exported into ``folder``."""
    from cut.commands.export import SUFFIXES
    from cut.commands.opening import model_folder, open_source

    path = Path(name)
    if path.suffix in SUFFIXES:
        return path
    if path.is_dir():
        return model_folder(path)
    source = open_source(name, weights if ":" in name else None)
    from cut.export import export_onnx

    written = folder / f"{number}.onnx"
    height, width = (int(s) for s in source.example.shape[-2:])
    meta = {"input": {"height": height, "width": width}, **source.meta}
    return export_onnx(source.network, written, source.example[:1], tasks=source.tasks, meta=meta).path


def _judged(path: Path, data: str) -> dict[str, float]:
    """Metrics of a file on the data's test pictures."""
    from cut.commands.opening import data_module
    from cut.evaluation import evaluate_file
    from cut.runtime import open_file

    tasks = list(open_file(path).meta.get("tasks", {})) or None
    return evaluate_file(path, data_module(data, tasks))


def _row(facts: dict[str, Any]) -> list[str]:
    """A line of the table."""
    ratio = facts["ratio"]
    return [
        facts["model"],
        facts["runtime"],
        in_bytes(facts["bytes"]),
        in_bytes(facts["model_bytes"]),
        f"{facts['median_ms']:.2f}",
        f"{facts['p95_ms']:.2f}",
        f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})",
    ]
