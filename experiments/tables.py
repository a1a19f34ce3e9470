"""Tables: records to Markdown, in ``docs/tables/`` and in the README. ``make tables`` renders them."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from cut.files import write_atomically
from cut.records import Record, read
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
ORDER = ("cut", "disparse", "magnitude", "random")


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


def main(argv: Sequence[str] | None = None) -> int:
    """Render all tables; 2 for missing or damaged records."""
    parser = argparse.ArgumentParser(prog="make tables", description=__doc__)
    parser.add_argument("--records", type=Path, default=ROOT / "experiments/records/demo")
    args = parser.parse_args(argv)
    try:
        table = comparison(*records(args.records))
        write_atomically(ROOT / "docs/tables/demo.md", f"# `make demo`\n\n{table}")
        readme = ROOT / "README.md"
        write_atomically(readme, replaced(readme.read_text(), "demo", table))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
