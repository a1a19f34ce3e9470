"""Grid: one table as the runs that it needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from experiments.cell import Cell

Selection = Literal["last", "best_val", "best_test"]


@dataclass(frozen=True)
class Row:
    """One row of a table: one method at one setting, over seeds.

    Attributes:
        method: Name in the table.
        runs: One entry per seed: the cells whose metrics together make the result. Nearly always one; single-task
            models that share a budget are several.
        variant: What sets this row apart from others of the same method, by column.
        level: The sparsity that it is shown under, where its cells' targets do not say so.
    """

    method: str
    runs: tuple[tuple[Cell, ...], ...]
    variant: dict[str, Any] = field(default_factory=dict)
    level: float | None = None


@dataclass(frozen=True)
class Grid:
    """One table.

    Attributes:
        name: ``make table-<name>``.
        title: Heading of the table.
        rows: In the order of the table.
        longer: Id of a dense cell to the cell of the same model trained for the extra steps.
        against: Id of a cell to the dense cell that it is compared with, where it does not start from that one.
        alike: Id of a cell to others whose networks have the same layers: their files take the same time and space.
        selection: Which epoch the table reports.
        split: Whose metrics it reports: ``test``, or ``val`` where the table is there to choose something by.
        note: What a reader should know, for the caption.
        across: The variant whose values are the columns of its overview, where those are not the sparsities.
        by_task: Whether it also tells each task's own change.
        by_latency: Whether it also tells the latency of PyTorch on one thread, as the run measured it.
        by_file: Whether its rows are told by runtime and precision, as delivered (:mod:`experiments.delivery`).
        by_step: Whether its rows are told by steps of adaptation to a new task (:mod:`experiments.curves`).
        folder: Of its records under ``experiments/records``, and of its runs under ``runs``.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    longer: dict[str, Cell] = field(default_factory=dict)
    against: dict[str, Cell] = field(default_factory=dict)
    alike: dict[str, tuple[Cell, ...]] = field(default_factory=dict)
    selection: Selection = "last"
    split: Literal["test", "val"] = "test"
    note: str = ""
    across: str = ""
    by_task: bool = False
    by_latency: bool = False
    by_file: bool = False
    by_step: bool = False
    folder: str = "rooms"

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
        yield from self.against.values()
        for row in self.rows:
            for run in row.runs:
                yield from run
