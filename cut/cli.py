"""The ``cut`` command."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Sequence
from pathlib import Path


def _predict(args: argparse.Namespace) -> None:
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
    for task, shown in numbers.items():
        print(f"{task:10} " + ", ".join(f"{k} {v}" for k, v in list(shown.items())[:6]))
    print(f"latency    {found.milliseconds:.1f} ms, median of {REPEATS} runs; drawn to {target}")


def _version() -> str:
    """The installed version; a checkout that is not installed has none."""
    try:
        return importlib.metadata.version("cut")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    description = "Cut a multi-task vision model down to the tasks a device needs."
    top = argparse.ArgumentParser(prog="cut", description=description)
    top.add_argument("--version", action="version", version=f"cut {_version()}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    predict = commands.add_parser("predict", help="run a model on a picture and draw every task's prediction")
    predict.add_argument("model", type=Path, help="an ONNX file, or the folder of a compact model")
    predict.add_argument("picture", type=Path, help="any picture file")
    predict.add_argument("--out", type=Path, help="where to draw (default: PICTURE-prediction.png here)")
    predict.add_argument("--json", action="store_true", help="print one JSON object")
    predict.set_defaults(run=_predict)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 if it worked, 2 for bad input, 130 if stopped."""
    args = parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"cut: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("cut: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
