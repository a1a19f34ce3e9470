"""Edge: models cut to latencies of a device, by CUT and by its rivals under one recipe.

Whole channels, attention heads and neurons go. How many multiply-accumulates may stay, so that the exported file takes
a share of the dense model's time, is measured once per method (:mod:`experiments.shapes`) and read from
``configs/recipe/latency.yaml``; what the finished models take is measured again (:mod:`experiments.delivery`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import yaml

from experiments.cell import CONFIGS, Cell
from experiments.grid import Grid, Row
from experiments.recipe import FIRST_RATE, KEPT, RATE, SEEDS, dense, pruned

LATENCIES = (0.75, 0.5, 0.35)
SELECTIONS: tuple[tuple[str, ...], ...] = (("seg", "depth"), KEPT)
OURS = ("cut-channels", "cut-channels-plus")
RIVALS = ("group-taylor", "group-norm")
METHODS = (*OURS, *RIVALS)
WIDTH = "width"
# Methods that take the shares measured for another one: a search would make each mask in four rounds of scores and
# least squares, minutes on a CPU. At 35 % of MobileNetV2's MACs (three tasks, seed 1) the two shapes differ, by a
# third more weights, but not in time, to 1 %; what finished models really take is measured for all.
SHARES_OF = {"cut-channels-plus": "cut-channels"}
ROUNDING = 8  # channels of every layer: what convolutions on a CPU are written for
# Seeds of each model.
MODELS: dict[str, tuple[int, ...]] = {"mobilenetv2": SEEDS[:2], "resnet18": SEEDS[:2], "vit_small": SEEDS[:1]}
# The ViT also learns a task with one label per picture, and is also cut by single weights.
VIT = "vit_small"
VIT_TASKS = ("seg", "normal", "depth", "edge", "scene")
WITH_SCENE = (*KEPT, "scene")
WEIGHTS = (0.7, 0.9)
# What the models have besides the recipe. At its config's stride of 8 ResNet-18 is no network for a device: 16 times as
# many multiply-accumulates as MobileNetV2. Large matrix products are a third faster in bfloat16, depthwise ones slower.
FASTER = {"trainer.precision": "bf16-mixed"}
SETTINGS: dict[str, dict[str, Any]] = {
    VIT: {"data.init_args.tasks": list(VIT_TASKS), **FASTER},
    "resnet18": {"model.init_args.network.output_stride": 16, **FASTER},
}
# What the dense models have besides. timm's ResNet-18 begins with random weights here, and its config's rate, chosen
# for the stride of 8, is too low for that: at the narrow ones' rate (docs/tables/edge-width.md) all tasks are better.
DENSE_RATES: dict[str, tuple[float, ...]] = {"resnet18": (6e-3, 2e-3)}  # tried; the chosen one first
# What CUT's runs have besides, found on validation (docs/tables/channels.md): summed, a weight of an embedding channel
# counts so much more than a neuron's that the ViT's neurons all go first. Torch-Pruning's importances are means.
REDUCE = "pruning.units.init_args.reduce"
UNITS: dict[str, dict[str, Any]] = {VIT: {REDUCE: "per_mac"}}
# How fast the cut ViT's backbone learns, as a share of the heads' rate, and on how many batches its weights are fitted,
# both found on validation (docs/tables/edge-vit.md). A fit on 128 pictures knows these by heart: a row of a ViT has up
# to 1536 inputs, and a picture only 63 positions.
BACKBONE_RATE, FIT = "model.init_args.backbone_rate", "pruning.reconstruct"
BACKBONE_RATES = (0.1, 0.03, 0.01)
FITTED, FITTED_VIT = 8, 24
CHOSEN: dict[tuple[str, str], dict[str, Any]] = {
    (VIT, OURS[1]): {BACKBONE_RATE: 0.03, FIT: FITTED_VIT},
    (VIT, RIVALS[0]): {BACKBONE_RATE: 0.03},
    (VIT, RIVALS[1]): {BACKBONE_RATE: 0.03},
}
# What narrowed ones have besides. Nothing pre-trained is to be kept, so all of the ViT learns, at one rate. Rates that
# were tried, the chosen one first (docs/tables/edge-width.md).
FROM_NOTHING: dict[str, dict[str, Any]] = {VIT: {BACKBONE_RATE: 1.0}}
WIDTH_RATES: dict[str, tuple[float, ...]] = {
    "mobilenetv2": (2e-2, 6e-2, 6e-3, 2e-3, 6e-4),
    "resnet18": (6e-3, 2e-2, 2e-3, 6e-4),
    VIT: (2e-3, 6e-3, 6e-4, 2e-4),
}
PICTURES, BATCH, STEPS = 1000, 16, 200  # of Rooms' training part; of a batch; of the recipe's recovery
Shares = Mapping[str, Mapping[str, Mapping[str, Mapping[float, float]]]]


@cache
def shares() -> Shares:
    """Model to kept tasks (``seg+depth``) to method to latency to the share of MACs, or the width, that meets it."""
    return dict(yaml.safe_load((CONFIGS / "recipe/latency.yaml").read_text()) or {})


def known(model: str, tasks: Sequence[str], method: str) -> Mapping[float, float]:
    """Latency to the share that was measured for a method, or for the one whose shares it takes."""
    return shares().get(model, {}).get("+".join(tasks), {}).get(SHARES_OF.get(method, method), {})


def start(model: str, seed: int, rate: float | None = None) -> Cell:
    """The dense run that models are cut from; ``rate`` is its highest, by default the one chosen for the model."""
    chosen = rate or next(iter(DENSE_RATES.get(model, ())), None)
    return dense(seed, model, {**SETTINGS.get(model, {}), **({RATE: chosen} if chosen else {})})


def selections(model: str) -> tuple[tuple[str, ...], ...]:
    """The sets of kept tasks."""
    return (*SELECTIONS, WITH_SCENE) if model == VIT else SELECTIONS


def cut(method: str, share: float, model: str, tasks: Sequence[str], seed: int) -> Cell:
    """A model cut by whole units until this share of the multiply-accumulates stays, and fine-tuned."""
    return changed(method, share, model, tasks, seed, CHOSEN.get((model, method), {}))


def changed(method: str, share: float, model: str, tasks: Sequence[str], seed: int, options: Mapping[str, Any]) -> Cell:
    """The same with other options than those chosen."""
    settings = {"pruning.budget.init_args.target": share, "pruning.rounding": ROUNDING, **SETTINGS.get(model, {})}
    settings |= UNITS.get(model, {}) if method in OURS else {}
    return pruned(method, None, seed, tasks, start(model, seed), FIRST_RATE, model, {**settings, **options})


def kept(model: str, tasks: Sequence[str], seed: int) -> Cell:
    """The dense model with the kept tasks only, trained for as many more steps: what latencies are shares of."""
    return pruned("dense-longer", None, seed, tasks, start(model, seed), model=model, settings=SETTINGS.get(model))


def scaled(width: float, model: str, tasks: Sequence[str], seed: int, rate: float | None = None) -> Cell:
    """The model with every layer narrowed, trained from random weights for all steps that a cut model has had.

    ``rate`` is the highest learning rate, by default the one chosen for the model.
    """
    begun = start(model, seed)
    per_epoch = PICTURES // BATCH
    epochs = int(begun.config["trainer"]["max_epochs"]) + math.ceil(STEPS / per_epoch)
    settings = {
        **begun.settings,
        "method": WIDTH,
        "data.init_args.tasks": list(tasks),
        "model.init_args.width": width,
        "model.init_args.network.weights": None,
        "trainer.max_epochs": epochs,
        "trainer.check_val_every_n_epoch": epochs,
        RATE: rate or WIDTH_RATES[model][0],
        **FROM_NOTHING.get(model, {}),
    }
    return Cell(begun.configs, settings)


def other_rates(width: float, model: str, tasks: Sequence[str], seed: int) -> tuple[Cell, ...]:
    """The same narrow network at the learning rates that were tried and not chosen."""
    return tuple(scaled(width, model, tasks, seed, rate) for rate in WIDTH_RATES[model][1:])


def wanted() -> Iterator[tuple[str, tuple[str, ...], str]]:
    """Model, kept tasks and method of everything that is cut to latencies."""
    for model in MODELS:
        for tasks in selections(model):
            yield from ((model, tasks, m) for m in methods(tasks))


def methods(tasks: tuple[str, ...]) -> tuple[str, ...]:
    """What is cut to latencies: CUT's two and all rivals, where a task is added only CUT's."""
    return OURS if tasks == WITH_SCENE else (*METHODS, WIDTH)


def latencies(tasks: tuple[str, ...]) -> tuple[float, ...]:
    """What is aimed at: all shares of the dense latency, half of it where a task is added."""
    return (0.5,) if tasks == WITH_SCENE else LATENCIES


def edge_grid() -> Grid:
    """CUT, Torch-Pruning's importances and narrower networks at the same latencies."""
    rows: list[Row] = []
    against: dict[str, Cell] = {}
    alike: dict[str, tuple[Cell, ...]] = {}
    unknown = 0
    for model, seeds in MODELS.items():
        for tasks in selections(model):
            rows.append(Row("dense-longer", tuple((kept(model, tasks, s),) for s in seeds), {"latency": 1.0}))
            for method in methods(tasks):
                found = known(model, tasks, method)
                unknown += sum(latency not in found for latency in latencies(tasks))
                for latency in (x for x in latencies(tasks) if x in found):
                    make = scaled if method == WIDTH else _of(method)
                    cells = [make(found[latency], model, tasks, s) for s in seeds]
                    rows.append(Row(method, tuple((c,) for c in cells), {"latency": latency}))
                    if method == WIDTH:
                        against |= {c.id: start(model, s) for c, s in zip(cells, seeds, strict=True)}
                        alike |= {c.id: other_rates(found[latency], model, tasks, c.seed) for c in cells}
    for sparsity in WEIGHTS:
        cell = pruned("cut", sparsity, 1, WITH_SCENE, start(VIT, 1), model=VIT, settings=SETTINGS[VIT])
        rows.append(Row("cut", ((cell,),), {"latency": 1.0}))
    note = "latency: the share of the dense model's that was aimed at, one picture, one thread, ONNX Runtime."
    if unknown:
        note += f" {unknown} shapes are not measured yet (python -m experiments.shapes)."
    title = "Delta_m at equal latency"
    return Grid("edge", title, tuple(rows), against=against, alike=alike, note=note, by_file=True, by_task=True)


