"""Tables: records to Markdown, in ``docs/tables/`` and in the README. ``make tables`` renders them.

python -m experiments.tables               # the demo's
python -m experiments.tables --grid rooms  # a grid's, with CSV and LaTeX
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from cut.files import write_atomically
from cut.records import Record, read
from experiments import curves, render, results
from experiments.grid import Grid
from experiments.grids import GRIDS
from experiments.refusal import refusing
from experiments.summary import rows
from experiments.timing import timed

ROOT = Path(__file__).parent.parent
HEADINGS = {
    "seg/miou": "seg mIoU % ↑",
    "normal/mean": "normals mean ° ↓",
    "depth/rel": "depth rel. error ↓",
    "edge/l1": "edge L1 ↓",
    "scene/accuracy": "room type % ↑",
}
ORDER = ("cut", "cut-channels", "disparse", "magnitude", "random")


def records(folder: Path) -> tuple[Record, list[Record]]:
    """The dense record of a folder and those cut from it, ours first, with the latencies of ``timing/latency.json``.

    Raises:
        ValueError: If there is not exactly one dense record.
    """
    found = [read(p) for p in sorted(folder.glob("*.json"))]
    dense = [r for r in found if r.method == "dense"]
    if len(dense) != 1:
        raise ValueError(f"{folder} holds {len(dense)} dense records; one is needed to compare with")
    others = sorted(
        (r for r in found if r.method != "dense"),
        key=lambda r: ORDER.index(r.method) if r.method in ORDER else len(ORDER),
    )
    return timed(dense[0], others, json.loads((folder / "timing/latency.json").read_text()))


def comparison(dense: Record, pruned: Sequence[Record]) -> str:
    """One comparison as a Markdown table: a row per model, one metric per task, Delta_m and the cost."""
    found = rows(dense, pruned)
    tasks = pruned[0].tasks
    metrics = [m for m in HEADINGS if m.split("/")[0] in tasks]
    heads = [
        "model",
        "sparsity",
        "Δm %",
        *(HEADINGS[m] for m in metrics),
        "params",
        "non-zero",
        "MB",
        "MMACs",
        "ms",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|" + "|".join([" --- "] + [" ---: "] * (len(heads) - 1)) + "|"]
    for r in found:
        name = f"dense, {len(r['tasks'])} heads" if r["method"] == "dense" else f"`{r['method']}`"
        scaled = [r["metrics"][m] * (100 if "%" in HEADINGS[m] else 1) for m in metrics]
        cells = [
            name,
            f"{r['sparsity']:.4f}",
            "0" if r["method"] == "dense" else f"{r['delta_m']:+.2f}",
            *(f"{v:.3f}" if v < 1 else f"{v:.1f}" for v in scaled),
            f"{r['params'] / 1e6:.2f} M",
            f"{r['nonzero'] / 1e6:.3f} M",
            f"{r['bytes'] / 1e6:.2f}",
            f"{r['macs'] / 1e6:.0f}",
            f"{r['latency_ms']:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    how = (
        f"Seed {dense.seed}, last epoch, test set of {dense.data['splits']['test']} rooms; backbone {dense.backbone}, "
        f"first weights {dense.weights_source}; commit {dense.commit[:10]}. "
        "MB = file on disk; ms = median of one picture on one thread, timed in turns, "
        f"{found[0]['latency_runtime']}, {dense.machine['processor']}."
    )
    return "\n".join(lines) + "\n\n" + how + "\n"


def replaced(text: str, name: str, table: str) -> str:
    """A page with the part between ``<!-- table:name -->`` and ``<!-- end -->`` replaced.

    Raises:
        ValueError: If the page has no such part.
    """
    pattern = re.compile(rf"(<!-- table:{name} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"no part '<!-- table:{name} -->' in the page")
    return pattern.sub(lambda m: m.group(1) + table + m.group(2), text)


def readme(text: str) -> str:
    """The README with its tables as the committed records have them."""
    text = replaced(text, "demo", comparison(*records(ROOT / "experiments/records/demo")))
    return replaced(text, "rooms", render.summary(GRIDS["rooms"](), ROOT / "experiments/records/rooms"))


def write(grid: Grid, records: Path, out: Path) -> list[Path]:
    """Write a grid's pages, by file or by step where its rows are told so; see :func:`experiments.render.write`."""
    if grid.by_step:
        return curves.write(grid, records, out)
    if grid.by_file:
        from experiments import devices  # reads what is delivered, and needs PyTorch for it

        return devices.write(grid, records, out)
    return render.write(grid, records, out)


def page(grid: Grid, text: str, records: Path, folder: Path | None = None) -> str:
    """The page of a grid that is told by file: what its rows say to each other, and the forms of its models.

    Args:
        grid: The table.
        text: The page as it was.
        records: Folder of records.
        folder: Of what was delivered; None = the committed one.
    """
    from experiments import delivery, devices, edge, targets, typeset  # need PyTorch, which other tables do not

    found = delivery.collect(grid, folder or delivery.FOLDER)
    known = results.collect(grid, records)
    files = devices.by_file(grid, known, found)
    few, many = ("+".join(tasks) for tasks in edge.SELECTIONS)
    said = targets.told(grid, files, edge.OURS, (*edge.RIVALS, edge.WIDTH), few, many)
    text = replaced(replaced(text, "targets", said), "beside", devices.side_by_side(grid, found))
    return replaced(text, "hours", typeset.markdown(targets.hours(grid, known)))


def _demo(folder: Path, out: Path) -> None:
    """The demo's table on its page, and the README's tables."""
    write_atomically(out / "demo.md", f"# `make demo`\n\n{comparison(*records(folder))}")
    page = ROOT / "README.md"
    write_atomically(page, readme(page.read_text()))


@refusing
def main(argv: Sequence[str] | None = None) -> int:
    """Render the demo's table or a grid's; 2 for an unknown grid and for missing or damaged records."""
    parser = argparse.ArgumentParser(prog="make tables", description=__doc__.splitlines()[0])
    parser.add_argument("--grid", help="name of a grid; default: the demo's table")
    parser.add_argument("--records", type=Path, help="default: experiments/records/demo, or the grid's folder")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/tables")
    args = parser.parse_args(argv)
    kept = ROOT / "experiments/records"
    if args.grid is None:
        _demo(args.records or kept / "demo", args.out)
    elif args.grid in GRIDS:
        grid = GRIDS[args.grid]()
        folder = args.records or kept / grid.folder
        write(grid, folder, args.out)
        own = args.out.parent / f"{grid.name}.md"
        if grid.by_file and own.is_file():
            write_atomically(own, page(grid, own.read_text(), folder))
    else:
        raise ValueError(f"no grid {args.grid!r}; there are: {', '.join(sorted(GRIDS)) or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
