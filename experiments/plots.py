"""Plots: frames and records as matplotlib figures; :mod:`experiments.figures` gathers what they show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import LogLocator

from cut.records import Record

# Okabe and Ito's colours without yellow, which a white page swallows.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^PXv"
SMALL = (4.2, 3.4)  # inches of a panel among several rows
LINES = ("-", "--", ":", "-.")
STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "white",
    "font.size": 10.0,
    "grid.alpha": 0.3,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.0,
    "savefig.dpi": 150.0,
    "svg.hashsalt": "cut",  # the same records give the same file
}

# What Delta_m is drawn against: the axis' label, and the factor on the frame's number.
AXES: dict[str, tuple[str, float]] = {
    "sparsity": ("sparsity in %", 100.0),
    "nonzero": ("non-zero parameters in millions", 1e-6),
    "latency_ratio": ("latency, share of the dense model's", 1.0),
    "file_bytes": ("file in MB", 1e-6),
}


def _style(i: int) -> dict[str, Any]:
    """Colour, marker and line of the i-th series; past the palette, another line and marker."""
    turn = i // len(PALETTE)
    return {
        "color": PALETTE[i % len(PALETTE)],
        "marker": MARKERS[(i + turn) % len(MARKERS)],
        "linestyle": LINES[turn % len(LINES)],
    }


def shown(value: object) -> str:
    """A variant's value as in tables: 5 for 5.0."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def labels(frame: pd.DataFrame) -> list[str]:
    """A name per row of a tidy frame: the method and its variant; the columns between backbone and seeds."""
    columns = list(frame.columns)
    own = columns[columns.index("backbone") + 1 : columns.index("seeds")]
    found = []
    for _, row in frame.iterrows():
        told = [f"{k} {shown(row[k])}" for k in own if not pd.isna(row[k])]
        found.append(f"{row['method']} ({', '.join(told)})" if told else str(row["method"]))
    return found


def floor(values: Sequence[float]) -> float:
    """Where to end the axis: the lowest value not farther below the median than four times what the best is above it.

    Example:
        >>> floor([0.0, -1.0, -2.0, -3.0, -60.0])
        -3.0
    """
    middle = float(np.median(values))
    return float(min(v for v in values if v >= middle - 4 * max(max(values) - middle, 1.0)))


def _curve(axes: Axes, points: np.ndarray, bottom: float, style: dict[str, Any]) -> None:
    """Rows of x, mean and spread; what lies below the bottom is drawn on it, as a triangle with its value."""
    x, y, std = points
    below = y < bottom
    axes.errorbar(x, np.maximum(y, bottom), np.where(below, np.nan, std), capsize=2, elinewidth=1, **style)
    for at, value in zip(x[below], y[below], strict=True):
        axes.plot(at, bottom, "v", markersize=9, markerfacecolor="white", color=style["color"], zorder=3)
        taken = sum(text.xy == (at, bottom) for text in axes.texts if isinstance(text, Annotation))  # by other curves
        options: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "color": style["color"]}
        options["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0}  # the curve runs behind its value
        axes.annotate(f"{value:.0f}", (at, bottom), (6, 9 * taken - 3), **options)


def _legend(figure: Figure, axes: Sequence[Axes], free: Axes | None = None) -> None:
    """One legend for all panels, beside them or in a place that no panel needs."""
    found = {label: handle for a in axes for handle, label in zip(*a.get_legend_handles_labels(), strict=True)}
    if found and free is not None:
        free.legend(found.values(), found.keys(), loc="upper left", frameon=False)
    elif found:
        figure.legend(found.values(), found.keys(), loc="outside right upper", frameon=False)


def _panels(count: int, width: float = 6.0) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * count + 2, 4.2), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _grid(rows: Sequence[int]) -> tuple[Figure, list[Axes], Axes | None]:
    """Panels in rows of these lengths, in order, and the first place without one; a single row is as :func:`_panels`.

    More rows have smaller panels: the figure is to be read on a page, where it is as wide as the text.
    """
    if len(rows) == 1:
        figure, panels = _panels(rows[0])
        return figure, panels, None
    columns = max(rows)
    full = len(rows) * columns == sum(rows)
    figure = Figure(figsize=(SMALL[0] * columns + 2 * full, SMALL[1] * len(rows)), layout="constrained")
    places = figure.subplots(len(rows), columns, squeeze=False)
    panels = [places[i][j] for i, count in enumerate(rows) for j in range(count)]
    free = [places[i][j] for i, count in enumerate(rows) for j in range(count, columns)]
    for axes in free:
        axes.set_axis_off()
    return figure, panels, free[0] if free else None


