"""Grids: every table of the benchmark as the runs that it needs.

A grid is rows of cells; nothing here runs anything. :mod:`experiments.sweep` runs the cells that have no record,
:mod:`experiments.results` turns records into tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import yaml

from experiments.cell import CONFIGS, Cell

Selection = Literal["last", "best_val", "best_test"]


@dataclass(frozen=True)
class Row:
    """One row of a table: one method at one setting, over seeds.

    Attributes:
        method: Name in the table.
        runs: One entry per seed: the cells whose metrics together make the result. Nearly always one; single-task
            models that share a budget are several.
        variant: What sets this row apart from others of the same method, by column.
    """

    method: str
    runs: tuple[tuple[Cell, ...], ...]
    variant: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Grid:
    """One table.

    Attributes:
        name: ``make table-<name>``.
        title: Heading of the table.
        rows: In the order of the table.
        longer: Id of a dense cell to the cell of the same model trained for the extra steps, per kept tasks.
        selection: Which epoch the table reports.
        note: What a reader should know, for the caption.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    longer: dict[str, Cell] = field(default_factory=dict)
    selection: Selection = "last"
    note: str = ""

    def cells(self) -> list[Cell]:
        """All cells, dense ones before those that start from them, each once."""
        found: dict[str, Cell] = {}
        for cell in self._all():
            for one in (cell.start, cell):
                if one is not None:
                    found.setdefault(one.id, one)
        return list(found.values())

    def _all(self) -> Iterator[Cell]:
        yield from self.longer.values()
        for row in self.rows:
            for run in row.runs:
                yield from run


KEPT = ("seg", "normal", "depth")
SEEDS = (1, 2, 3)
RATES = (5e-4, 1.5e-3, 4e-3)
FIRST_RATE = RATES[1]
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
AT_98 = ("magnitude", "disparse", "cut", "cut-plus")
# Options that follow the budget or the run's seed wherever a method's config has them.
FOLLOW_TARGET, FOLLOW_SEED = ("final", "final_sparsity"), ("seed",)


@lru_cache(maxsize=1)
def rates() -> dict[str, float]:
    """The learning rate of every method, chosen on validation (``python -m experiments.rates``)."""
    return dict(yaml.safe_load((CONFIGS / "recipe/rates.yaml").read_text()) or {})


def dense(seed: int, model: str = "mobilenetv2", **settings: Any) -> Cell:
    """The dense four-task model on Rooms."""
    configs = ("trainer/default", "data/rooms", f"model/{model}", "pruning/dense", "logger/none", "recipe/dense")
    return Cell(configs, {"seed_everything": seed, "data.init_args.seed": seed, **settings})


def _following(config: Mapping[str, Any], seed: int, target: float | None, path: str = "pruning") -> dict[str, Any]:
    """Settings for the options that follow the budget or the seed."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{path}.{key}"
        if isinstance(value, Mapping):
            found |= _following(value, seed, target, name)
        elif key in FOLLOW_SEED:
            found[name] = seed
        elif key in FOLLOW_TARGET and target is not None:
            found[name] = target
    return found


def pruned(
    method: str,
    sparsity: float | None,
    seed: int,
    tasks: Sequence[str] = KEPT,
    start: Cell | None = None,
    rate: float | None = None,
    model: str = "mobilenetv2",
    settings: Mapping[str, Any] | None = None,
) -> Cell:
    """One run of a method from the dense model.

    Args:
        method: A config under ``configs/pruning``.
        sparsity: The budget; None leaves the config's (a dense model has none).
        seed: Of data order, augmentation and scoring; the dense model has the same.
        tasks: The kept tasks.
        start: The dense run; default that of the seed.
        rate: Highest learning rate; default the method's own from ``configs/recipe/rates.yaml``.
        model: A config under ``configs/model``.
        settings: Further options.
    """
    start = start or dense(seed, model)
    configs = (
        "trainer/default",
        "data/rooms",
        f"model/{model}",
        f"pruning/{method}",
        "logger/none",
        "recipe/recover",
    )
    plain = Cell(configs)
    options: dict[str, Any] = {
        "seed_everything": seed,
        "data.init_args.seed": seed,
        "pruning.tasks": list(tasks),
        "model.init_args.optimizer.init_args.lr": rate or rates().get(method, FIRST_RATE),
    }
    if sparsity is not None:
        options["pruning.budget.init_args.target"] = sparsity
    options |= _following(plain.config.get("pruning", {}), seed, sparsity)
    return Cell(configs, {**options, **(settings or {})}, start)


def _longer(seeds: Sequence[int], tasks: Sequence[str] = KEPT, model: str = "mobilenetv2") -> dict[str, Cell]:
    """The dense model trained for the extra steps, by the id of the dense run it starts from."""
    found = [pruned("dense-longer", None, s, tasks, model=model) for s in seeds]
    return {c.start.id: c for c in found if c.start is not None}


def rate_grid() -> Grid:
    """Every method at every rate, 70 %, seed 1: validation decides."""
    rows = [
        Row(m, ((pruned(m, None if m == "dense-longer" else 0.7, 1, rate=rate),),), {"rate": rate})
        for m in METHODS
        for rate in RATES
    ]
    return Grid("rates", "Learning rates", tuple(rows), _longer([1]), note="Seed 1; chosen by Delta_m on validation.")


def rooms_grid() -> Grid:
    """Sixteen methods, three sparsities and 98 % for four, three seeds."""
    rows = [Row("dense", tuple((dense(s),) for s in SEEDS))]
    for sparsity in (0.7, 0.9, 0.95, 0.98):
        for m in METHODS:
            if m == "dense-longer":
                if sparsity == 0.7:
                    rows.append(Row(m, tuple((pruned(m, None, s),) for s in SEEDS)))
            elif sparsity < 0.98 or m in AT_98:
                rows.append(Row(m, tuple((pruned(m, sparsity, s),) for s in SEEDS)))
    return Grid("rooms", "Methods under one recipe on Rooms", tuple(rows), _longer(SEEDS))


GRIDS: dict[str, Callable[[], Grid]] = {"rates": rate_grid, "rooms": rooms_grid}
