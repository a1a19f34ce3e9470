"""The demo: a dense multi-task model, a compact one for the chosen tasks, two rivals, an ONNX file and a page.

``make demo [TASKS="seg normal depth"] [SPARSITY=0.9]``. One more row cuts whole channels, to half of the
multiply-accumulates: a model that is really smaller and faster in any runtime. What is done is not done again; after
Ctrl-C the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from cut import checkpoint
from cut.data.rooms import Rooms
from cut.decomposition import check_tasks
from cut.files import write_atomically
from cut.network import MultiTaskNet
from cut.records import Record, read
from experiments.examples import examples
from experiments.report import page, pictures
from experiments.run import run
from experiments.summary import print_table, rows
from experiments.timing import in_turns, timed

DENSE_TASKS = ("seg", "normal", "depth", "edge")
METHODS = ("cut", "magnitude", "disparse")
CHANNELS, MACS, ROUNDING = "cut-channels", 0.5, 8
GALLERY = 6
SCORE_BATCHES = 25
FLOOR = 0.05  # of every layer, but never more than half of what stays
FILES = {
    "page:": "report.html",
    "model:": "compact",
    "ONNX:": "cut.onnx",
    "fast:": "cut-channels.onnx",
    "table:": "summary.json",
}
SHOWN = {
    "seg": ("seg/miou", "mIoU"),
    "normal": ("normal/mean", "angle °"),
    "depth": ("depth/rel", "rel"),
    "edge": ("edge/l1", "edge"),
}
SAME_RULE = "With one or two tasks, at least half of them is any of them: cut and disparse are the same rule."
CONFIGS = Path(__file__).parent.parent / "configs"


def _common(method: str, folder: Path, records: Path, seed: int, epochs: int, rate: float) -> list[str]:
    """The command line that all runs of the demo share: one data set, one model, one optimiser."""
    files = ["trainer/default", "data/rooms", "model/mobilenetv2", f"pruning/{method}", "logger/wandb"]
    line = [part for f in files for part in ("--config", str(CONFIGS / f"{f}.yaml"))]
    return [
        *line,
        f"--seed_everything={seed}",
        f"--data.init_args.seed={seed}",
        f"--trainer.max_epochs={epochs}",
        f"--model.init_args.optimizer.init_args.lr={rate}",
        f"--pruning.batches={SCORE_BATCHES}",
        f"--out={folder}",
        f"--records={records}",
    ]


def _dense_network(folder: Path) -> MultiTaskNet:
    """The dense network out of its run's folder."""
    network = checkpoint.load(folder / "compact")
    assert isinstance(network, MultiTaskNet)
    return network.eval()


def time_all(out: Path, dense: Record, pruned: Sequence[Record]) -> dict[str, Any]:
    """All exported models timed in turns, kept in a ``timing-*.json``; timed again only if a model is newer."""
    first = out / pruned[0].checkpoint
    paths = {
        "dense_all_heads": out / dense.checkpoint / "dense_all_heads.onnx",
        "kept_heads": first / "kept_heads.onnx",
    }
    paths |= {r.method: out / r.checkpoint / "compact.onnx" for r in pruned}
    kept = out / f"timing-{'+'.join(pruned[0].tasks)}-{pruned[0].budget['target']:g}.json"
    if not kept.exists() or kept.stat().st_mtime < max(p.stat().st_mtime for p in paths.values()):
        data = Rooms(tasks=DENSE_TASKS, seed=dense.seed)
        write_atomically(
            kept, json.dumps(in_turns(paths, data.score_batches(1, 1)[0]["image"].numpy()), indent=1) + "\n"
        )
    return json.loads(kept.read_text())


