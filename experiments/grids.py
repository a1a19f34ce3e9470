"""Grids: every table of the benchmark.

A grid is rows of cells; nothing here runs anything. :mod:`experiments.sweep` runs the cells that have no record,
:mod:`experiments.results` turns records into tables.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

from experiments.cell import Cell
from experiments.edge import channels_grid, edge_grid, edge_vit_grid, edge_width_grid
from experiments.fashion import fashion_grid
from experiments.grid import Grid, Row
from experiments.newtask import groups_grid, newtask_grid
from experiments.recipe import EPOCHS, FIRST_RATE, KEPT, RATES, SEEDS, dense, floor, longer, pruned

# The methods of table-rooms, in its order.
METHODS = (
    "dense-longer",
    "random",
    "magnitude",
    "magnitude-erk",
    "snip",
    "synflow",
    "taylor",
    "imp",
    "lth",
    "disparse-static",
    "disparse-pt",
    "disparse",
    "cut",
    "cut-majority",
    "cut-plus",
)
# Rules that are one rule, with three kept tasks or always: shown in both rows, run once.
SAME = {"cut-majority": "cut", "fisher-per-task": "cut-squared", "joint": "snip"}
AT_98 = ("magnitude", "disparse", "cut", "cut-plus")


def rate_grid() -> Grid:
    """Every method at every rate, seed 1: validation decides, at each sparsity for itself."""
    dense_rows = [Row("dense-longer", ((pruned("dense-longer", None, 1, rate=r),),), {"rate": r}) for r in RATES]
    rows = [
        Row(m, ((pruned(m, sparsity, 1, rate=rate),),), {"rate": rate})
        for sparsity in (0.7, 0.9, 0.95)
        for m in METHODS
        if m != "dense-longer" and m not in SAME
        for rate in RATES
    ]
    return Grid("rates", "Learning rates", (*dense_rows, *rows), longer([1]), split="val", note="Seed 1.")


def rooms_grid() -> Grid:
    """Sixteen methods, three sparsities and 98 % for four, three seeds."""
    rows = [Row("dense", tuple((dense(s),) for s in SEEDS))]
    for sparsity in (0.7, 0.9, 0.95, 0.98):
        for m in METHODS:
            if m == "dense-longer":
                if sparsity == 0.7:
                    rows.append(Row(m, tuple((pruned(m, None, s),) for s in SEEDS)))
            elif sparsity < 0.98 or m in AT_98:
                rows.append(Row(m, tuple((pruned(SAME.get(m, m), sparsity, s),) for s in SEEDS)))
    note = "Of three tasks, at least half and a strict majority are both two: cut-majority shows cut's runs."
    return Grid("rooms", "Methods under one recipe on Rooms", tuple(rows), longer(SEEDS), note=note, by_task=True)


HIGH_RATE = 1e-2
# Methods whose rates of table-methods are another one's.
INHERITED = ("rigl", "adapmtl", "disparse-dynamic", "magnitude-plus")


def high_rate_grid() -> Grid:
    """Rates that the choice of ``rates`` does not have, seed 1: are the methods under-tuned?

    At 90 and 95 % nearly all methods take the highest of the three values, so some are run at a higher one, beside
    their run at the highest; and methods that inherit their rate are run at all three. No rate is chosen from here.
    """
    rows = [
        Row(m, ((pruned(m, sparsity, 1, rate=rate),),), {"rate": rate})
        for sparsity in (0.9, 0.95)
        for m in RECOVERING
        for rate in (max(RATES), HIGH_RATE)
    ]
    rows += [Row(m, ((pruned(m, 0.9, 1, rate=rate),),), {"rate": rate}) for m in INHERITED for rate in RATES]
    note = f"Seed 1. {HIGH_RATE:g} is none of the benchmark's rates; {', '.join(INHERITED)} inherit theirs elsewhere."
    return Grid("highrate", "Higher and own learning rates", tuple(rows), longer([1]), split="val", note=note)


DISTILLATION = {"class_path": "cut.distillation.Distillation"}
ITERATIVE = {"class_path": "cut.schedules.Iterative", "init_args": {"rounds": 3, "every": 1, "final_sparsity": 0.95}}
POWER = "pruning.scorer.init_args.power"
GRADUAL = {"class_path": "cut.schedules.Gradual", "init_args": {"start": 0, "end": 3}}
FALLING = {"class_path": "cut.fusion.FallingVote", "init_args": {"start": 1.0, "end": 0.0}}
# What was tried for cut-plus, one change at a time on CUT: a config, and options on top.
CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "nothing": ("cut", {}),
    "no floor": ("cut", {"pruning.floor": 0.0}),
    "floor 2.5 %": ("cut", {"pruning.floor": 0.025}),
    "floor 4 %": ("cut", {"pruning.floor": 0.04}),
    "learning rate 3e-3": ("cut", {"model.init_args.optimizer.init_args.lr": 3e-3}),
    "learning rate 3e-4": ("cut", {"model.init_args.optimizer.init_args.lr": 3e-4}),
    "cosine schedule": ("cut", {"model.init_args.schedule": "cosine"}),
    "gradual": ("cut-gradual", {}),
    "iterative": ("cut-iterative", {}),
    "distillation": ("cut-distilled", {}),
    "distillation of outputs": ("cut", {"trainer.callbacks": [{**DISTILLATION, "init_args": {"features": 0.0}}]}),
    "distillation of features": ("cut", {"trainer.callbacks": [{**DISTILLATION, "init_args": {"weight": 0.0}}]}),
    "batch norm recalibrated": ("cut-recalibrated", {}),
    "squared scores": ("cut-squared", {}),
    "gradient times squared weight": ("cut", {POWER: 2}),
    "normalised by layer": ("cut-per-layer", {}),
    "falling vote share": ("cut-falling", {}),
    "gradual, falling vote share": ("cut-gradual", {"pruning.fusion": FALLING}),
    "union": ("disparse", {}),
    "2 scoring batches": ("cut", {"pruning.batches": 2}),
    "50 scoring batches": ("cut", {"pruning.batches": 50}),
    "small towers": ("cut-towers", {}),
    "reconstruction": ("cut-reconstructed", {}),
    "reconstruction, distillation": ("cut-reconstructed", {"trainer.callbacks": [DISTILLATION]}),
    "reconstruction, iterative": ("cut-reconstructed", {"pruning.schedule": ITERATIVE}),
    "reconstruction in 2 rounds": ("cut-reconstructed", {"pruning.rounds": 2}),
    "reconstruction in 4 rounds": ("cut-plus", {"pruning.rounds": 4}),
    "reconstruction in 8 rounds (cut-plus)": ("cut-plus", {}),
    "reconstruction in 16 rounds": ("cut-plus", {"pruning.rounds": 16}),
    "magnitude, reconstruction in 8 rounds": ("magnitude-plus", {}),
    "cut-plus, 3e-4": ("cut-plus", {"model.init_args.optimizer.init_args.lr": 3e-4}),
    "cut-plus, 3e-3": ("cut-plus", {"model.init_args.optimizer.init_args.lr": 3e-3}),
    "cut-plus, squared scores": ("cut-plus", {"pruning.scorer.init_args.accumulate": "squared"}),
    "cut-plus, gradient times squared weight": ("cut-plus", {POWER: 2}),
    "cut-plus, mean of scores": ("cut-plus", {"pruning.fusion": {"class_path": "cut.fusion.Mean"}}),
    "cut-plus, falling vote share": ("cut-plus", {"pruning.fusion": FALLING}),
    "cut-plus, union": ("cut-plus", {"pruning.fusion.init_args.share": 0.0}),
    "cut-plus, distillation": ("cut-plus", {"trainer.callbacks": [DISTILLATION]}),
    "cut-plus, gradual": ("cut-plus", {"pruning.schedule": GRADUAL, "pruning.rounds": 2}),
    "cut-plus, gradual, distillation": (
        "cut-plus",
        {"pruning.schedule": GRADUAL, "pruning.rounds": 2, "trainer.callbacks": [DISTILLATION]},
    ),
    "cut-plus, fitted to the dense model": ("cut-plus", {"pruning.fit_to": "dense"}),
    "cut-plus, fitted to the dense model on 24 batches": (
        "cut-plus",
        {"pruning.fit_to": "dense", "pruning.reconstruct": 24},
    ),
    "cut-plus, small towers": ("cut-plus", {"trainer.callbacks": [{"class_path": "cut.towers.SmallTowers"}]}),
}


def changes_grid() -> Grid:
    """One change at a time on CUT at 95 %, seed 1: what ``cut-plus`` is made of."""
    rows = [
        Row("cut", ((pruned(method, 0.95, 1, rate=FIRST_RATE, settings=options),),), {"change": change})
        for change, (method, options) in CHANGES.items()
    ]
    return Grid("changes", "One change at a time on CUT", tuple(rows), longer([1]), split="val", note="Seed 1, 95 %.")


RECOVERING = ("magnitude", "snip", "disparse", "cut", "cut-plus")
STEPS = (0, 25, 100, 200, 800)
PART = 25  # steps of one of the recipe's parts
LOW_RATE = 5e-5


def recovery_grid() -> Grid:
    """How much is the score, and how much the recipe: steps, floor and learning rate."""
    rows = []
    for sparsity in (0.9, 0.95):
        for method in RECOVERING:
            for kept in (floor(sparsity), 0.0):
                for steps in STEPS:
                    for rate in ("tuned", "low"):
                        seeds = SEEDS if steps == 200 else SEEDS[:1]
                        runs = tuple((_recovering(method, sparsity, s, steps, kept, rate),) for s in seeds)
                        rows.append(Row(method, runs, {"floor": kept, "rate": rate, "steps": steps}))
    note = (
        f"floor: of every layer; low rate: {LOW_RATE:g}, constant. Three seeds where 200 steps are taken. The longer "
        "dense model has 200 steps more, whatever the row has."
    )
    return Grid(
        "recovery", "The score and the recipe", tuple(rows), longer(SEEDS), note=note, across="steps", by_task=True
    )


def _recovering(method: str, sparsity: float, seed: int, steps: int, kept: float, rate: str) -> Cell:
    """One cell of the recovery grid; the recipe's own settings are left out, so that cells are shared with others."""
    low = rate == "low" and steps > 0  # without a step all rates are the same run
    settings: dict[str, Any] = {}
    if kept == 0:
        settings["pruning.floor"] = 0.0
    if steps != 200:
        settings |= {"trainer.max_epochs": steps // PART, "trainer.check_val_every_n_epoch": max(1, steps // PART)}
        if steps < 200:  # a schedule of several cuts does not fit
            settings["pruning.schedule"] = {"class_path": "cut.schedules.OneShot"}
    if low:
        settings |= {"model.init_args.schedule": "constant", "model.init_args.warmup": 0.0}
    return pruned(method, sparsity, seed, rate=LOW_RATE if low else None, settings=settings)


OTHERS = (
    "random-erk",
    "magnitude-uniform",
    "snip-init",
    "taylor-per-task",
    "fisher",
    "fisher-per-task",
    "lth-early",
    "disparse-pt-gradient",
    "disparse-dynamic",
    "rigl",
    "adapmtl",
    "scratch",
    "cut-intersection",
    "cut-mean",
    "cut-max",
    "cut-weighted",
    "cut-falling",
    "cut-squared",
    "cut-per-layer",
    "cut-gradual",
    "cut-iterative",
    "cut-recalibrated",
    "cut-distilled",
    "cut-towers",
    "cut-reconstructed",
    "magnitude-reconstructed",
    "magnitude-plus",
)
# Rows of table-rooms whose first seed stands beside the others.
BESIDE = ("magnitude", "taylor", "disparse", "cut", "cut-plus")
# Conv and Linear weights of the benchmark's MobileNetV2: the backbone, and the head of each task.
BACKBONE_WEIGHTS, HEAD_WEIGHTS = 1_780_160, {"seg": 39_584, "normal": 38_816, "depth": 38_688}


def separate(sparsity: float, seed: int) -> tuple[Cell, ...]:
    """Single-task models that together have as many weights as one joint model at a sparsity, in equal parts."""
    whole = BACKBONE_WEIGHTS + sum(HEAD_WEIGHTS[t] for t in KEPT)
    each = (whole - round(sparsity * whole)) // len(KEPT)
    # The floor follows the sparsity that these models have, as everywhere.
    kept = {t: floor(1 - each / (BACKBONE_WEIGHTS + HEAD_WEIGHTS[t])) for t in KEPT}
    settings = {"pruning.budget.init_args.target": each}
    return tuple(
        pruned("separate", None, seed, [t], settings={**settings, "pruning.floor": kept[t]}, level=sparsity)
        for t in KEPT
    )


def methods_grid() -> Grid:
    """Every other method at 70 and 90 %, seed 1, beside a few of table-rooms."""
    rows = []
    for sparsity in (0.7, 0.9):
        rows += [Row(m, ((pruned(SAME.get(m, m), sparsity, 1),),)) for m in (*OTHERS, *BESIDE, "joint")]
        rows.append(Row("separate", (separate(sparsity, 1),), level=sparsity))
        cell = pruned("cut-reference", None, 1, settings=reference(sparsity), level=sparsity)
        rows.append(Row("cut-reference", ((cell,),), level=sparsity))
    note = (
        "cut-reference has a keep ratio for each task, and its sparsity is what comes out. "
        f"joint is snip's run, fisher-per-task cut-squared's: one rule each. {', '.join(BESIDE)}: seed 1 of "
        "table-rooms. Of three tasks cut-falling needs one from two thirds on: at both sparsities it is the union."
    )
    return Grid("methods", "Every other method", tuple(rows), longer([1]), note=note)


# The reference's keep ratio of each task by the sparsity that it is meant for, found by scoring alone: how far the
# votes of the tasks overlap decides what comes out.
KEEP_RATIO = {0.7: 0.2837, 0.9: 0.08}


def reference(sparsity: float) -> dict[str, Any]:
    """Settings of the reference's rule, which has no floor, for about a sparsity."""
    return {"pruning.floor": 0.0, "pruning.budget.init_args.ratio": KEEP_RATIO[sparsity]}


FIVE = ("seg", "normal", "depth", "edge", "keypoint")
RULES: dict[str, dict[str, Any]] = {
    "1 of 5 (union)": {"class_path": "cut.fusion.Vote", "init_args": {"share": 0.0}},
    "2 of 5": {"class_path": "cut.fusion.Vote", "init_args": {"share": 0.4}},
    "3 of 5 (half, majority)": {"class_path": "cut.fusion.Vote", "init_args": {"share": 0.5}},
    "4 of 5": {"class_path": "cut.fusion.Vote", "init_args": {"share": 0.8}},
    "5 of 5 (intersection)": {"class_path": "cut.fusion.Vote", "init_args": {"share": 1.0}},
    "mean": {"class_path": "cut.fusion.Mean"},
    "max": {"class_path": "cut.fusion.Max"},
    "weighted sum": {
        "class_path": "cut.fusion.Weighted",
        "init_args": {"weights": {"seg": 1.0, "normal": 3.0, "depth": 1.0, "edge": 5.0, "keypoint": 5.0}},
    },
}


def fusion_grid() -> Grid:
    """Fusion rules on five dense tasks, with and without a floor."""
    five: dict[str, Any] = {"data.init_args.tasks": list(FIVE)}
    start = dense(1, settings=five)
    more = {start.id: pruned("dense-longer", None, 1, FIVE, start, settings=five)}
    rows = []
    for sparsity in (0.9, 0.95):
        for kept in (floor(sparsity), 0.0):
            for rule, fusion in RULES.items():
                settings = {**five, "pruning.fusion": fusion}
                if kept == 0:
                    settings["pruning.floor"] = 0.0
                cell = pruned("cut", sparsity, 1, FIVE, start, settings=settings)
                rows.append(Row("cut", ((cell,),), {"rule": rule, "floor": kept}))
    return Grid("fusion", "How tasks agree", tuple(rows), more, note="Five dense tasks, seed 1.")


FOUR = ("seg", "normal", "depth", "edge")


def subsets() -> list[tuple[str, ...]]:
    """Every subset of the four tasks but the empty one, small ones first."""
    return [s for n in range(1, len(FOUR) + 1) for s in combinations(FOUR, n)]


def subsets_grid() -> Grid:
    """Every subset of the tasks at 90 %: scored by the kept tasks, or by all with heads dropped afterwards."""
    rows = []
    for tasks in subsets():
        for voters in ("kept tasks", "all tasks"):
            if voters == "all tasks" and len(tasks) == len(FOUR):
                continue
            settings = {"pruning.voters": list(FOUR)} if voters == "all tasks" else {}
            rows.append(Row("cut", ((pruned("cut", 0.9, 1, tasks, settings=settings),),), {"scored": voters}))
    note = (
        "CUT at 90 %, seed 1; ms: PyTorch, one thread, beside another run. The longer dense model keeps all four "
        "tasks, and is compared on those of the row."
    )
    against = longer([1], FOUR)
    return Grid("subsets", "Every subset of the tasks", tuple(rows), against, note=note, by_task=True, by_latency=True)


BACKBONES = ("mobilenetv2", "efficientnet_lite0", "resnet18", "vit_small")


def backbones_grid() -> Grid:
    """Three methods on four backbones at 90 %, seed 1."""
    rows, more = [], {}
    for model in BACKBONES:
        start = dense(1, model)
        extra = pruned("dense-longer", None, 1, start=start, model=model)
        more[start.id] = extra
        rows += [Row("dense", ((start,),)), Row("dense-longer", ((extra,),))]
        for method in ("magnitude", "disparse", "cut", "cut-plus"):
            rows.append(Row(method, ((pruned(method, 0.9, 1, start=start, model=model),),)))
    epochs = ", ".join(f"{model} {n}" for model, n in EPOCHS.items())
    note = (
        f"Seed 1; epochs of dense training: mobilenetv2 50, {epochs}; rates as chosen for MobileNetV2. ResNet-18 "
        "starts from random weights, as no package holds others; the ViT's backbone learns at 1e-5 in dense training, "
        "and at a tenth of the heads' rate in recovery."
    )
    return Grid("backbones", "CNNs and a ViT", tuple(rows), more, note=note)


GRIDS: dict[str, Callable[[], Grid]] = {
    "rates": rate_grid,
    "highrate": high_rate_grid,
    "changes": changes_grid,
    "rooms": rooms_grid,
    "recovery": recovery_grid,
    "methods": methods_grid,
    "fusion": fusion_grid,
    "subsets": subsets_grid,
    "backbones": backbones_grid,
    "edge": edge_grid,
    "channels": channels_grid,
    "edge-vit": edge_vit_grid,
    "edge-width": edge_width_grid,
    "fashion-mnist": fashion_grid,
    "newtask": newtask_grid,
    "newtask-groups": groups_grid,
}
