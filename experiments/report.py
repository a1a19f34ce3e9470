"""Report: one self-contained HTML page about one comparison, from records and pictures only."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from cut.drawing import PALETTE
from cut.files import write_atomically
from cut.records import Record
from experiments.summary import CHANNELS, rows

TEMPLATE = Path(__file__).with_name("report.html.j2")
COLOURS = {
    "backbone": "#5b6ee1",
    "seg": "#e07b39",
    "normal": "#3a9d6e",
    "depth": "#b94a8f",
    "edge": "#8a8f3c",
    "scene": "#777",
}
NAMES = {
    "seg": "segmentation",
    "normal": "surface normals",
    "depth": "depth",
    "edge": "edges",
    "keypoint": "keypoints",
    "scene": "room type",
}


def data_uri(picture: np.ndarray) -> str:
    """A picture inside a URI: exact (PNG) if it has few colours, as class maps do, else JPEG for its size."""
    image, buffer = Image.fromarray(picture), io.BytesIO()
    kind = "png" if image.getcolors(256) else "jpeg"
    image.save(buffer, kind, optimize=True, quality=92, subsampling=0)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def bars(record: Record) -> list[dict[str, Any]]:
    """The layers of a record in network order: name, component, colour, sparsity."""
    return [
        {
            "name": name.removesuffix(".weight"),
            "part": record.layer_component.get(name, "backbone"),
            "colour": COLOURS.get(record.layer_component.get(name, "backbone"), "#777"),
            "sparsity": value,
        }
        for name, value in record.layer_sparsity.items()
    ]


def heat(value: float) -> str:
    """A colour from pale to deep blue for a value in [0, 1]."""
    low, high = np.array([232, 240, 250]), np.array([28, 74, 140])
    r, g, b = (low + (high - low) * np.clip(value, 0, 1)).round().astype(int)
    return f"rgb({r},{g},{b})"


def overlaps(record: Record) -> dict[str, Any]:
    """The overlap of the tasks' own masks as a table: pairs by layers, with a colour for each cell."""
    layers = list(record.mask_overlap)
    pairs = list(dict.fromkeys(k for found in record.mask_overlap.values() for k in found))
    cells = {
        p: [
            {
                "layer": n.removesuffix(".weight"),
                "value": record.mask_overlap[n].get(p),
                "colour": heat(record.mask_overlap[n].get(p, 0)),
            }
            for n in layers
        ]
        for p in pairs
    }
    means = {p: float(np.mean([c["value"] for c in row if c["value"] is not None])) for p, row in cells.items()}
    return {"layers": layers, "cells": cells, "means": means}


def _gallery(gallery: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The gallery with its pictures as URIs."""
    return [
        {
            "id": room["id"],
            "picture": data_uri(room["picture"]),
            "tasks": {t: {who: data_uri(p) for who, p in panels.items()} for t, panels in room["tasks"].items()},
        }
        for room in gallery
    ]


def write_report(
    dense: Record,
    pruned: Sequence[Record],
    gallery: Sequence[Mapping[str, Any]],
    path: Path,
    *,
    classes: Sequence[str] = (),
    files: Mapping[str, str] | None = None,
    note: str = "",
) -> Path:
    """Write the page.

    Args:
        dense: Record of the dense model.
        pruned: Records of the models cut from it; the first with a mask overlap gives that figure.
        gallery: Rooms with ``id``, ``picture`` and, per task, uint8 pictures by column (label, dense,
            methods).
        path: Where to.
        classes: Class names for the segmentation's legend.
        files: Names of files beside the page and what they are.
        note: A sentence on the data.

    Returns:
        The path.
    """
    found = rows(dense, pruned)
    shared = next((r for r in pruned if r.mask_overlap), None)
    metrics = list(dict.fromkeys(k for r in found for k in r["metrics"]))
    better = dict(dense.higher_is_better)
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        rows=found,
        channels=CHANNELS,
        metrics=[m for m in metrics if m.split("/")[0] in (pruned[0].tasks if pruned else dense.tasks)],
        better=better,
        dense=dense,
        pruned=pruned,
        bars={r.method: bars(r) for r in pruned},
        parts={p: c for p, c in COLOURS.items() if any(b["part"] == p for r in pruned for b in bars(r))},
        overlap=overlaps(shared) if shared else None,
        gallery=_gallery(gallery),
        classes=[(n.replace("_", " "), "rgb({},{},{})".format(*PALETTE[i])) for i, n in enumerate(classes)],
        names=NAMES,
        files=dict(files or {}),
        note=note,
    )
    write_atomically(path, page)
    return path
