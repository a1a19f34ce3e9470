"""``cut predict``: run a model on a picture and draw every task's prediction."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cut.commands import options
from cut.commands.export import SUFFIXES

if TYPE_CHECKING:
    from cut.predict import Runner

EXAMPLES = """examples:
  cut predict runs/demo/cut.onnx room.jpg
  cut predict runs/demo/compact room.jpg --out seen.png --json
  cut predict mine:setup room.jpg --weights runs/small
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
    options.files(parser.add_argument("model", metavar="MODEL", help=f"a file .onnx or .pte, {options.SOURCE}"))
    options.files(parser.add_argument("picture", type=Path, metavar="PICTURE", help="any picture file"))
    options.add_weights(parser)
    out = "where to draw (default: PICTURE-prediction.png here)"
    options.files(parser.add_argument("--out", type=Path, metavar="PATH", help=out))
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quiet", "-q", action="store_true", help="draw, and print nothing")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Predict.

    Raises:
        ValueError: If the model, the picture or the target cannot be used.
    """
    from cut.predict import REPEATS, describe, draw, predict_with, read_picture, save

    target = args.out or Path(f"{args.picture.stem}-prediction.png")
    if target.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"--out {target}: allowed are .png, .jpg and .webp")
    if target.exists() and args.picture.exists() and target.samefile(args.picture):
        raise ValueError(f"--out {target}: would overwrite the picture itself")
    image = read_picture(args.picture)
    found = predict_with(*runner(args.model, args.weights), image, args.model)
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


def runner(name: str, weights: Path | None) -> tuple[Runner, dict[str, Any]]:
    """A model that a user names, ready to run, and its facts.

    What was made to be shipped, files and folders with facts, opens without data sets and Lightning; all else as in
    the other commands.

    Raises:
        ValueError: If it cannot be opened, or its facts are not enough for a prediction.
    """
    from cut.predict import checked, open_model, runner_of

    path = Path(name)
    if weights is None and path.suffix in SUFFIXES:
        return open_model(path)
    from cut.commands.opening import model_folder, open_source

    if weights is None and path.is_dir() and _ships(folder := model_folder(path)):
        return open_model(folder)
    source = open_source(name, weights)
    return runner_of(source.network), checked(source.meta, name)


def _ships(folder: Path) -> bool:
    """Whether a folder holds a model of ours with facts on its input."""
    from cut.checkpoint import is_foreign, read_metadata

    return not is_foreign(folder) and "input" in read_metadata(folder)
