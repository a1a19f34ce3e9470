"""Papers: the tables of the three published data sets, under the published recipe and under one of today.

A set's tables are two grids: ``paper`` (DeepLab-ResNet34 from random weights, legacy preprocessing and metrics, keep
ratios, the epoch chosen on test as published and marked so) and ``modern`` (ImageNet weights, corrected metrics, exact
budgets, the epoch chosen on validation). ``small`` makes both fit two CPU cores and says so in the title.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from experiments.cell import Cell
from experiments.grid import Grid, Row
from experiments.recipe import floor, following

Recipe = Literal["paper", "modern"]
RECIPES: tuple[Recipe, ...] = ("paper", "modern")
SPARSITIES = (0.3, 0.5, 0.7, 0.9)
METHODS: dict[str, tuple[str, ...]] = {
    "paper": (
        *("random", "lth", "snip-init", "snip", "magnitude", "imp", "disparse-static", "disparse-pt"),
        *("disparse-pt-gradient", "disparse", "cut", "cut-plus"),
    ),
    "modern": (
        *("random", "magnitude", "magnitude-erk", "snip", "synflow", "taylor", "imp", "lth"),
        *("disparse-static", "disparse-pt", "disparse", "cut", "cut-plus"),
    ),
}


@dataclass(frozen=True)
class Published:
    """One published data set.

    Attributes:
        name: As in the paper.
        tasks: All its tasks, in the order T1, T2, ...
        selections: The kept tasks of the authors' files.
        ratios: Sparsity to the keep ratio of the authors' files.
        crop: Side of the training crop.
    """

    name: str
    tasks: tuple[str, ...]
    selections: tuple[tuple[str, ...], ...]
    ratios: Mapping[float, float]
    crop: int


TASKONOMY = ("seg", "normal", "depth", "keypoint", "edge")
SETS: dict[str, Published] = {
    "nyuv2": Published(
        "NYU-v2",
        ("seg", "normal", "depth"),
        (("seg", "normal"), ("seg", "depth"), ("normal", "depth"), ("seg", "normal", "depth")),
        {0.3: 0.675, 0.5: 0.46, 0.7: 0.257, 0.9: 0.08},
        321,
    ),
    "cityscapes": Published(
        "Cityscapes",
        ("seg", "depth"),
        (("seg",), ("depth",), ("seg", "depth")),
        {0.3: 0.71, 0.5: 0.51, 0.7: 0.30, 0.9: 0.095},
        224,
    ),
    "taskonomy": Published(
        "Tiny-Taskonomy",
        TASKONOMY,
        (*((a, b) for i, a in enumerate(TASKONOMY) for b in TASKONOMY[i + 1 :]), TASKONOMY),
        {0.3: 0.675, 0.5: 0.50, 0.7: 0.257, 0.9: 0.10},
        224,
    ),
}
# What the small grids leave out, and their size.
SMALL_SPARSITY, SMALL_CROP, SMALL_WIDTH, SMALL_BATCH = 0.7, 96, 64, 8
# Fitting the weights of DeepLab-ResNet34 again in eight rounds takes half an hour on a CPU.
SMALL_METHODS = {
    "paper": ("random", "lth", "snip", "magnitude", "disparse", "cut"),
    "modern": ("random", "lth", "snip", "magnitude", "disparse", "cut", "cut-plus"),
}
SMALL_FIT = 2  # rounds of a cut, and batches that a reconstruction is fitted on
SMALL_STEPS: dict[str, tuple[int, int]] = {"paper": (40, 12), "modern": (80, 24)}  # dense training, recovery
SMALL_PARTS = 6


def half(tasks: Sequence[str]) -> int:
    """Votes that are at least half of the tasks.

    Example:
        >>> [half("x" * n) for n in (1, 2, 3, 4, 5)]
        [1, 1, 2, 2, 3]
    """
    return math.ceil(len(tasks) / 2)


def _small(name: str, recipe: Recipe, recover: bool) -> dict[str, Any]:
    """Settings with which a run of a recipe takes a minute on one CPU core."""
    steps = SMALL_STEPS[recipe][recover]
    parts = SMALL_PARTS if recover else 2
    found: dict[str, Any] = {
        "trainer.max_steps": steps,
        "trainer.max_epochs": parts,
        "trainer.limit_train_batches": steps // parts,
        "trainer.check_val_every_n_epoch": parts,
        "trainer.precision": "32-true",
        "data.init_args.batch_size": SMALL_BATCH,
        "data.init_args.num_workers": 0,
        "data.init_args.augmentation.crop": [SMALL_CROP, SMALL_CROP],
        "model.init_args.network.head_width": SMALL_WIDTH,
        "model.init_args.network.output_stride": 16,
    }
    if recipe == "paper":  # as many steps as these cannot move weights at the published rates
        found["model.init_args.optimizer.init_args.lr"] = 1e-4 if recover else 1e-3
    return found | ({"pruning.batches": 2} if recover else {})


def _configs(name: str, recipe: Recipe, method: str, recover: bool) -> tuple[str, ...]:
    model = "deeplab_resnet34" if recipe == "paper" else "mobilenetv2"
    last = f"paper-{name}" if recipe == "paper" else "modern"
    last += "-recover" if recover else ""
    return (
        "trainer/default",
        f"data/{name}",
        f"model/{model}",
        f"pruning/{method}",
        "logger/none",
        f"recipe/{last}",
    )


def dense(name: str, recipe: Recipe, seed: int = 1, small: bool = False) -> Cell:
    """The dense model of all tasks."""
    settings = {"seed_everything": seed, "data.init_args.seed": seed, **(_small(name, recipe, False) if small else {})}
    if recipe == "modern" and name == "taskonomy" and not small:
        settings["trainer.check_val_every_n_epoch"] = 20
    return Cell(_configs(name, recipe, "dense", False), settings)


def pruned(
    name: str,
    recipe: Recipe,
    method: str,
    sparsity: float | None,
    tasks: Sequence[str],
    seed: int = 1,
    small: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Cell:
    """One run of a method from the dense model of the same seed.

    Args:
        name: Of :data:`SETS`.
        recipe: ``paper`` or ``modern``.
        method: A config under ``configs/pruning``.
        sparsity: The budget; None leaves the config's.
        tasks: The kept tasks.
        seed: Of the run and its dense model.
        small: Whether it must fit two CPU cores.
        settings: Further options.
    """
    configs = _configs(name, recipe, method, True)
    options: dict[str, Any] = {
        "seed_everything": seed,
        "data.init_args.seed": seed,
        "pruning.tasks": list(tasks),
        **(_small(name, recipe, True) if small else {}),
    }
    if sparsity is not None:
        options["pruning.budget.init_args.target"] = sparsity
        if recipe == "modern":
            options["pruning.floor"] = floor(sparsity)
    if recipe == "modern" and name == "taskonomy" and not small:
        # Its test set is ten times as large as all that recovery sees: looked at once on the way and at the end.
        options["trainer.check_val_every_n_epoch"] = 10
    plain = Cell(configs).config.get("pruning", {})
    options |= following(plain, seed, sparsity)
    if small:  # a layer's fit is at the set's own size of pictures, and has to be repeated in every round
        options |= {f"pruning.{k}": SMALL_FIT for k in ("rounds", "reconstruct") if plain.get(k, 0) > SMALL_FIT}
    return Cell(configs, {**options, **(settings or {})}, dense(name, recipe, seed, small))


def _reference(name: str, sparsity: float, tasks: Sequence[str], votes: int, seed: int, small: bool) -> Cell:
    """The authors' rule: the keep ratio of their files, and so many votes."""
    budget = {"pruning.budget.init_args.ratio": SETS[name].ratios[sparsity], "pruning.budget.init_args.votes": votes}
    return pruned(name, "paper", "cut-reference", None, tasks, seed, small, budget)