PER_LAYER = {"class_path": "cut.scores.PerLayer", "init_args": {"scorer": {"class_path": "cut.scores.Sensitivity"}}}
# What was tried for a cut of channels, one change at a time on CUT: a config, and options on top.
CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "nothing": (METHODS[0], {}),
    "mean within a unit": (METHODS[0], {REDUCE: "mean"}),
    "sum per multiply-accumulate": (METHODS[0], {REDUCE: "per_mac"}),
    "normalised by layer": (METHODS[0], {"pruning.scorer": PER_LAYER}),
    "normalised by layer, mean": (METHODS[0], {"pruning.scorer": PER_LAYER, REDUCE: "mean"}),
    "squared scores": (METHODS[0], {"pruning.scorer.init_args.accumulate": "squared"}),
    "signed scores": (METHODS[0], {"pruning.scorer.init_args.accumulate": "signed"}),
    "mean of scores": (METHODS[0], {"pruning.fusion": {"class_path": "cut.fusion.Mean"}}),
    "union": (METHODS[0], {"pruning.fusion.init_args.share": 0.0}),
    "no rounding": (METHODS[0], {"pruning.rounding": 1}),
    "no floor": (METHODS[0], {"pruning.floor": 0.0}),
    "floor 20 %": (METHODS[0], {"pruning.floor": 0.2}),
    "reconstruction": (METHODS[0], {"pruning.reconstruct": 8}),
    "4 rounds": (METHODS[0], {"pruning.rounds": 4}),
    "reconstruction in 4 rounds": (METHODS[0], {"pruning.reconstruct": 8, "pruning.rounds": 4}),
    "learning rate 3e-4": (METHODS[0], {RATE: 3e-4}),
    "learning rate 3e-3": (METHODS[0], {RATE: 3e-3}),
    "Torch-Pruning's Taylor": ("group-taylor", {}),
    "Torch-Pruning's norm": ("group-norm", {}),
    "random": ("random-channels", {}),
}
# The same on the ViT, whose units are of three kinds: how is a weight of an embedding channel to count, of a head, of a
# neuron?
REDUCTIONS = {"ViT": "sum", "ViT, mean within a unit": "mean", "ViT, sum per multiply-accumulate": "per_mac"}
HALF = 0.4  # of the multiply-accumulates: about half of the latency