def finish(out: Path, dense: Record, pruned: Sequence[Record], seed: int) -> None:
    """Files for the user: the compact model, the ONNX file, the page and the summary."""
    folders = {r.method: out / r.checkpoint for r in pruned}
    shutil.rmtree(out / "compact", ignore_errors=True)
    shutil.copytree(folders["cut"] / "compact", out / "compact")
    shutil.copyfile(folders["cut"] / "compact.onnx", out / "cut.onnx")
    shutil.copyfile(folders[CHANNELS] / "compact.onnx", out / "cut-channels.onnx")
    data = Rooms(tasks=DENSE_TASKS, seed=seed)
    models = {m: checkpoint.load(folders[m] / "compact").eval() for m in ("cut", CHANNELS, "magnitude")}
    shown = {"dense": _dense_network(out / dense.checkpoint), **models}
    rooms = examples(data, shown, pruned[0].tasks, GALLERY)
    note = (
        "Rooms: rendered rooms with exact labels, shipped with the package; "
        "test rooms hold furniture that no training room has."
    )
    if len(pruned[0].tasks) <= 2:
        note += f" {SAME_RULE}"
    files = {
        "cut.onnx": "ONNX file",
        "cut-channels.onnx": "ONNX file of the model with fewer channels",
        "compact/model.json": "compact model",
        "summary.json": "the table as data",
    }
    pictures.keep(rooms, out / "pictures")
    found = page.one_comparison(dense, pruned, note, f"{out}/records")
    gallery = pictures.gallery(rooms)
    page.write(out / "report.html", found, gallery=gallery, classes=data.meta["classes"], files=files)
    write_atomically(out / "summary.json", json.dumps(rows(dense, pruned), indent=1) + "\n")


def demo(tasks: Sequence[str], sparsity: float, out: Path, seed: int, epochs: int, recover: int, rate: float) -> None:
    """Run everything that has no record yet, then print and write the comparison.

    Raises:
        ValueError: For a bad selection or sparsity, before any training.
    """
    tasks = check_tasks(tasks, DENSE_TASKS)
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity {sparsity}; allowed: 0 <= sparsity < 1 (the fraction removed)")
    console, records = Console(), out / "records"
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    console.rule(f"1/5  dense model: {', '.join(DENSE_TASKS)}")
    dense = read(run([*_common("dense", out / "dense", records, seed, epochs, 2e-3)]))
    pruned = []
    for i, method in enumerate(METHODS, 2):
        console.rule(f"{i}/5  {method}: keep {', '.join(tasks)} at sparsity {sparsity:g}")
        folder = out / f"{method}-{'+'.join(tasks)}-{sparsity:g}"
        line = [
            *_common(method, folder, records, seed, recover, rate),
            f"--pruning.tasks={json.dumps(list(tasks))}",
            f"--pruning.budget.init_args.target={sparsity}",
            f"--pruning.floor={min(FLOOR, (1 - sparsity) / 2):g}",
            f"--init={out / 'dense'}",
        ]
        pruned.append(read(run(line)))
    console.rule(f"5/5  {CHANNELS}: keep {', '.join(tasks)} at {MACS:.0%} of the multiply-accumulates")
    line = [
        *_common(CHANNELS, out / f"{CHANNELS}-{'+'.join(tasks)}", records, seed, recover, rate),
        f"--pruning.tasks={json.dumps(list(tasks))}",
        f"--pruning.budget.init_args.target={MACS}",
        f"--pruning.rounding={ROUNDING}",
        f"--init={out / 'dense'}",
    ]
    pruned.insert(1, read(run(line)))
    dense, pruned = timed(dense, pruned, time_all(out, dense, pruned))
    finish(out, dense, pruned, seed)
    if len(tasks) <= 2:
        console.print(SAME_RULE)
    print_table(rows(dense, pruned), dict(SHOWN[t] for t in tasks))
    console.print(f"done in {(time.perf_counter() - start) / 60:.1f} minutes")
    console.print("\n".join(f"{what:8} {out / name}" for what, name in FILES.items()))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 2 for bad input, 130 if stopped."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=["seg", "normal", "depth"], help="the tasks to keep")
    parser.add_argument("--sparsity", type=float, default=0.9, help="fraction of the weights removed")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=12, help="dense training")
    parser.add_argument("--recover", type=int, default=3, help="epochs of fine-tuning after the cut")
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate of the fine-tuning")
    args = parser.parse_args(argv)
    try:
        demo(args.tasks, args.sparsity, args.out, args.seed, args.epochs, args.recover, args.rate)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; make demo goes on from the last finished epoch", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
