"""Render: a grid's tidy frame as Markdown, CSV and LaTeX."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from cut.files import write_atomically
from experiments.grid import Grid, Row
from experiments.results import Records, collect, is_dense, levels, tidy, union, variants
from experiments.typeset import Table, Text, latex, markdown

MISSING = "missing"  # a planned run has no record
NONE = "-"  # the grid plans nothing here
RULES = {
    "last": "last epoch",
    "best_val": "epoch of the lowest validation loss",
    "best_test": "**legacy protocol: chosen on test**",
}


@dataclass(frozen=True)
class Column:
    """How one column of the tidy frame is shown.

    Attributes:
        name: In the frame.
        heading: Over the column.
        scale: Factor on the number.
        digits: After the point.
        higher: Whether more is better; None where nothing is marked as best.
    """

    name: str
    heading: str
    scale: float = 1.0
    digits: int = 2
    higher: bool | None = None


DELTA = Column("delta_m", "Δm %", higher=True)
DETAILS = (
    DELTA,
    Column("delta_m_vs_longer", "Δm vs longer %"),
    Column("seg/miou", "seg mIoU % ↑", 100, 2, True),
    Column("seg/legacy/miou", "seg mIoU % (legacy) ↑", 100, 2, True),
    Column("seg/legacy/pixel_acc", "seg pixel acc. % (legacy) ↑", 100, 2, True),
    Column("normal/mean", "normals mean ° ↓", 1, 2, False),
    Column("normal/legacy/mean", "normals mean ° (legacy) ↓", 1, 2, False),
    Column("depth/rel", "depth rel. error ↓", 1, 4, False),
    Column("depth/legacy/rel", "depth rel. error (legacy) ↓", 1, 4, False),
    Column("keypoint/l1", "keypoint L1 ↓", 1, 4, False),
    Column("keypoint/legacy/l1", "keypoint L1 (legacy) ↓", 1, 4, False),
    Column("edge/l1", "edge L1 ↓", 1, 4, False),
    Column("edge/legacy/l1", "edge L1 (legacy) ↓", 1, 4, False),
    Column("params", "params M", 1e-6),
    Column("nonzero", "non-zero M", 1e-6, 3),
    Column("macs", "MMACs", 1e-6, 1),
    Column("bytes", "MB", 1e-6),
)


def best(means: Sequence[float], stds: Sequence[float], higher: bool = True) -> int | None:
    """Which value is best by more than the spread: its mean ± std does not overlap that of the next best.

    Returns:
        Its index; None if the spreads overlap or touch, one of the two has none (one seed), or there are fewer than
        two values.

    Example:
        >>> best([1.0, 3.0, 2.0], [0.1, 0.4, 0.5]), best([1.0, 3.0, 2.0], [0.1, 0.6, 0.5])
        (1, None)
    """
    sign = 1 if higher else -1
    order = sorted((i for i, m in enumerate(means) if not math.isnan(m)), key=lambda i: -sign * means[i])
    if len(order) < 2:
        return None
    first, second = order[:2]
    apart = sign * (means[first] - means[second]) > stds[first] + stds[second]  # False if a std is NaN
    return first if apart else None


def number(value: float, digits: int = 2) -> str:
    """A number with fixed digits, "missing" for NaN, never minus zero."""
    if math.isnan(value):
        return MISSING
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def heading(level: float) -> str:
    """A sparsity level as a column's heading."""
    if math.isnan(level):
        return "unknown sparsity"
    return "dense" if level == 0 else f"{100 * level:g} %"


def _kept(grid: Grid, dense: bool) -> list[str]:
    """The sets of tasks of the rows that prune, or of those that do not."""
    cells = [row.runs[0] for row in grid.rows if row.runs]
    return list(dict.fromkeys("+".join(union(run)) for run in cells if all(map(is_dense, run)) == dense))


