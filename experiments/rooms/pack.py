"""The set on disk: a room as four pictures, rooms in shards, and what the set says about itself."""

import hashlib
import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from experiments.rooms.catalog import CLASSES
from experiments.rooms.labels import Labels
from experiments.rooms.plan import ROOM_TYPES

SPLITS = ("train", "val", "test")
PER_SHARD = 100
VERSION = 1
EPOCH = (1980, 1, 1, 0, 0, 0)
SUFFIXES = (".jpg", ".seg.png", ".normal.png", ".depth.png")
UNKNOWN_NORMAL = 128
Array = NDArray[Any]


@dataclass(frozen=True)
class Room:
    """One room: its entry in the index, its picture ([H, W, 3] sRGB bytes) and its labels."""

    entry: dict[str, Any]
    picture: Array
    labels: Labels


def encode_normal(normal: Array) -> Array:
    """Write unit vectors as bytes, (n + 1) / 2 * 255 rounded; the unknown (0, 0, 0) becomes 128.

    >>> encode_normal(np.array([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])).tolist()
    [[128, 128, 255], [128, 128, 128]]
    """
    values = np.round((normal + 1) / 2 * 255).astype(np.uint8)
    return np.where((normal == 0).all(-1, keepdims=True), np.uint8(UNKNOWN_NORMAL), values)


def decode_normal(values: Array) -> Array:
    """Read unit vectors from bytes; 128, 128, 128 is unknown and gives (0, 0, 0)."""
    vectors = values.astype(np.float32) / 255 * 2 - 1
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    unknown = (values == UNKNOWN_NORMAL).all(-1, keepdims=True)
    return np.where(unknown, 0, vectors / np.maximum(length, 1e-6))


def encode_depth(depth: Array) -> Array:
    """Write metres as 16-bit millimetres, 0 = unknown, at most 65.535 m."""
    return np.round(depth * 1000).clip(0, 65535).astype(np.uint16)


def room_files(room: Room) -> dict[str, bytes]:
    """Write a room as its four pictures, by file name."""
    name = room.entry["id"]
    jpeg = io.BytesIO()
    Image.fromarray(room.picture).save(jpeg, "JPEG", quality=95, subsampling=0, optimize=True)
    return {
        f"{name}.jpg": jpeg.getvalue(),
        f"{name}.seg.png": png(room.labels.seg),
        f"{name}.normal.png": png(encode_normal(room.labels.normal)),
        f"{name}.depth.png": png(encode_depth(room.labels.depth)),
    }


