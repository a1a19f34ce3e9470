"""Write the report: one self-contained page from committed records.

python -m experiments.report --out runs/report/index.html
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cut.data.rooms import Rooms
from experiments.demo import DENSE_TASKS, GALLERY
from experiments.refusal import refusing
from experiments.report import page, pictures
from experiments.tables import records

ROOT = Path(__file__).parent.parent.parent


def demo_gallery(folder: Path) -> dict[str, Any]:
    """The committed demo's pictures, as options of :func:`experiments.report.page.render`; none without models."""
    if not (folder / "models").is_dir():
        return {}
    dense, pruned = records(folder)
    data = Rooms(tasks=DENSE_TASKS, seed=dense.seed)
    rooms = pictures.committed(folder, data, pruned[0].tasks, GALLERY)
    return {"gallery": pictures.gallery(rooms), "classes": data.meta["classes"]}


@refusing
def main(argv: Sequence[str] | None = None) -> int:
    """Write the page; 2 for damaged records, or without plotly."""
    parser = argparse.ArgumentParser(prog="make report", description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=Path, default=ROOT / "experiments/records")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/report/index.html")
    args = parser.parse_args(argv)
    if not args.records.is_dir():
        raise ValueError(f"no folder of records {str(args.records)!r}")
    found = page.benchmark(args.records, progress=True)
    path = page.write(args.out, found, **demo_gallery(args.records / "demo"))
    print(f"{path}  ({path.stat().st_size / 1e6:.1f} MB, {len(found['tables'])} tables)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