def _identity(grid: Grid, frame: pd.DataFrame) -> list[str]:
    """The columns that tell rows apart, besides sparsity; tasks only if pruned models differ in them."""
    tasks = ["tasks"] * (len(_kept(grid, False) or _kept(grid, True)) > 1)
    return ["method", *tasks, *["backbone"] * (frame["backbone"].nunique() > 1), *variants(grid)]


def _label(value: object) -> Text:
    empty = value is None or (isinstance(value, float) and math.isnan(value))
    return Text("" if empty else f"{value:g}" if isinstance(value, float) else str(value))


def _applies(column: Column, tasks: str) -> bool:
    group, _, name = column.name.partition("/")
    return not name or (name if group == "delta_m" else group) in tasks.split("+")


def _has(frame: pd.DataFrame, column: Column) -> bool:
    """Whether the records tell a metric: of those of one family nothing is said about the other's."""
    legacy = any("/legacy/" in str(c) for c in frame.columns)
    return "/" not in column.name or column.name in frame.columns or not (legacy or "/legacy/" in column.name)


def _shown(frame: pd.DataFrame, rows: Sequence[int], column: Column) -> dict[int, Text]:
    """One column of the rows (positions in the frame), the best one bold among rows of the same tasks and backbone."""
    spread = f"{column.name}_std"
    nothing = pd.Series(math.nan, index=frame.index)
    means = (frame.get(column.name, nothing) * column.scale).to_numpy(float)
    stds = (frame.get(spread, nothing) * column.scale).to_numpy(float)
    bold: set[int] = set()
    kinds = list(zip(frame["tasks"], frame["backbone"], strict=True))
    for kind in {kinds[i] for i in rows}:
        where = [i for i in rows if kinds[i] == kind]
        if column.higher is not None:
            found = best(means[where].tolist(), stds[where].tolist(), column.higher)
            bold |= set() if found is None else {where[found]}
    texts = {}
    for i in rows:
        text = number(means[i], column.digits)
        text += "" if math.isnan(stds[i]) else f" ± {number(stds[i], column.digits)}"
        texts[i] = Text(text if _applies(column, str(frame["tasks"].iloc[i])) else NONE, i in bold)
    return texts


def _seeds(grid: Grid, frame: pd.DataFrame, i: int) -> str:
    """How many of the planned seeds a row has."""
    found, planned = int(frame["seeds"].iloc[i]), len(grid.rows[i].runs)
    return str(found) if found == planned else f"{found} of {planned}"


def _columns(grid: Grid, frame: pd.DataFrame) -> tuple[list[int], list[str]]:
    """Which column of the overview each row is shown in, and the columns' headings."""
    if grid.across:
        values = frame[grid.across].tolist()
        columns = sorted(set(values))
        return [columns.index(x) for x in values], [f"{x:g} {grid.across}" for x in columns]
    of, known = levels(grid, frame), steps(grid, frame)
    return [len(known) - 1 if math.isnan(x) else known.index(x) for x in of], [heading(x) for x in known]


def _keys(grid: Grid, frame: pd.DataFrame) -> tuple[list[str], list[tuple[object, ...]]]:
    """What tells the overview's lines apart: headings, and each row's values."""
    identity = [k for k in _identity(grid, frame) if k != grid.across]
    told = frame[identity].astype(object).where(frame[identity].notna(), None)
    if grid.across:
        identity.insert(1, "sparsity")
        told.insert(1, "sparsity", [heading(x) for x in levels(grid, frame)])
    return identity, [tuple(line) for line in told.to_numpy().tolist()]


def _reached(row: Row, achieved: float) -> str:
    """The sparsity that a row came to, where its rule has no target and the column's heading only says about what."""
    cells = [c for run in row.runs for c in run]
    free = row.level is not None and all(c.target is None and not is_dense(c) for c in cells)
    return f" (at {number(100 * achieved, 1)} %)" if free and not math.isnan(achieved) else ""