def png(pixels: Array) -> bytes:
    """Write bytes or 16-bit numbers, [H, W] or [H, W, 3], as the smallest PNG of several row filters."""
    bits, channels = pixels.dtype.itemsize * 8, pixels.shape[2] if pixels.ndim == 3 else 1
    rows = pixels.astype(">u2").view(np.uint8) if bits == 16 else pixels
    rows = rows.reshape(len(pixels), -1)
    packed = min((zlib.compress(data, 9) for data in _filtered(rows, channels * bits // 8)), key=len)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], bits, 2 if channels == 3 else 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", packed), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def _filtered(rows: Array, step: int) -> list[bytes]:
    """The rows behind each of PNG's filters (5 candidates), and behind the best filter of each row."""
    x = rows.astype(np.int16)
    left, up, corner = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
    left[:, step:], up[1:], corner[1:, step:] = x[:, :-step], x[:-1], x[:-1, :-step]
    guess = left + up - corner
    distance = np.abs(np.stack([left, up, corner]) - guess)
    paeth = np.where(
        (distance[0] <= distance[1]) & (distance[0] <= distance[2]),
        left,
        np.where(distance[1] <= distance[2], up, corner),
    )
    predictions = (np.zeros_like(x), left, up, (left + up) // 2, paeth)
    residuals = np.stack([(x - prediction).astype(np.uint8) for prediction in predictions])
    cost = np.minimum(residuals, 256 - residuals.astype(np.int16)).sum(2)
    choices = [np.full(len(x), kind) for kind in range(5)] + [cost.argmin(0)]
    lines = np.arange(len(x))
    return [
        np.concatenate([choice[:, None].astype(np.uint8), residuals[choice, lines]], 1).tobytes() for choice in choices
    ]


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file in one step: nobody ever sees half of it."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_bytes(data)
    os.replace(scratch, path)


def archive(files: Mapping[str, bytes]) -> bytes:
    """Put files into an uncompressed zip whose bytes depend on them alone."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as target:
        for name, data in files.items():
            info = zipfile.ZipInfo(name, EPOCH)
            info.external_attr = 0o644 << 16
            target.writestr(info, data)
    return buffer.getvalue()


def _index(entries: list[dict[str, Any]]) -> bytes:
    return json.dumps({"rooms": entries}, indent=None, separators=(",", ":")).encode()


def write_part(folder: Path, room: Room) -> None:
    """Write one finished room, so that a killed run need not render it again."""
    files = {**room_files(room), "index.json": _index([room.entry])}
    write_atomically(folder / f"{room.entry['id']}.zip", archive(files))


def pack(parts: Path, out: Path, size: tuple[int, int], seed: int) -> dict[str, Any]:
    """Gather the finished rooms of a folder into a set: shards and ``meta.json``, which it gives back.

    Args:
        parts: Folder that :func:`write_part` wrote into.
        out: Where the set goes; shards of an older set there are replaced.
        size: Height and width of the pictures.
        seed: Of the run, for the record.

    Raises:
        ValueError: There is no finished room.
    """
    found = sorted(parts.glob("*.zip"))
    if not found:
        raise ValueError(f"no finished rooms in {parts}")
    out.mkdir(parents=True, exist_ok=True)
    hashes: dict[str, str] = {}
    counts = dict.fromkeys(SPLITS, 0)
    for split in SPLITS:
        mine = [path for path in found if path.name.startswith(split + "-")]
        counts[split] = len(mine)
        for number, start in enumerate(range(0, len(mine), PER_SHARD)):
            name = f"{split}-{number:03d}.zip"
            data = archive(_shard(mine[start : start + PER_SHARD]))
            write_atomically(out / name, data)
            hashes[name] = hashlib.sha256(data).hexdigest()
    meta = {
        "name": "Rooms",
        "version": VERSION,
        "classes": list(CLASSES),
        "room_types": list(ROOM_TYPES),
        "size": list(size),
        "splits": counts,
        "seed": seed,
        "files": hashes,
    }
    write_atomically(out / "meta.json", (json.dumps(meta, indent=1) + "\n").encode())
    for old in out.glob("*-[0-9][0-9][0-9].zip"):
        if old.name not in hashes:
            old.unlink()
    return meta


def _shard(paths: Iterable[Path]) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    entries: list[dict[str, Any]] = []
    for path in paths:
        with zipfile.ZipFile(path) as part:
            entries += json.loads(part.read("index.json"))["rooms"]
            files |= {name: part.read(name) for name in part.namelist() if name != "index.json"}
    return {**files, "index.json": _index(entries)}


def read_rooms(folder: Path, split: str | None = None) -> Iterable[Room]:
    """Read the rooms of a set one by one (plainly; the library's loader is made for speed).

    Raises:
        ValueError: The folder holds no set.
    """
    if not (folder / "meta.json").is_file():
        raise ValueError(f"{folder} holds no set: meta.json is missing")
    for path in sorted(folder.glob(f"{split or '*'}-[0-9][0-9][0-9].zip")):
        with zipfile.ZipFile(path) as shard:
            for entry in json.loads(shard.read("index.json"))["rooms"]:
                pictures = [np.array(Image.open(io.BytesIO(shard.read(entry["id"] + suffix)))) for suffix in SUFFIXES]
                picture, seg, normal, depth = pictures
                yield Room(entry, picture, Labels(seg, decode_normal(normal), depth / np.float32(1000)))
