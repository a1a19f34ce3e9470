"""Pictures: what models see in some test pictures, for the page's gallery."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cut import checkpoint
from cut.data.base import MultiTaskData
from cut.files import write_atomically
from experiments.examples import examples

DENSE = "dense"  # the column that the pictures of a folder are


def data_uri(picture: np.ndarray) -> str:
    """A picture inside a URI: exact (PNG) if it has few colours, as class maps do, else JPEG for its size."""
    image, buffer = Image.fromarray(picture), io.BytesIO()
    kind = "png" if image.getcolors(256) else "jpeg"
    image.save(buffer, kind, optimize=True, quality=92, subsampling=0)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def gallery(rooms: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Rooms of :func:`experiments.examples.examples` with their pictures as URIs; None if there are none.

    Returns:
        ``columns`` (label and models, in their order), ``tasks``, and ``rooms`` with ``id``, ``picture`` and ``tasks``:
        task to column to ``{"uri": ...}``, or ``{"word": ...}`` for a class's name.
    """
    if not rooms:
        return None
    shown = []
    for room in rooms:
        tasks = {
            task: {who: {"word": p} if isinstance(p, str) else {"uri": data_uri(p)} for who, p in panels.items()}
            for task, panels in room["tasks"].items()
        }
        shown.append({"id": room["id"], "picture": data_uri(room["picture"]), "tasks": tasks})
    columns = list(dict.fromkeys(who for room in rooms for panels in room["tasks"].values() for who in panels))
    return {"columns": columns, "tasks": list(rooms[0]["tasks"]), "rooms": shown}


def _path(folder: Path, room: str, task: str) -> Path:
    return folder / f"{room}-{task}.png"


def keep(rooms: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write the dense model's predictions as PNG files, so that its weights need not be there to show them."""
    for room in rooms:
        for task, panels in room["tasks"].items():
            if isinstance(panels.get(DENSE), np.ndarray):
                buffer = io.BytesIO()
                Image.fromarray(panels[DENSE]).save(buffer, "png", optimize=True)
                write_atomically(_path(folder, room["id"], task), buffer.getvalue())


def kept(rooms: Sequence[Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Rooms with the dense model's predictions out of a folder, behind the labels, where the files are."""
    found = []
    for room in rooms:
        tasks = {}
        for task, panels in room["tasks"].items():
            path, (label, *models) = _path(folder, room["id"], task), panels.items()
            if path.is_file():
                with Image.open(path) as image:
                    models.insert(0, (DENSE, np.asarray(image.convert("RGB"))))
            tasks[task] = dict([label, *models])
        found.append({**room, "tasks": tasks})
    return found


def committed(folder: Path, data: MultiTaskData, tasks: Sequence[str], count: int) -> list[dict[str, Any]]:
    """What the compact models of a folder see, and the dense one as far as its pictures were kept.

    Args:
        folder: With ``models/<name>`` (:func:`cut.checkpoint.save`) and ``pictures`` (:func:`keep`).
        data: Where the pictures come from.
        tasks: Which tasks are shown.
        count: How many pictures.

    Returns:
        As :func:`experiments.examples.examples`; empty without models.

    Raises:
        ValueError: If a model is damaged.
    """
    found = {p.name: checkpoint.load(p).eval() for p in sorted((folder / "models").glob("*")) if p.is_dir()}
    return kept(examples(data, found, tasks, count), folder / "pictures") if found else []