def _scale(axes: Axes, x: str, rows: pd.DataFrame) -> None:
    """The horizontal axis, the smallest model on the right."""
    label, _ = AXES[x]
    if x == "latency_ratio":
        axes.xaxis.set_major_formatter("{x:g}")
    else:
        axes.set_xscale("log")
        axes.minorticks_off()
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    if x == "sparsity":
        ticks = sorted(set((rows["sparsity"] * 200).round() / 200) - {1.0})
        axes.set_xticks([100 * (1 - t) for t in ticks], [f"{100 * t:g}" for t in ticks])
        axes.minorticks_off()
    axes.invert_xaxis()
    axes.set_xlabel(label)


@mpl.rc_context(STYLE)
def against(frame: pd.DataFrame, x: str, *, clip: bool = True) -> Figure:
    """Delta_m against sparsity or size: a line per method, a panel per kept tasks, a row of them per backbone.

    Args:
        frame: Tidy, with at least one row that has a Delta_m.
        x: One of :data:`AXES`; sizes and what a sparsity leaves are in logarithms.
        clip: End the axis at :func:`floor`, with the values of points below it in words.
    """
    frame = frame.assign(label=labels(frame))
    # Dense ones last: figures of pruned models alone have the same colours then.
    order = dict.fromkeys(pd.concat([frame.loc[frame["sparsity"] != 0, "label"], frame["label"]]))
    styles = {name: _style(i) for i, name in enumerate(order)}
    frame = frame[frame["delta_m"].notna() & frame[x].notna()]
    kept = frame.loc[frame["sparsity"] > 0, "tasks"].unique()  # a dense model of other tasks is no panel of its own
    frame = frame[frame["tasks"].isin(kept)] if len(kept) else frame
    backbones = [
        list(part.groupby(["tasks", "backbone"], sort=False)) for _, part in frame.groupby("backbone", sort=False)
    ]
    groups = [one for part in backbones for one in part]
    figure, panels, free = _grid([len(part) for part in backbones])
    for axes, (kind, rows) in zip(panels, groups, strict=True):
        bottom = floor(rows["delta_m"].tolist()) if clip else -np.inf
        axes.axhline(0, color="0.6", linewidth=1)
        for name, series in rows.groupby("label", sort=False):
            ordered = series.sort_values(x)
            at = 100 * (1 - ordered[x]) if x == "sparsity" else ordered[x] * AXES[x][1]
            points = np.array([at, ordered["delta_m"], ordered["delta_m_std"]], float)
            _curve(axes, points, bottom, {**styles[str(name)], "label": str(name)})
        _scale(axes, x, rows)
        axes.set_ylabel("Δm in %")
        tasks, backbone = kind  # type: ignore[misc]
        between = "; " if len(backbones) == 1 else "\n"  # small panels have no room for both on one line
        axes.set_title(f"{str(tasks).replace('+', ', ')}{between}{backbone}", fontsize=10)
    _legend(figure, panels, free)
    return figure


def layer_names(record: Record) -> list[str]:
    """The layers of the backbone and the kept heads, in network order."""
    parts = ["backbone", *record.tasks]
    return [n for n in record.layer_sparsity if record.layer_component.get(n) in parts]


def layer_means(records: Sequence[Record], names: Sequence[str]) -> np.ndarray:
    """Sparsity of each layer, over seeds; NaN for a layer that a record does not have."""
    return np.mean([[r.layer_sparsity.get(n, np.nan) for n in names] for r in records], axis=0)


@mpl.rc_context(STYLE)
def layers(records: Mapping[str, Sequence[Record]], order: Sequence[str] = ()) -> Figure:
    """Sparsity of each layer in network order, a line per method; the backbone and the heads are shaded apart.

    Args:
        records: Method to its runs of one network, at least one.
        order: All methods, for colours that agree with other figures; default those shown.
    """
    first = next(iter(records.values()))[0]
    parts = ["backbone", *first.tasks]
    names = layer_names(first)
    figure, (axes,) = _panels(1, 9)
    for method, runs in records.items():
        style = {**_style(list(order or records).index(method)), "linewidth": 1.2, "markersize": 3}
        axes.plot(100 * layer_means(runs, names), label=method, **style)
    for i, part in enumerate(parts):
        at = [k for k, n in enumerate(names) if first.layer_component[n] == part]
        if at:
            axes.axvspan(min(at) - 0.5, max(at) + 0.5, color="0.93" if i % 2 == 0 else "1.0", zorder=0)
            axes.text(sum((min(at), max(at))) / 2, 103, part, ha="center", fontsize=9)
    axes.set(xlabel="layer, in network order", ylabel="sparsity in %", ylim=(0, 102), xlim=(-0.5, len(names) - 0.5))
    _legend(figure, [axes])
    return figure


