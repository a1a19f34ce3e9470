"""Published: run and render the tables of NYU-v2, Cityscapes or Tiny-Taskonomy from a folder with the set.

    python -m experiments.published nyuv2 --data /path/to/nyu_v2 --workers 2

A folder of rooms written in the set's layout (``make rooms LAYOUT=nyuv2``) stands in for it: the same loaders, recipes
and tables, but every title says "Rooms in NYU-v2 layout". ``--small`` runs a reduced grid, on the embedded rooms if no
folder is given.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from cut.data.cityscapes import Cityscapes
from cut.data.nyuv2 import NYUv2
from cut.data.taskonomy import Taskonomy
from experiments import papers, quoted, render
from experiments.backends import Backend, Local, Ray
from experiments.papers import RECIPES, SETS
from experiments.refusal import refusing
from experiments.rooms import layouts
from experiments.rooms.layouts import STAND_IN
from experiments.sweep import Sweep, finish, run_cell

ROOT = Path(__file__).parent.parent
LOADERS = {"nyuv2": NYUv2, "cityscapes": Cityscapes, "taskonomy": Taskonomy}


def advice(name: str) -> str:
    """What to do without the set."""
    own, other = SETS[name].name, papers.label(name, True)
    return (
        f"table-{name} needs {own} on disk: make table-{name} DATA=/path (docs/datasets.md says where it is obtained "
        f"and how its folder looks). To see it work without: SMOKE=1 make table-{name} runs a reduced grid on "
        f"'{other}', which is not {own}; "
        f"make rooms LAYOUT={name} OUT=runs/{papers.folder(name, True)}/data writes that stand-in for a whole run"
    )


def is_stand_in(root: Path) -> bool:
    """Whether a folder holds rooms in a published layout."""
    return (root / STAND_IN).is_file()


def check(name: str, root: Path) -> None:
    """Open a set as the runs will.

    Raises:
        ValueError: If it is not there or damaged.
    """
    LOADERS[name](root).setup("fit")


def tables(name: str, root_is_stand_in: bool, small: bool, records: Path, out: Path) -> list[Path]:
    """Render a set's tables, one per recipe; the published one with the quoted rows of the literature.

    Raises:
        ValueError: If a record is damaged.
    """
    paths = []
    for recipe in RECIPES:
        more = quoted.markdown(name) if recipe == "paper" else ""
        paths += render.write(papers.grid(name, recipe, root_is_stand_in, small), records, out, more)
    return paths


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.published", description=__doc__.split("\n\n")[0])
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--data", type=Path, help="folder of the set, or of a stand-in")
    parser.add_argument("--small", action="store_true", help="a reduced grid")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="cells at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each cell")
    parser.add_argument("--backend", choices=("local", "ray"), default="local")
    parser.add_argument("--gpus", type=float, default=0.0, help="GPUs of each cell (ray backend)")
    parser.add_argument("--keep", action="store_true", help="keep checkpoints and models of pruned runs")
    parser.add_argument("--list", action="store_true", help="print the cells, and stop")
    parser.add_argument("--render", action="store_true", help="render from the records that are there, run nothing")
    parser.add_argument("--records", type=Path, help="default: experiments/records/<set>")
    parser.add_argument("--runs", type=Path, help="default: runs/<set>")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/tables")
    return parser.parse_args(argv)


@refusing
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 0 if nothing failed, 1 if cells did, 2 for bad input, 130 if stopped."""
    args = parse(argv)
    name, console = args.set, Console()
    if args.workers < 1 or args.threads < 1:
        raise ValueError(f"workers {args.workers}, threads {args.threads}; allowed: at least 1 each")
    if args.data is None and not (args.small or args.list):
        raise ValueError(advice(name))
    stand_in = args.data is None or is_stand_in(args.data)
    folder = papers.folder(name, stand_in)
    records, runs = args.records or ROOT / "experiments/records" / folder, args.runs or ROOT / "runs" / folder
    grids = [papers.grid(name, r, stand_in, args.small, args.seeds) for r in RECIPES]
    cells = list({c.id: c for g in grids for c in g.cells()}.values())
    if args.list:
        print("\n".join(c.id for c in cells))
        return 0
    failed = 0
    if not args.render:
        data = args.data or runs / "data"
        if args.data is None and not is_stand_in(data):
            layouts.write_layout(name, data)
        check(name, data)
        backend: Backend = (
            Ray(run_cell, args.threads, args.gpus) if args.backend == "ray" else Local(run_cell, args.workers)
        )
        options = [f"--data.init_args.root={data.resolve()}"]
        console.print(f"{papers.label(name, stand_in)}: {data}")
        failed = finish(Sweep(cells, records, runs, backend, args.threads, args.keep, options), console)
    if failed != 130:
        for path in tables(name, stand_in, args.small, records, args.out):
            console.print(str(path))
    return failed


if __name__ == "__main__":
    sys.exit(main())
