"""Views: what happens during a run and inside a network, as plain JSON: recovery, layers, overlap of masks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cut.records import Record
from experiments import plots
from experiments.figures import swept_recovery, tracked_recovery
from experiments.grid import Grid
from experiments.render import steps
from experiments.results import Records, tidy

Json = dict[str, Any]
DIGITS = 4
OURS = "cut"  # what the names of our methods begin with


def _list(values: np.ndarray) -> list[Any]:
    """Numbers for JSON, None for NaN."""
    return [None if math.isnan(v) else round(float(v), DIGITS) for v in values]


def recovery(grid: Grid, records: Records, styles: Mapping[str, int]) -> list[Json]:
    """Delta_m over the steps of fine-tuning, a panel per sparsity: rows of different steps, else epochs of runs.

    Args:
        grid: The table.
        records: Id of a cell to its record.
        styles: Label of a line to the number of its colour.

    Returns:
        Panels with ``title`` and ``lines``, these with ``label``, ``mine``, ``style``, ``steps``, ``delta_m``, ``std``.
    """
    frames = [swept_recovery(grid, records)]
    if frames[0].empty:
        known = steps(grid, tidy(grid, records))
        frames = [tracked_recovery(grid, records, x) for x in known if not math.isnan(x) and x > 0]
    panels = []
    for frame in (f for f in frames if not f.empty):
        for title, part in frame.groupby("panel", sort=False):
            lines: list[Json] = []
            for label, line in part.groupby("label", sort=False):
                line = line.sort_values("steps")
                lines.append(
                    {
                        "label": str(label),
                        "mine": str(label).startswith(OURS),
                        "style": styles.get(str(label), len(styles) + len(lines)),
                        "steps": [int(s) for s in line["steps"]],
                        "delta_m": _list(line["delta_m"].to_numpy(float)),
                        "std": _list(line["delta_m_std"].to_numpy(float)),
                    }
                )
            if any(len(one["steps"]) > 1 for one in lines):
                values = [v for one in lines for v in one["delta_m"] if v is not None]
                panels.append({"title": str(title), "lines": lines, "bottom": plots.floor(values)})
    return panels


def by_layer(runs: Sequence[Sequence[Record]]) -> Json:
    """Sparsity of every layer and overlap of the tasks' own masks, means over the runs of each row.

    Args:
        runs: For each row of a table its records, none where it has no single model.

    Returns:
        ``networks``: the names and components of the layers of each kind of network; ``layers``: for each row that
        tells, ``row`` (its index), ``network`` (an index), ``values`` (zeros / weights) and ``parts`` (component to
        the same); ``overlaps``: ``row``, ``names`` (of layers), ``values``: pair of tasks to IoU by layer.
    """
    networks: dict[tuple[tuple[str, ...], tuple[str, ...]], int] = {}
    layers, shared = [], []
    for i, records in enumerate(runs):
        found = [r for r in records if r.layer_sparsity]
        if found and any(found[0].layer_sparsity.values()):
            names = plots.layer_names(found[0])
            parts = tuple(found[0].layer_component[n] for n in names)
            network = networks.setdefault((tuple(names), parts), len(networks))
            means = {p: float(np.mean([r.sparsity.get(p, np.nan) for r in found])) for p in dict.fromkeys(parts)}
            layers.append(
                {
                    "row": i,
                    "network": network,
                    "values": _list(plots.layer_means(found, names)),
                    "parts": {p: round(v, DIGITS) for p, v in means.items() if not math.isnan(v)},
                    "runs": [r.id for r in found],
                }
            )
        pairs = plots.overlaps(records)
        if pairs:
            compared = [r for r in records if r.mask_overlap]
            shared.append(
                {
                    "row": i,
                    "names": [n.removesuffix(".weight") for n in compared[0].mask_overlap],
                    "values": {p: _list(v.mean(0)) for p, v in pairs.items()},
                    "runs": [r.id for r in compared],
                }
            )
    known = [{"names": [n.removesuffix(".weight") for n in names], "parts": parts} for names, parts in networks]
    return {"networks": known, "layers": layers, "overlaps": shared}
