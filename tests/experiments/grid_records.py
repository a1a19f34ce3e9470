"""A small grid with hand-made records, for the tests of tables, figures and findings."""

from cut.records import Record
from experiments.cell import Cell

BASE = ("data/rooms", "model/mobilenetv2")
TASKS = ["seg", "normal", "depth"]
METRICS = {"seg/miou": 0.4, "seg/pixel_acc": 0.8, "normal/mean": 20.0, "depth/rel": 0.2, "edge/l1": 0.05}
BETTER = {"seg/miou": True, "seg/pixel_acc": True, "normal/mean": False, "depth/rel": False, "edge/l1": False}
COMMIT = "0123456789abcdef"


def dense_cell(seed=1, **settings):
    return Cell((*BASE, "pruning/dense"), {"seed_everything": seed, **settings})


def cell(method="cut", target=0.9, seed=1, tasks=tuple(TASKS), start=None, **settings):
    options = {"pruning.tasks": list(tasks), "pruning.budget.init_args.target": target, "seed_everything": seed}
    return Cell((*BASE, f"pruning/{method}"), options | settings, dense_cell(seed) if start is None else start)


def form(params, nonzero=None):
    return {"params": params, "nonzero": nonzero or params, "macs": 10 * params, "bytes": 4 * (nonzero or params)}


def record(of, changes=None, metrics=None, **entries):
    """The record of a cell; ``changes`` multiplies metrics of the dense model."""
    tasks, target = of.tasks, of.target
    test = {k: v * (changes or {}).get(k, 1.0) for k, v in METRICS.items() if k.split("/")[0] in tasks}
    names = {
        "backbone.a.weight": "backbone",
        "backbone.b.weight": "backbone",
        **{f"heads.{t}.weight": t for t in tasks},
    }
    pairs = {f"{a} & {b}": 0.9 for i, a in enumerate(tasks) for b in tasks[i + 1 :]}
    given = {
        "method": of.method,
        "data": {"name": "rooms", "seed": 1},
        "backbone": "mobilenetv2_100",
        "weights_source": "random",
        "tasks": tasks,
        "seed": of.seed,
        "config": of.config,
        "metrics": {"val": {}, "test": metrics or test},
        "higher_is_better": {k: BETTER[k] for k in test},
        "dropped_tasks": [t for t in ["seg", "normal", "depth", "edge"] if t not in tasks],
        "budget": {"target": target, "achieved": target or 0.0},
        "sparsity": {"kept": target or 0.0},
        "layer_sparsity": dict.fromkeys(names, target) if target else {},
        "layer_component": names,
        "mask_overlap": {n: {**pairs, "all": 0.8} for n in names if n.startswith("backbone")} if target else {},
        "cost": {
            "dense_all_heads": form(1_000_000),
            "kept_heads": form(900_000),
            "compact": form(600_000, 80_000) if target else form(999_999),
        },
        "score_seconds": 1.5,
        "finetune_seconds": 60.0,
        "peak_memory": 10**9,
        "name": of.id,
        "start": of.start.id if of.start else "",
        "machine": {},
        "commit": COMMIT,
        "dirty": False,
    }
    return Record(**(given | entries))


def by_id(*records):
    return {r.id: r for r in records}