def overview(grid: Grid, frame: pd.DataFrame) -> Table:
    """Delta_m ± std: a row per method and variant, a column per sparsity level, or per value of ``grid.across``.

    A rule whose sparsity is what comes out says what came out.
    """
    at, columns = _columns(grid, frame)
    identity, keys = _keys(grid, frame)
    shown: dict[int, Text] = {}
    alike: dict[tuple[int, str], list[int]] = {}  # among which the best is marked
    for i, of in enumerate(levels(grid, frame)):
        alike.setdefault((at[i], heading(of)), []).append(i)
    for together in alike.values():
        shown |= _shown(frame, together, DELTA)
    lines: dict[tuple[object, ...], list[Text]] = {}
    for i, key in enumerate(keys):
        text, found = shown[i], int(frame["seeds"].iloc[i])
        text = Text(text.text + _reached(grid.rows[i], float(frame["sparsity"].iloc[i])), text.bold)
        if 0 < found < len(grid.rows[i].runs):
            text = Text(f"{text.text} ({_seeds(grid, frame, i)} seeds)", text.bold)
        turn = 0  # rows that nothing but their achieved sparsity tells apart get lines of their own
        while (line := lines.setdefault((*key, turn), [Text(NONE)] * len(columns)))[at[i]].text != NONE:
            turn += 1
        line[at[i]] = text
    body = [[*map(_label, key[:-1]), *line] for key, line in lines.items()]
    title = f"{grid.title}: Δm % against the dense model, mean ± standard deviation over seeds"
    return Table(title, [*identity, *columns], body, len(identity))


@dataclass(frozen=True)
class Lines:
    """The rows of one sparsity level, before they are a table.

    Attributes:
        rows: Their positions in the tidy frame.
        identity: The frame's columns that tell them apart.
        seeds: How many of the planned seeds each has.
        columns: What is shown.
        texts: For each column, position to text; the best is bold.
    """

    rows: list[int]
    identity: list[str]
    seeds: list[str]
    columns: list[Column]
    texts: list[dict[int, Text]]


def lines(grid: Grid, frame: pd.DataFrame, level: float) -> Lines:
    """The rows of one sparsity level (NaN for those whose level is unknown), as texts.

    Raises:
        ValueError: If no row is of this level.
    """
    of = levels(grid, frame)
    rows = [i for i, x in enumerate(of) if abs(x - level) < 0.0025 or (math.isnan(x) and math.isnan(level))]
    if not rows:
        raise ValueError(f"grid {grid.name!r} has no row of sparsity {level:g}; it has {sorted(set(of))}")
    kept = [c for c in DETAILS if any(_applies(c, str(frame["tasks"].iloc[i])) for i in rows) and _has(frame, c)]
    if not grid.longer:
        kept = [c for c in kept if c.name != "delta_m_vs_longer"]
    if grid.by_latency:
        kept.append(Column("latency_ms", "ms"))
    if grid.by_task:
        own = [Column(c, f"Δm {c.removeprefix('delta_m/')} %") for c in frame.columns if str(c).startswith("delta_m/")]
        kept += [c for c in own if any(_applies(c, str(frame["tasks"].iloc[i])) for i in rows)]
    seeds = [_seeds(grid, frame, i) for i in rows]
    return Lines(rows, _identity(grid, frame), seeds, kept, [_shown(frame, rows, c) for c in kept])


def details(grid: Grid, frame: pd.DataFrame, level: float) -> Table:
    """Metrics and sizes of the rows of one sparsity level (NaN for those whose level is unknown).

    Raises:
        ValueError: If no row is of this level.
    """
    found = lines(grid, frame, level)
    body = [
        [*map(_label, frame[found.identity].iloc[i]), Text(seeds), *(column[i] for column in found.texts)]
        for i, seeds in zip(found.rows, found.seeds, strict=True)
    ]
    title = f"{grid.title}: {heading(level)}" + ("" if level == 0 or math.isnan(level) else " sparsity")
    return Table(title, [*found.identity, "seeds", *(c.heading for c in found.columns)], body, len(found.identity))


def steps(grid: Grid, frame: pd.DataFrame) -> list[float]:
    """The sparsity levels that have rows, rising; NaN, if any row's is unknown, last."""
    of = levels(grid, frame)
    return sorted({x for x in of if not math.isnan(x)}) + [math.nan] * bool(np.isnan(of).any())


