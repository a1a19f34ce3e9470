"""Stand-ins: a set of rooms, written in the layout of a published data set.

They let loaders, recipes and tables run unchanged where the published set is not at hand.
"""

import io
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from cut.data.rooms import EMBEDDED
from cut.data.shards import check_files, read_meta
from cut.files import write_atomically
from experiments.rooms import encode
from experiments.rooms.catalog import CLASSES
from experiments.rooms.encode import Array
from experiments.rooms.pack import Room, read_rooms

STAND_IN = "STAND-IN.md"
ATTRIBUTION = "ATTRIBUTION.md"
# The loaders carve validation out of train, so our own goes there too.
SPLITS = {"train": ("train", "val"), "test": ("test",)}
NOTE = """# Rooms in {title} layout: rendered rooms, not {title}

A stand-in. The files in this folder are laid out and encoded as those of {title}, so that what reads {title} reads
them; what they show is {train} training and {test} test pictures ({height}x{width}) of rendered rooms. No number
measured on them is a number of {title}.

- Layout: `{layout}`, written by `python -m experiments.rooms layout`.
- Source: Rooms, version {version}, seed {seed}. Its training and validation rooms are this set's training
  pictures; its test rooms, with furniture that no other room has, are the test pictures.
- Attribution: the rooms show furniture of the *Sweet Home 3D* model libraries. `{attribution}` beside this file
  names the models, their creators and their licences; pass both files on with the set.
"""


@dataclass(frozen=True)
class Layout:
    """Where a published set keeps what.

    Attributes:
        title: Name of the set.
        encode: The contents of a room's files by column.
        files: Path of each column's file below the set's folder, with ``{folder}`` and ``{number}``.
        folders: The folder of each split.
        index: Name of the index; None where there is none.
        listed: Path that the index names, for all columns; empty = the file's own.
        first: Number of the first picture.
        restart: Whether the numbers of the test pictures start anew.
    """

    title: str
    encode: Callable[[Room], dict[str, Array]]
    files: Mapping[str, str]
    folders: Mapping[str, str]
    index: str | None = None
    listed: Mapping[str, str] = field(default_factory=dict)
    first: int = 0
    restart: bool = True


def _npy(*columns: str) -> dict[str, str]:
    return {column: f"{{folder}}/{column}/{{number}}.npy" for column in columns}


# Taskonomy's index lists paths from before its folders were rearranged; readers swap them.
_VIEWS = {
    column: f"point_{{number}}_view_0_domain_{column.replace('segment_semantic', 'segmentsemantic')}.png"
    for column in ("rgb", "segment_semantic", "normal", "depth_zbuffer", "keypoints2d", "edge_texture")
}
LAYOUTS = {
    "nyuv2": Layout(
        "NYU-v2",
        encode.nyuv2,
        {
            column: f"nyu_train_val/{{folder}}/{column}/{{number:04d}}.{'npy' if column == 'depth' else 'png'}"
            for column in ("img", "seg", "normal_mask", "depth")
        },
        {"train": "training", "test": "testing"},
        "nyu_v2_3task.json",
        first=1,
        restart=False,
    ),
    "nyuv2-npy": Layout(
        "NYU-v2", encode.nyuv2_npy, _npy("image", "label", "depth", "normal"), {"train": "train", "test": "val"}
    ),
    "cityscapes": Layout(
        "Cityscapes",
        encode.cityscapes,
        _npy("image", "depth", "label_2", "label_7", "label_19"),
        {"train": "train", "test": "test"},
        "cityscape.json",
    ),
    "cityscapes-npy": Layout(
        "Cityscapes", encode.cityscapes_npy, _npy("image", "label", "depth"), {"train": "train", "test": "val"}
    ),
    "taskonomy": Layout(
        "Taskonomy",
        encode.taskonomy,
        {column: f"{column}/taskonomy/{{folder}}/{name}" for column, name in _VIEWS.items()},
        {"train": "rooms_train", "test": "rooms_test"},
        "taskonomy.json",
        {column: f"{{folder}}/{column}/{name}" for column, name in _VIEWS.items()},
    ),
}