def overlaps(records: Sequence[Record]) -> dict[str, np.ndarray]:
    """Pairs of tasks (and ``all``) to the overlap of their masks [runs, layers]; NaN where a run has no value.

    Args:
        records: Runs of one method; those without the tasks' masks compared are left out. The first with them names
            the layers.
    """
    found = [r.mask_overlap for r in records if r.mask_overlap]
    names = list(found[0]) if found else []
    pairs = dict.fromkeys(p for n in names for p in found[0][n])
    return {p: np.array([[o.get(n, {}).get(p, np.nan) for n in names] for o in found]) for p in pairs}


@mpl.rc_context(STYLE)
def watershed(records: Sequence[Record]) -> Figure:
    """How much the tasks' own masks share, by depth of the layer: a line per pair of tasks and one for all.

    Args:
        records: Runs of one method, at least one with the tasks' masks compared.
    """
    figure, (axes,) = _panels(1, 9)
    for i, (pair, values) in enumerate(overlaps(records).items()):
        style = {"color": "black", "linewidth": 2.4} if pair == "all" else {**_style(i), "markersize": 3}
        mean = values.mean(0)
        axes.plot(mean, label="all tasks" if pair == "all" else pair, **style)
        if len(values) > 1:
            std = values.std(0, ddof=1)
            axes.fill_between(range(len(mean)), mean - std, mean + std, color=style["color"], alpha=0.15, linewidth=0)
    axes.set(xlabel="layer shared by the tasks, in network order", ylabel="overlap of the tasks' masks (IoU)")
    axes.set_ylim(top=1.02)
    _legend(figure, [axes])
    return figure


@mpl.rc_context(STYLE)
def overlap_map(record: Record) -> Figure:
    """The overlap of the tasks' own masks as a heat map: pairs of tasks by layers in network order.

    Args:
        record: A run with the tasks' masks compared.
    """
    names = list(record.mask_overlap)
    pairs = list(dict.fromkeys(p for n in names for p in record.mask_overlap[n]))
    values = np.array([[record.mask_overlap[n].get(p, np.nan) for n in names] for p in pairs])
    figure = Figure(figsize=(9, 1.6 + 0.3 * len(pairs)), layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(values, aspect="auto", cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
    axes.set_yticks(range(len(pairs)), ["all tasks" if p == "all" else p for p in pairs])
    axes.grid(False)
    axes.set_xlabel("layer shared by the tasks, in network order")
    figure.colorbar(drawn, label="IoU")
    return figure


def _of_methods(points: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Label to style: a colour and marker per method, where points tell it, and a line per label of a method."""
    if "method" not in points:
        return {name: _style(i) for i, name in enumerate(dict.fromkeys(points["label"]))}
    colours = {name: _style(i) for i, name in enumerate(dict.fromkeys(points["method"]))}
    return {
        label: {**colours[method], "linestyle": LINES[turn % len(LINES)]}
        for method, rows in points.groupby("method", sort=False)
        for turn, label in enumerate(dict.fromkeys(rows["label"]))
    }


@mpl.rc_context(STYLE)
def recovery(points: pd.DataFrame) -> Figure:
    """Delta_m over the steps of fine-tuning.

    Args:
        points: ``panel`` (its title), ``label`` (of a line), ``steps``, ``delta_m``, ``delta_m_std``; ``method``, where
            lines of one method are to look alike.
    """
    styles = _of_methods(points)
    groups = list(points.groupby("panel", sort=False))
    figure, panels = _panels(len(groups), 5)
    bottom = floor(points["delta_m"].tolist())
    for axes, (title, rows) in zip(panels, groups, strict=True):
        axes.axhline(0, color="0.6", linewidth=1)
        for name, series in rows.groupby("label", sort=False):
            ordered = series.sort_values("steps")[["steps", "delta_m", "delta_m_std"]].to_numpy(float).T
            _curve(axes, ordered, bottom, {**styles[str(name)], "label": str(name)})
        axes.set(xlabel="fine-tuning steps", ylabel="Δm in %")
        axes.set_title(str(title), fontsize=10)
    _legend(figure, panels)
    return figure
