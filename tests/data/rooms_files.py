"""Writes a tiny Rooms set, by hand and not by the renderer's own writer."""

import hashlib
import io
import json
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ["wall", "floor", "bed", "lamp"]
TYPES = ["living_room", "bedroom", "office"]
COUNTS = {"train": 7, "val": 3, "test": 2}
SIZE = (24, 32)
PER_SHARD = 4


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def room(rng: np.random.Generator, seg: np.ndarray | None = None) -> dict[str, bytes]:
    """Random contents, smooth enough for JPEG, with unknown labels in the first row."""
    height, width = SIZE
    coarse = rng.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    jpeg = io.BytesIO()
    Image.fromarray(coarse.repeat(4, 0).repeat(4, 1)).save(jpeg, "JPEG", quality=95)
    vectors = rng.normal(size=(height, width, 3))
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    normal = np.round((vectors + 1) / 2 * 255).astype(np.uint8)
    depth = rng.integers(500, 6000, (height, width)).astype(np.uint16)
    classes = rng.integers(0, len(CLASSES), (height, width)).astype(np.uint8) if seg is None else seg
    normal[0], depth[0], classes[0] = 128, 0, 255
    return {
        "jpg": jpeg.getvalue(),
        "seg.png": png(classes),
        "normal.png": png(normal),
        "depth.png": png(depth),
    }


def write_rooms(root: Path, **changes: dict[str, bytes]) -> Path:
    """Write a set; ``changes`` maps a room's id, with ``_`` for ``-``, to files that replace its own."""
    root.mkdir(parents=True, exist_ok=True)
    rng, files = np.random.default_rng(3), {}
    for split, count in COUNTS.items():
        for start in range(0, count, PER_SHARD):
            name, index = f"{split}-{start // PER_SHARD:03d}.zip", []
            with zipfile.ZipFile(root / name, "w") as archive:
                for number in range(start, min(count, start + PER_SHARD)):
                    id_ = f"{split}-{number:05d}"
                    for suffix, data in (room(rng) | changes.get(id_.replace("-", "_"), {})).items():
                        archive.writestr(f"{id_}.{suffix}", data)
                    kind = TYPES[number % len(TYPES)]
                    index.append({"id": id_, "room_type": kind, "seed": 3, "models": ["bed01"]})
                archive.writestr("index.json", json.dumps({"rooms": index}))
            files[name] = hashlib.sha256((root / name).read_bytes()).hexdigest()
    meta = {
        "name": "Rooms",
        "version": 1,
        "classes": CLASSES,
        "room_types": TYPES,
        "size": list(SIZE),
        "splits": COUNTS,
        "files": files,
    }
    (root / "meta.json").write_text(json.dumps(meta))
    return root