def label(name: str, stand_in: bool) -> str:
    """What the pictures are: the set's name, or what stands in for it.

    Example:
        >>> label("nyuv2", False), label("nyuv2", True)
        ('NYU-v2', 'Rooms in NYU-v2 layout')
    """
    return f"Rooms in {SETS[name].name} layout" if stand_in else SETS[name].name


def folder(name: str, stand_in: bool) -> str:
    """Name of a set's records and runs, and the start of its tables' names; a stand-in's are never the set's."""
    return f"rooms-in-{name}" if stand_in else name


def grid(name: str, recipe: Recipe, stand_in: bool = False, small: bool = False, seeds: Sequence[int] = (1,)) -> Grid:
    """One table.

    Args:
        name: Of :data:`SETS`.
        recipe: ``paper`` or ``modern``.
        stand_in: Whether the pictures are rooms written in the set's layout; name and title then say so.
        small: The reduced grid: one sparsity, two selections, few methods and steps.
        seeds: One run of everything for each.

    Raises:
        ValueError: If there is no such set or recipe.
    """
    if name not in SETS or recipe not in RECIPES:
        raise ValueError(f"set {name!r}, recipe {recipe!r}; allowed: {', '.join(SETS)}; {', '.join(RECIPES)}")
    of = SETS[name]
    selections = (of.selections[0], of.selections[-1]) if small else of.selections
    methods = [m for m in METHODS[recipe] if not small or m in SMALL_METHODS[recipe]]
    rows = [Row("dense", tuple((dense(name, recipe, s, small),) for s in seeds))]
    more = {}
    if recipe == "modern":
        extra = [pruned(name, recipe, "dense-longer", None, of.tasks, s, small) for s in seeds]
        more = {c.start.id: c for c in extra if c.start is not None}
        rows.append(Row("dense-longer", tuple((c,) for c in extra)))
    for tasks in selections:
        for sparsity in (SMALL_SPARSITY,) if small else SPARSITIES:
            for m in methods:
                rows.append(Row(m, tuple((pruned(name, recipe, m, sparsity, tasks, s, small),) for s in seeds)))
            if recipe == "paper":
                # With one or two tasks two votes are an intersection, or nothing: both rules are run and named.
                rules = {"2 votes": 2, **({"at least half": half(tasks)} if half(tasks) != 2 else {})}
                for rule, votes in rules.items():
                    runs = tuple((_reference(name, sparsity, tasks, votes, s, small),) for s in seeds)
                    rows.append(Row("cut-reference", runs, {"rule": rule}, level=sparsity))
    title = f"{label(name, stand_in)}, the {'published' if recipe == 'paper' else 'modern'} recipe"
    return Grid(
        f"{folder(name, stand_in)}-{recipe}" + ("-reduced" if small else ""),
        title + (", reduced run" if small else ""),
        tuple(rows),
        more,
        selection="best_test" if recipe == "paper" else "best_val",
        note=_note(recipe, small),
    )


def _note(recipe: Recipe, small: bool) -> str:
    parts = []
    if recipe == "paper":
        parts.append(
            "Legacy preprocessing and metrics. cut-reference has the authors' keep ratios, so its sparsity is what "
            "comes out; all others meet theirs exactly."
        )
    else:
        parts.append("Corrected metrics; a learning rate of 1e-3 for all; dense-longer keeps all tasks.")
    if small:
        dense_steps, steps = SMALL_STEPS[recipe]
        parts.append(
            f"Reduced run: {dense_steps} steps of dense training and {steps} of recovery on crops of "
            f"{SMALL_CROP}x{SMALL_CROP}, heads {SMALL_WIDTH} wide: it shows that the pipeline works, not which "
            "method is best."
        )
    return " ".join(parts)