def channels_grid() -> Grid:
    """One change at a time on a cut of channels, seed 1: what the score of a unit should be."""
    rows = []
    for change, (method, options) in CHANGES.items():
        settings = {"pruning.budget.init_args.target": HALF, "pruning.rounding": ROUNDING, **options}
        cell = pruned(method, None, 1, KEPT, rate=FIRST_RATE, settings=settings)
        rows.append(Row(method, ((cell,),), {"change": change}, level=1 - HALF))
    for change, reduce in REDUCTIONS.items():
        settings = {"pruning.budget.init_args.target": HALF, "pruning.rounding": ROUNDING, REDUCE: reduce}
        cell = pruned(METHODS[0], None, 1, KEPT, rate=FIRST_RATE, model=VIT, settings=settings)
        rows.append(Row(METHODS[0], ((cell,),), {"change": change}, level=1 - HALF))
    note = f"Seed 1; {1 - HALF:.0%} of the multiply-accumulates are removed, which is what the column says."
    return Grid("channels", "One change at a time on a cut of channels", tuple(rows), split="val", note=note)


def edge_vit_grid() -> Grid:
    """How fast the cut ViT's backbone is to learn, and how many batches its weights are fitted on."""
    tasks, rows = SELECTIONS[0], []
    tried = [(method, rate, FITTED) for method in METHODS for rate in BACKBONE_RATES]
    for method, rate, batches in [*tried, (OURS[1], CHOSEN[VIT, OURS[1]][BACKBONE_RATE], FITTED_VIT)]:
        share = known(VIT, tasks, method).get(0.5)
        if share is not None:
            options = {BACKBONE_RATE: rate} | ({FIT: batches} if batches != FITTED else {})
            cell = changed(method, share, VIT, tasks, 1, options)
            variant = {"backbone_rate": rate, "fitted_on": batches if method == OURS[1] else 0}
            rows.append(Row(method, ((cell,),), variant, level=0.5))
    note = (
        "Seed 1; half of the latency, which is what the column says. backbone_rate: the backbone's learning rate as a "
        f"share of the heads'; fitted_on: batches of {BATCH} pictures that the weights are fitted on."
    )
    return Grid("edge-vit", "A cut ViT's recovery and fit", tuple(rows), split="val", note=note)


def edge_width_grid() -> Grid:
    """How fast a network is to learn from random weights, narrow or dense."""
    tasks, rows, against = SELECTIONS[0], [], {}
    for model, tried in WIDTH_RATES.items():
        width = known(model, tasks, WIDTH).get(0.5)
        if width is None:
            continue
        for rate in sorted(tried):
            cell = scaled(width, model, tasks, 1, rate)
            rows.append(Row(WIDTH, ((cell,),), {"learning_rate": rate}, level=0.5))
            against[cell.id] = start(model, 1)
    for model, tried in DENSE_RATES.items():
        for rate in sorted(tried):
            cell = start(model, 1, rate)
            rows.append(Row("dense", ((cell,),), {"learning_rate": rate}, level=0.0))
            against[cell.id] = start(model, 1)
    note = (
        "Seed 1. 50 %: narrow networks at half of the latency; dense: whole ones that begin with random weights too. "
        "learning_rate: the highest of the run."
    )
    return Grid(
        "edge-width",
        "Rates of networks that begin with random weights",
        tuple(rows),
        split="val",
        against=against,
        note=note,
    )


def _of(method: str) -> Any:
    return lambda share, model, tasks, seed: cut(method, share, model, tasks, seed)
