"""Shards: the files of a Rooms set.

A set is a folder of zip shards ``<split>-<nnn>.zip`` beside a ``meta.json`` (classes, room types, size, rooms
per split, SHA-256 of each shard). A shard holds, per room, ``<id>.jpg`` (the decoded JPEG *is* the picture),
``<id>.seg.png`` (class, 255 = ignore), ``<id>.normal.png`` ((n + 1) / 2 * 255; 128, 128, 128 = unknown),
``<id>.depth.png`` (16-bit millimetres, 0 = unknown), and an ``index.json`` with each room's type and
furniture.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cut.data.filters import FILTERS

SPLITS = ("train", "val", "test")
UNKNOWN_NORMAL = 128
FILES = {
    "seg": ("seg.png", np.uint8, 2),
    "normal": ("normal.png", np.uint8, 3),
    "depth": ("depth.png", np.uint16, 2),
}


def read_meta(root: Path) -> dict[str, Any]:
    """A set's ``meta.json``.

    Raises:
        ValueError: If it is missing or damaged.
    """
    path = root / "meta.json"
    if not path.is_file():
        raise ValueError(f"no Rooms set in {root}: {path} is missing (make rooms OUT={root} renders one)")
    try:
        meta: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        good = all(isinstance(name, str) for name in [*meta["classes"], *meta["room_types"]])
        good = good and len(meta["size"]) == 2 and min(meta["size"]) > 0
        good = good and all(meta["splits"][split] > 0 for split in SPLITS)
        # A name with a folder in it could point anywhere.
        good = good and all(Path(name).name == name for name in meta["files"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error
    if not good:
        raise ValueError(f"{path} is damaged: an entry has a value that is not allowed")
    return meta


def check_files(root: Path, meta: dict[str, Any]) -> None:
    """Compare every shard with its checksum.

    Raises:
        ValueError: Naming the file that is missing or damaged.
    """
    for name, digest in meta["files"].items():
        path = root / name
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise ValueError(f"{path} is damaged: its SHA-256 is not the one in {root / 'meta.json'}")


@dataclass(frozen=True)
class Room:
    """One room, decoded to compact arrays.

    Attributes:
        picture: uint8 [H, W, 3].
        labels: ``seg`` uint8 [H, W]; ``normal`` uint8 [H, W, 3], (n + 1) / 2 * 255; ``depth`` uint16 [H, W],
            millimetres; ``edge`` and ``keypoint`` uint16 [H, W], 65535 = 1.
        scene: Index of the room's type.
    """

    picture: np.ndarray
    labels: dict[str, np.ndarray]
    scene: int


class Shards:
    """The rooms of one split, each read when first asked for and kept.

    Args:
        root: The set's folder.
        split: ``train``, ``val`` or ``test``.
        meta: The set's ``meta.json``.
        tasks: Labels to read.

    Raises:
        ValueError: If a shard is no zip file, has no index, or the rooms are not those that ``meta`` counts.
    """

    def __init__(self, root: Path, split: str, meta: dict[str, Any], tasks: Sequence[str]) -> None:
        self.size = (int(meta["size"][0]), int(meta["size"][1]))
        self.classes, self.tasks = len(meta["classes"]), tuple(task for task in tasks if task != "scene")
        self.rooms: list[tuple[Path, str, int]] = []
        self._cache: dict[int, Room] = {}
        for name in sorted(name for name in meta["files"] if name.startswith(f"{split}-")):
            try:
                with zipfile.ZipFile(root / name) as archive:
                    rooms = json.loads(archive.read("index.json"))["rooms"]
                found = [(room["id"], meta["room_types"].index(room["room_type"])) for room in rooms]
            except (zipfile.BadZipFile, KeyError, TypeError, ValueError, OSError) as error:
                raise ValueError(f"{root / name} is damaged: {error}") from error
            self.rooms += [(root / name, *entry) for entry in found]
        if len(self.rooms) != meta["splits"][split]:
            counted = f"{len(self.rooms)} rooms of split {split!r}, not {meta['splits'][split]}"
            raise ValueError(f"the shards of {root} hold {counted} as its meta.json says")

    def __len__(self) -> int:
        """Number of rooms."""
        return len(self.rooms)

    def room(self, index: int) -> Room:
        """One room.

        Raises:
            ValueError: Naming the shard and the room that cannot be read.
        """
        if index not in self._cache:
            path, name, scene = self.rooms[index]
            try:
                with zipfile.ZipFile(path) as archive:
                    self._cache[index] = self._read(archive, name, scene)
            except (zipfile.BadZipFile, KeyError, OSError, SyntaxError, ValueError) as error:
                raise ValueError(f"room {name} in {path} cannot be read: {error}") from error
        return self._cache[index]

    def _read(self, archive: zipfile.ZipFile, name: str, scene: int) -> Room:
        picture = self._pixels(archive, f"{name}.jpg", np.uint8, 3)
        labels = {}
        for task in self.tasks:
            if task in FILTERS:
                labels[task] = (FILTERS[task](picture) * 65535).round().astype(np.uint16)
            else:
                suffix, dtype, dimensions = FILES[task]
                labels[task] = self._pixels(archive, f"{name}.{suffix}", dtype, dimensions)
        if "seg" in labels:
            highest = labels["seg"][labels["seg"] != 255].max(initial=0)
            if highest >= self.classes:
                raise ValueError(f"{name}.seg.png has class {highest}; allowed: 0 to {self.classes - 1}, 255")
        return Room(picture, labels, scene)

    def _pixels(self, archive: zipfile.ZipFile, name: str, dtype: Any, dimensions: int) -> np.ndarray:
        """The pixels of one file, checked before they are decoded: a damaged header can ask for any size."""
        with Image.open(io.BytesIO(archive.read(name))) as image:
            if image.size[::-1] != self.size:
                raise ValueError(f"{name} is {image.size[1]}x{image.size[0]}, not {self.size[0]}x{self.size[1]}")
            pixels = np.array(image)
        if pixels.ndim != dimensions or not np.can_cast(pixels.dtype, dtype, "same_kind"):
            raise ValueError(f"{name} is {pixels.dtype} {list(pixels.shape)}, not {np.dtype(dtype)}")
        return pixels.astype(dtype, copy=False)
