"""Multi-Fashion+MNIST: the main methods and the related systems on two classification tasks, under one recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from experiments.cell import Cell
from experiments.grid import Grid, Row
from experiments.recipe import pruned

TASKS = ("garment", "digit")
SEEDS = (1, 2)
MODEL = "small_cnn"
SPARSITIES = (0.7, 0.9, 0.95)
# One rate for all methods at a sparsity: what most of them chose on Rooms; the dense model's at 0.
RATES = {0.0: 1e-3, 0.7: 1e-3, 0.9: 3e-3, 0.95: 3e-3}
METHODS = ("random", "magnitude", "snip", "taylor", "imp", "lth", "cut", "cut-plus", "merge-then-cut", "cut-then-merge")
# Related systems without a budget: what counts is all that is deployed.
SHARING = ("taps", "rcm")
# What the cut of merged models has to wait for: an epoch of each task.
MERGED = ("merge-then-cut", "cut-then-merge")
UNION = "cut = disparse"
_DATA = {
    "data/rooms": "data/multifashion",
    "recipe/dense": "recipe/fashion",
    "recipe/recover": "recipe/fashion-recover",
}


def _here(cell: Cell) -> Cell:
    """A cell of the benchmark's recipe, on this data set and by its recipes."""
    return replace(cell, configs=tuple(_DATA.get(c, c) for c in cell.configs))


def start(seed: int) -> Cell:
    """The dense model of a seed."""
    configs = (
        "trainer/default",
        "data/multifashion",
        f"model/{MODEL}",
        "pruning/dense",
        "logger/none",
        "recipe/fashion",
    )
    return Cell(configs, {"seed_everything": seed, "data.init_args.seed": seed})


def run(method: str, sparsity: float | None, seed: int) -> Cell:
    """One run of a method from the dense model of its seed."""
    settings: dict[str, Any] = {}
    if method in MERGED:
        settings["pruning.schedule.init_args.epoch"] = len(TASKS)
    cell = pruned(method, sparsity, seed, TASKS, start(seed), RATES[sparsity or 0.0], MODEL, settings)
    return _here(cell)


def fashion_grid() -> Grid:
    """The main methods at three sparsities, and the related systems, two seeds."""

    def row(name: str, method: str, sparsity: float | None) -> Row:
        return Row(name, tuple((run(method, sparsity, s),) for s in SEEDS))

    rows = [Row("dense", tuple((start(s),) for s in SEEDS)), row("dense-longer", "dense-longer", None)]
    rows += [row(m, m, None) for m in SHARING]
    rows += [row(UNION if m == "cut" else m, m, x) for x in SPARSITIES for m in METHODS]
    longer: Mapping[str, Cell] = {start(s).id: run("dense-longer", None, s) for s in SEEDS}
    rates = ", ".join(f"{100 * k:g} %: {v:g}" for k, v in RATES.items())
    note = (
        "Of two tasks at least half is one, so CUT at share 0.5 is the union, DiSparse's rule: one row. Not compared "
        "with published numbers: the pairs are others. taps and rcm have no budget; their parameters are all that is "
        f"deployed, each task's own tensors included. Learning rates by sparsity, the same for all: {rates}."
    )
    return Grid("fashion-mnist", "Multi-Fashion+MNIST", tuple(rows), dict(longer), note=note, folder="fashion-mnist")
