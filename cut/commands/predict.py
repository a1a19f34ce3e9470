"""``cut predict``: run a model on a picture and draw every task's prediction."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from cut.commands import options

EXAMPLES = """examples:
  cut predict runs/demo/cut.onnx room.jpg
  cut predict runs/demo/compact room.jpg --out seen.png --json
"""


def add(commands: Any) -> None:
    """The command's options."""
    parser = options.add_command(
        commands,
        "predict",
        help="run a model on a picture and draw every task's prediction",
        description="Run a model on a picture and draw every task's prediction beside it.",
        epilog=EXAMPLES,
    )
    parser.add_argument("model", type=Path, help="an ONNX file, or the folder of a compact model")
    parser.add_argument("picture", type=Path, help="any picture file")
    parser.add_argument("--out", type=Path, help="where to draw (default: PICTURE-prediction.png here)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quiet", "-q", action="store_true", help="draw, and print nothing")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Predict.

    Raises:
        ValueError: If the model, the picture or the target cannot be used.
    """
    from cut.predict import REPEATS, describe, draw, predict, save

    target = args.out or Path(f"{args.picture.stem}-prediction.png")
    if target.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"--out {target}: allowed are .png, .jpg and .webp")
    if target.exists() and args.picture.exists() and target.samefile(args.picture):
        raise ValueError(f"--out {target}: would overwrite the picture itself")
    found = predict(args.model, args.picture)
    numbers = describe(found)
    save(draw(found), target)
    if args.json:
        facts = {"picture": str(target), "milliseconds": round(found.milliseconds, 2), "tasks": numbers}
        print(json.dumps(facts))
        return
    if args.quiet:
        return
    for task, shown in numbers.items():
        print(f"{task:10} " + ", ".join(f"{k} {v}" for k, v in list(shown.items())[:6]))
    print(f"latency    {found.milliseconds:.1f} ms, median of {REPEATS} runs; drawn to {target}")