def write_layout(
    layout: str, out: Path, source: Path | None = None, size: tuple[int, int] | None = None
) -> dict[str, int]:
    """Write a set of rooms in the layout of a published set.

    The folder appears whole or not at all: everything is written beside it first. An older stand-in in its place
    is replaced; anything else that is there is left alone. The same rooms give the same files, byte for byte.

    Args:
        layout: A key of :data:`LAYOUTS`.
        out: The new set's folder.
        source: Folder of the rooms; None is the embedded set.
        size: Height and width of the pictures; None is the rooms' own. See :func:`experiments.rooms.encode.zoom`.

    Returns:
        Pictures by split, ``train`` and ``test``.

    Raises:
        ValueError: Unknown layout, no rooms or damaged ones, no attribution beside them, or a folder that holds
            something else or cannot be written.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; allowed: {', '.join(LAYOUTS)}")
    source = EMBEDDED if source is None else source
    meta = _check_source(source)
    out = out.resolve()
    _check_target(out, source.resolve())
    size = (meta["size"][0], meta["size"][1]) if size is None else size
    try:
        with _staged(out) as folder:
            counts = _write(LAYOUTS[layout], folder, source, size, meta["splits"])
            facts = {"layout": layout, "title": LAYOUTS[layout].title, "height": size[0], "width": size[1]}
            facts |= {"version": meta.get("version"), "seed": meta.get("seed"), "attribution": ATTRIBUTION}
            write_atomically(folder / STAND_IN, NOTE.format(**facts, **counts))
            write_atomically(folder / ATTRIBUTION, (source / ATTRIBUTION).read_bytes())
    except OSError as error:
        raise ValueError(f"cannot write to {out}: {error}") from error
    return counts


def _check_source(source: Path) -> dict[str, Any]:
    meta = read_meta(source)
    if tuple(meta["classes"]) != CLASSES:
        raise ValueError(f"the rooms in {source} have the classes {meta['classes']}; allowed: {list(CLASSES)}")
    if not (source / ATTRIBUTION).is_file():
        command = f"python -m experiments.rooms attribution --set {source} --out {source / ATTRIBUTION}"
        raise ValueError(f"{source / ATTRIBUTION} is missing, which the licences ask for: {command} writes it")
    check_files(source, meta)
    return meta


def _check_target(out: Path, source: Path) -> None:
    if out == source or out in source.parents or source in out.parents:
        raise ValueError(f"the folder {out} and that of the rooms, {source}, hold one another: choose another folder")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: choose another folder")
    if out.is_dir() and any(out.iterdir()) and not (out / STAND_IN).is_file():
        raise ValueError(f"{out} holds files that are no stand-in (no {STAND_IN}): choose another folder")


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A new folder beside ``out`` that takes its place at the end; what killed runs left there is removed."""
    new, old = (out.with_name(f".{out.name}.{suffix}") for suffix in ("part", "old"))
    _tidy(out, new, old)
    try:
        new.mkdir(parents=True)
        yield new
        if out.exists():
            out.rename(old)
        new.rename(out)
    finally:
        _tidy(out, new, old)


def _tidy(out: Path, new: Path, old: Path) -> None:
    if old.exists() and not out.exists():  # stopped between the two renames
        old.rename(out)
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)


def _write(layout: Layout, folder: Path, source: Path, size: tuple[int, int], rooms: dict[str, int]) -> dict[str, int]:
    """Write all pictures, the index, and for Taskonomy the class weights; gives the pictures by split."""
    rows: dict[str, list[list[str]]] = {"train": [], "test": []}
    pixels = np.zeros(1 + len(encode.TASKONOMY17), np.int64)
    bar = track(_rooms(source), layout.title, sum(rooms.values()), console=Console(stderr=True))
    for split, room in bar:
        before = len(rows[split]) if layout.restart else len(rows["train"]) + len(rows["test"])
        names = {"folder": layout.folders[split], "number": layout.first + before}
        arrays = layout.encode(encode.zoom(room, size))
        for column, path in layout.files.items():
            write_atomically(folder / path.format(**names), _bytes(arrays[column], path))
        rows[split].append([(layout.listed or layout.files)[column].format(**names) for column in layout.files])
        if split == "train" and "segment_semantic" in arrays:
            pixels += np.bincount(arrays["segment_semantic"].ravel(), minlength=len(pixels))
    if pixels.any():
        buffer = io.BytesIO()
        np.save(buffer, encode.prior_factor(pixels[1:]))
        write_atomically(folder / "semseg_prior_factor.npy", buffer.getvalue())
    if layout.index is not None:
        write_atomically(folder / layout.index, json.dumps(rows, indent=0) + "\n")
    return {split: len(found) for split, found in rows.items()}


def _rooms(source: Path) -> Iterator[tuple[str, Room]]:
    for split, parts in SPLITS.items():
        for part in parts:
            for room in read_rooms(source, part):
                yield split, room


def _bytes(array: Array, path: str) -> bytes:
    buffer = io.BytesIO()
    if path.endswith(".npy"):
        np.save(buffer, array)
    else:
        Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()
