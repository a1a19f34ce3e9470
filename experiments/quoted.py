"""Quoted: published result tables, as printed, to stand beside ours.

``experiments/quoted/<dataset>.csv`` holds DiSparse's three tables (Sun et al., CVPR 2022, arXiv 2206.04662), read from
the pictures in its repository: one run each, no spread, checkpoints chosen on test. The columns have our names; the
numbers are theirs, shares in percent. Here they become fractions like ours, and get a Delta_m computed like ours.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pandas as pd

from cut import tasks
from cut.delta import delta_m
from experiments import typeset

FOLDER = Path(__file__).parent / "quoted"
DATASETS = {"nyuv2": "NYU-v2", "cityscapes": "Cityscapes", "taskonomy": "Tiny-Taskonomy"}
LABELS = ("dataset", "start", "method", "sparsity")
# Printed by them, no metric of ours: the cross-entropy on Cityscapes. It has no part in Delta_m.
LEFT_OUT = ("seg/legacy/error",)
MARK = "quoted"
DOUBT = "†"
NAMES = {
    "miou": "mIoU %",
    "pixel_acc": "pixel acc. %",
    "error": "cross-entropy",
    "mean": "mean °",
    "median": "median °",
    "within_11": "11.25° %",
    "within_22": "22.5° %",
    "within_30": "30° %",
    "abs": "abs.",
    "rel": "rel.",
    "delta1": "δ 1.25 %",
    "delta2": "δ 1.25² %",
    "delta3": "δ 1.25³ %",
    "l1": "L1",
}


@cache
def higher_is_better() -> dict[str, bool]:
    """``"seg/legacy/miou"`` to whether more is better, of every legacy metric of the published sets' tasks."""
    kinds = (
        tasks.segmentation(["any"]),
        tasks.normals(),
        tasks.depth(),
        tasks.regression_map("keypoint"),
        tasks.regression_map("edge"),
    )
    return {
        f"{task.name}/legacy/{name}": bool(metric.higher_is_better)
        for task in kinds
        for name, metric in task.metrics("legacy").items(keep_base=True)
    }


def printed(dataset: str) -> pd.DataFrame:
    """The published table as it is printed, every cell a text; columns as in :func:`quoted`, without ``delta_m``.

    Raises:
        ValueError: For a data set without a quoted table.
    """
    if dataset not in DATASETS:
        raise ValueError(f"no quoted table of {dataset!r}; allowed: {', '.join(DATASETS)}")
    return pd.read_csv(FOLDER / f"{dataset}.csv", dtype=str, keep_default_na=False)


def metric_columns(frame: pd.DataFrame) -> list[str]:
    """The metrics of a quoted table, in its order."""
    return [str(c) for c in frame.columns if "/legacy/" in str(c)]


def quoted(dataset: str) -> pd.DataFrame:
    """DiSparse's published table of one data set, in our names, units and Delta_m.

    Args:
        dataset: ``"nyuv2"``, ``"cityscapes"`` or ``"taskonomy"``.

    Returns:
        One row per published row: ``dataset``, ``start`` (``init`` = untrained weights, ``dynamic`` = in training,
        ``trained``, ``-`` for the dense model), ``method``, ``sparsity`` (0 for the dense model, nominal 0.9 for the
        others), ``tasks`` (joined by ``+``), ``delta_m`` in percent against the dense row, ``<task>/legacy/<metric>``
        in our units (fractions, degrees, depth as the set has it), ``suspect`` (metrics whose printed value cannot be
        right, separated by spaces) and ``source``. A Delta_m with a suspect value in it is to be read as such.

    Raises:
        ValueError: For a data set without a quoted table.
    """
    found = printed(dataset)
    names = metric_columns(found)
    better = higher_is_better()
    for name in names:
        # Shares, and only they, are better when higher, and are printed in percent.
        found[name] = found[name].astype(float) / (100 if better.get(name) else 1)
    found["sparsity"] = found["sparsity"].astype(float)
    found.insert(len(LABELS), "tasks", "+".join(dict.fromkeys(n.split("/")[0] for n in names)))
    found.insert(len(LABELS) + 1, "delta_m", _delta_m(found, [n for n in names if n not in LEFT_OUT]))
    return found


def _delta_m(frame: pd.DataFrame, names: list[str]) -> list[float]:
    """Delta_m of every row against the row of sparsity 0, in percent."""
    rows = [{str(k): float(v) for k, v in row.items()} for row in frame[names].to_dict("records")]
    dense = rows[frame["sparsity"].tolist().index(0.0)]
    return [delta_m(row, dense, higher_is_better()) for row in rows]


def _heading(name: str) -> str:
    task, _, metric = name.split("/")
    arrow = "↑" if higher_is_better().get(name) else "↓"
    return f"{task} {NAMES[metric]} {arrow}"


def table(dataset: str) -> typeset.Table:
    """One quoted table as published, with our Delta_m; every row says that it is quoted, a dagger marks doubtful cells.

    Raises:
        ValueError: For a data set without a quoted table.
    """
    texts, frame = printed(dataset), quoted(dataset)
    names = metric_columns(texts)
    body = []
    for row, delta, sparsity in zip(texts.to_dict("records"), frame["delta_m"], frame["sparsity"], strict=True):
        suspect = str(row["suspect"]).split()
        cells = [f"{row[n]}{DOUBT if n in suspect else ''}" for n in names]
        change = "0" if sparsity == 0 else f"{delta:+.2f}{DOUBT if suspect else ''}"
        level = "dense" if sparsity == 0 else f"{100 * sparsity:g} %"
        body.append([typeset.Text(t) for t in (str(row["method"]), MARK, str(row["start"]), level, change, *cells)])
    head = ["method", "from", "start", "sparsity", "Δm %", *map(_heading, names)]
    return typeset.Table(f"DiSparse's published results on {DATASETS[dataset]}", head, body, labels=4)


def caption(dataset: str) -> str:
    """What a reader of a quoted table has to know."""
    frame = printed(dataset)
    source = str(frame["source"].iloc[0])
    parts = [
        f"Quoted from DiSparse (arXiv 2206.04662; {source}), not run by us: one run, no spread, checkpoint chosen on "
        "test, legacy metrics, nominal sparsity.",
        "Δm computed by us like our own.",
    ]
    if set(LEFT_OUT) & set(frame.columns):
        parts.append(
            "It leaves the cross-entropy out; absolute depth errors have two digits, which alone moves it by about 0.3."
        )
    if frame["suspect"].any():
        parts.append(
            f"{DOUBT} Both Random rows print one segmentation pair whose accuracy does not fit its mIoU: probably a "
            "copy error, not to be used, nor the Δm that contains it."
        )
    return " ".join(parts)


def markdown(dataset: str) -> str:
    """One quoted table as Markdown, with its caption.

    Raises:
        ValueError: For a data set without a quoted table.
    """
    return f"{typeset.markdown(table(dataset))}\n{caption(dataset)}\n"
