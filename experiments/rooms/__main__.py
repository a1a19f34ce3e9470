"""Command line: ``python -m experiments.rooms render|pack|sheet|check|attribution|layout``."""

import argparse
import json
import sys
from pathlib import Path

from experiments.rooms import catalog, pack, produce
from experiments.rooms.attribution import write_attribution
from experiments.rooms.check import describe
from experiments.rooms.layouts import LAYOUTS, write_layout


def main(arguments: list[str] | None = None) -> int:
    """Run a command; gives the exit code (2 for bad input)."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except ValueError as error:
        print(f"rooms: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m experiments.rooms", description=__doc__)
    commands = parser.add_subparsers(required=True)
    render = commands.add_parser("render", help="render a set of rooms")
    render.add_argument("--out", type=Path, required=True, help="folder of the set")
    render.add_argument("--num", type=int, default=100, help="number of rooms")
    render.add_argument("--size", default="96x128", help="HEIGHTxWIDTH in pixels")
    render.add_argument("--seed", type=int, default=0)
    render.add_argument("--splits", default="train:0.75,val:0.1,test:0.15", help="NAME:SHARE,...")
    render.add_argument("--samples", type=int, default=produce.SAMPLES, help="light paths per pixel")
    render.add_argument("--furniture", type=Path, help="folder of the .sh3f archives")
    render.add_argument("--processes", type=int, help="default: one per core")
    render.set_defaults(run=_render)
    packing = commands.add_parser("pack", help="gather the rooms a running render has finished")
    packing.add_argument("--parts", type=Path, required=True)
    packing.add_argument("--out", type=Path, required=True)
    packing.set_defaults(run=_pack)
    sheet = commands.add_parser("sheet", help="draw some rooms with all their labels")
    sheet.add_argument("--set", type=Path, required=True)
    sheet.add_argument("--out", type=Path, required=True)
    sheet.set_defaults(run=_sheet)
    check = commands.add_parser("check", help="print what a set holds")
    check.add_argument("--set", type=Path, required=True)
    check.set_defaults(run=_check)
    attribution = commands.add_parser("attribution", help="write who made the furniture that a set shows")
    attribution.add_argument("--set", type=Path, required=True)
    attribution.add_argument("--out", type=Path, required=True)
    attribution.add_argument("--furniture", type=Path, help="folder of the .sh3f archives")
    attribution.set_defaults(run=_attribution)
    layout = commands.add_parser("layout", help="write a set as a published data set is laid out (a stand-in for it)")
    layout.add_argument("--layout", required=True, help=", ".join(LAYOUTS))
    layout.add_argument("--out", type=Path, required=True, help="folder of the stand-in")
    layout.add_argument("--set", type=Path, help="folder of the rooms; default: the embedded set")
    layout.add_argument("--size", help="HEIGHTxWIDTH in pixels; default: the rooms' own")
    layout.set_defaults(run=_layout)
    return parser


def _render(options: argparse.Namespace) -> None:
    height, width = produce.parse_size(options.size)
    counts = produce.parse_splits(options.splits, options.num)
    if options.samples < 1 or options.seed < 0:
        raise ValueError(f"samples ({options.samples}) must be positive and seed ({options.seed}) not negative")
    settings = produce.Settings(**counts, height=height, width=width, seed=options.seed, samples=options.samples)
    furniture = catalog.find_furniture(options.furniture)
    meta = produce.render_set(settings, furniture, options.out, options.processes)
    print(f"{options.out}: {meta['splits']} rooms of {height}x{width}")


def _pack(options: argparse.Namespace) -> None:
    path = options.parts / "settings.json"
    if not path.is_file():
        raise ValueError(f"{options.parts} is not the parts folder of a render: settings.json is missing")
    settings = json.loads(path.read_text())
    meta = pack.pack(options.parts, options.out, (settings["height"], settings["width"]), settings["seed"])
    print(f"{options.out}: {meta['splits']} rooms")


def _sheet(options: argparse.Namespace) -> None:
    from experiments.rooms.sheet import draw_sheet

    draw_sheet(options.set, options.out)


def _attribution(options: argparse.Namespace) -> None:
    write_attribution(options.set, catalog.find_furniture(options.furniture), options.out)


def _layout(options: argparse.Namespace) -> None:
    size = None if options.size is None else produce.parse_size(options.size)
    counts = write_layout(options.layout, options.out, options.set, size)
    title = LAYOUTS[options.layout].title
    print(f"{options.out}: Rooms in {title} layout, {counts['train']} train and {counts['test']} test pictures")


def _check(options: argparse.Namespace) -> None:
    print(describe(options.set))


if __name__ == "__main__":
    sys.exit(main())
