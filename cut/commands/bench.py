"""``cut bench``: size, memory and latency of models side by side, timed in turns; their accuracy on request."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cut.commands import options
from cut.commands.export import SUFFIXES
from cut.commands.terminal import Terminal, in_bytes, table

EXAMPLES = """examples:
  cut bench runs/demo/dense runs/small small.onnx
  cut bench dense.onnx small.onnx int8.onnx --threads 4 --data configs/data/rooms.yaml --json
  cut bench mine:setup mine:setup --weights runs/dense --weights runs/small     (one's own, as ONNX)
  cut bench runs/dense runs/small small.onnx --builder mine:setup --data mine:setup
"""


def add(commands: Any) -> None:
    """The command's options."""
    parser = options.add_command(
        commands,
        "bench",
        help="measure size, memory and latency of models side by side",
        description="Time models for one picture, each in a fresh process, in turns, on this machine, which should be "
        "idle. Ratios are to the first. The model of module:function is exported to ONNX to be timed.",
        epilog=EXAMPLES,
    )
    models = "a file .onnx or .pte, a folder, or module:function"
    options.files(parser.add_argument("models", nargs="+", metavar="MODEL", help=models))
    weights = "model file for the model of module:function; of several, one each, in order"
    options.folders(
        parser.add_argument("--weights", type=Path, action="append", default=[], metavar="FOLDER", help=weights)
    )
    builder = "module:function that the folders of one's own model are built with, to be timed in PyTorch"
    parser.add_argument("--builder", metavar="FUNCTION", help=builder)
    data = "judge each on the test pictures too: YAML, class path, or module:function with its own losses and metrics"
    options.files(parser.add_argument("--data", metavar="DATA", help=data))
    parser.add_argument("--threads", type=options.whole(1), default=1, help="threads (default: 1)")
    parser.add_argument("--warmup", type=options.whole(0), default=5, help="runs before the clock starts (default: 5)")
    parser.add_argument("--repeats", type=options.whole(1), default=50, help="timed runs of each (default: 50)")
    options.add_output(parser)
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Entry:
    """A model to measure.

    Attributes:
        model: What the user called it.
        weights: What is loaded into the model of a function, None for its own weights and all other models.
        label: What it is called in tables and errors; no two are called the same.
    """

    model: str
    weights: Path | None
    label: str


def run(args: argparse.Namespace) -> None:
    """Measure.

    Raises:
        ValueError: If a model cannot be opened or a runtime is missing.
    """
    terminal = Terminal(args)
    from cut.latency import compare, load_of_machine, ratio, told_load

    load = load_of_machine()  # before this command's own work, which loads it too
    entries = entries_of(args.models, args.weights)
    check(entries, args.builder)
    with tempfile.TemporaryDirectory() as folder:
        files = {e.label: file_of(e, Path(folder), i) for i, e in enumerate(entries)}
        judge = _judge(args.data, args.builder, terminal.shows_progress)
        terminal.warn_if_busy(load)
        timings = compare(
            files,
            threads=args.threads,
            warmup=args.warmup,
            repeats=args.repeats,
            rounds=min(5, args.repeats),
            builder=args.builder,
            progress=terminal.shows_progress,
        )
        found: list[dict[str, Any]] = []
        for entry in entries:
            timing = timings[entry.label]
            facts = {"model": entry.model, "weights": entry.weights, **asdict(timing)}
            facts["ratio"] = asdict(ratio(timing, timings[entries[0].label]))
            if judge is not None:
                facts["metrics"] = judge(files[entry.label])
            found.append(facts)
    labels = [e.label for e in entries]
    rows = map(_row, labels, found)
    shown = [table(("model", "runtime", "size", "memory", "ms", "p95", "ratio"), rows)]
    if judge is not None:
        keys = list(dict.fromkeys(k for f in found for k in f["metrics"]))
        cells = [[k, *(f"{f['metrics'][k]:.4g}" if k in f["metrics"] else "-" for f in found)] for k in keys]
        shown.append(table(("task/metric", *(Path(m).name for m in labels)), cells))
    shown.append(f"{args.repeats} runs of each, threads: {args.threads}, {told_load(load)}")
    facts = {"threads": args.threads, "repeats": args.repeats, "load": load, "cores": os.cpu_count(), "models": found}
    terminal.result(facts, shown)


def entries_of(models: Sequence[str], weights: Sequence[Path]) -> list[Entry]:
    """The models with the weights that are meant for each.

    Raises:
        ValueError: If there are weights, but not one folder for each model of a function.
    """
    own = [m for m in models if _is_function(m)]
    if weights and not own:
        raise ValueError(f"--weights {weights[0]}: allowed only for module:function; {models[0]} has its own weights")
    if len(weights) not in (0, len(own)):
        raise ValueError(
            f"--weights is given {len(weights)} times for {len(own)} models of module:function ({', '.join(own)}); "
            f"allowed: {len(own)} times, one each in their order, or not at all"
        )
    left, found = iter(weights), list[Entry]()
    for model in models:
        mine = next(left, None) if _is_function(model) else None
        label = model if mine is None else f"{model} {mine}"
        count = sum(e.label.split(" #")[0] == label for e in found)
        found.append(Entry(model, mine, f"{label} #{count + 1}" if count else label))
    return found


def _is_function(name: str) -> bool:
    return ":" in name and not Path(name).exists()


def check(entries: Sequence[Entry], builder: str | None) -> None:
    """Refuse what cannot be timed, before anything is exported.

    Raises:
        ValueError: Naming the model that is not there, or the folder that needs a builder.
    """
    from cut.checkpoint import is_foreign
    from cut.commands.opening import function_of, model_folder
    from cut.runtime import kind

    if builder is not None and ":" not in builder:
        raise ValueError(f"--builder {builder}; allowed: module:function")
    if builder is not None:
        function_of(builder)
    for entry in entries:
        path = Path(entry.model)
        if path.suffix in SUFFIXES:
            kind(path)
        elif path.is_dir() and is_foreign(model_folder(path)) and builder is None:
            raise ValueError(f"{entry.model} is of a foreign network: name the module:function of it with --builder")


def file_of(entry: Entry, folder: Path, number: int) -> Path:
    """The file or folder that is timed; one's own model is exported into ``folder``."""
    from cut.commands.export import write
    from cut.commands.opening import model_folder, open_source

    path = Path(entry.model)
    if path.suffix in SUFFIXES:
        return path
    if path.is_dir():
        return model_folder(path)
    return write(open_source(entry.model, entry.weights), folder / f"{number}.onnx").path


def _judge(data: str | None, builder: str | None, progress: bool) -> Callable[[Path], dict[str, float]] | None:
    """A file or folder to its metrics on the data's test pictures; None without data."""
    if data is None:
        return None
    from cut.commands.opening import built, data_module, returned
    from cut.evaluation import evaluate_file, judge_file
    from cut.runtime import open_file

    build = None if builder is None else lambda: built(builder)
    if not _is_function(data):
        data_module(data, None)  # what is wrong with it is told before anything is timed

        def of_module(path: Path) -> dict[str, float]:
            tasks = list(open_file(path, 1, build).meta.get("tasks", {})) or None
            return evaluate_file(path, data_module(data, tasks), builder=build, progress=progress)

        return of_module
    own = returned(data)
    return lambda path: judge_file(path, own.test, own.objectives, builder=build, progress=progress)


def _row(label: str, facts: dict[str, Any]) -> list[str]:
    """A line of the table."""
    ratio = facts["ratio"]
    return [
        label,
        facts["runtime"],
        in_bytes(facts["bytes"]),
        in_bytes(facts["model_bytes"]),
        f"{facts['median_ms']:.2f}",
        f"{facts['p95_ms']:.2f}",
        f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})",
    ]