def caption(grid: Grid, records: Records) -> str:
    """Selection rule, seeds, missing runs, commits (``+`` where files differed from it) and the grid's note."""
    runs = [run for row in grid.rows for run in row.runs]
    missing = sum(any(c.id not in records for c in run) for run in runs)
    counts = {len(row.runs) for row in grid.rows} or {0}
    most, upto = max(counts), "up to " * (len(counts) > 1)
    split = "Test" if grid.split == "test" else "Validation"
    parts = [f"{split} set, {RULES[grid.selection]}; {upto}{most} seed{'s' * (most != 1)} per row."]
    kept, all_tasks = _kept(grid, False), [t for t in _kept(grid, True) if t not in _kept(grid, False)]
    if len(kept) == 1:
        but = f" (dense also {' and '.join(all_tasks)})" if all_tasks else ""
        parts.append(f"Tasks {kept[0]}{but}.")
    if missing:
        parts.append(f"{missing} of {len(runs)} runs {MISSING}.")
    commits = sorted({f"{r.commit[:10]}{'+' if r.dirty else ''}" for r in records.values()})
    if commits:
        parts.append(f"Commit{'s' * (len(commits) > 1)} {', '.join(commits)}.")
    if most > 1 and not (grid.by_file or grid.by_step):  # whose pages mark nothing
        parts.append("Bold: best by more than its and the next best's standard deviation.")
    return " ".join([*parts, grid.note]).strip()


def tables(grid: Grid, frame: pd.DataFrame) -> list[Table]:
    """The overview, then one table per sparsity level."""
    return [overview(grid, frame), *(details(grid, frame, x) for x in steps(grid, frame))]


def summary(grid: Grid, folder: str | Path) -> str:
    """A grid's overview and its caption as Markdown, from a folder of records: what a page quotes of a table."""
    found = collect(grid, folder)
    table = overview(grid, tidy(grid, found))
    return f"{markdown(table)}\n{table.title}. {caption(grid, found)}\n"


def page(grid: Grid, frame: pd.DataFrame, records: Records) -> str:
    """All tables of a grid as a Markdown page."""
    first, *rest = tables(grid, frame)
    parts = [f"# {grid.title}", f"{first.title.removeprefix(grid.title + ': ')}.", markdown(first)]
    parts.append(caption(grid, records) + "\n")
    for table in rest:
        parts += [f"## {table.title.removeprefix(grid.title + ': ')}", markdown(table)]
    return "\n\n".join(p.rstrip("\n") for p in parts) + "\n"


def write_formats(
    grid: Grid, out: str | Path, content: str, frame: pd.DataFrame, shown: Sequence[Table], said: str
) -> list[Path]:
    """Write a grid's page, its frame as CSV and its tables as LaTeX with a caption, each whole or not at all."""
    tex = "\n".join(latex(t, said) for t in shown)
    contents = {"md": content, "csv": frame.round(6).to_csv(index=False), "tex": tex}
    paths = [Path(out) / f"{grid.name}.{kind}" for kind in contents]
    for path, text in zip(paths, contents.values(), strict=True):
        write_atomically(path, text)
    return paths


def write(grid: Grid, records: str | Path, out: str | Path = Path("docs/tables"), more: str = "") -> list[Path]:
    """Write ``<grid>.md``, ``.csv`` (the tidy frame) and ``.tex``, each whole or not at all.

    Args:
        grid: The table.
        records: Folder of records.
        out: Folder of tables.
        more: What the Markdown page ends with.

    Returns:
        The files.

    Raises:
        ValueError: If a record is damaged or has no epoch that the grid's selection rule could choose.
        OSError: If a file cannot be written.
    """
    found = collect(grid, records)
    frame = tidy(grid, found)
    content = page(grid, frame, found) + (f"\n{more}" if more else "")
    return write_formats(grid, out, content, frame, tables(grid, frame), caption(grid, found).replace("**", ""))
