"""A tiny set of rooms with every class and every unknown label, to be written in published layouts."""

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.rooms import pack
from experiments.rooms.catalog import CLASSES
from experiments.rooms.labels import Labels

HEIGHT, WIDTH = 24, 32
COUNTS = {"train": 4, "val": 1, "test": 2}


def make_room(name: str, rng: np.random.Generator) -> pack.Room:
    coarse = rng.integers(0, 256, (HEIGHT // 4, WIDTH // 4, 3), dtype=np.uint8)
    normal = rng.normal(size=(HEIGHT, WIDTH, 3))
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    normal[1, :6] = np.concatenate([np.eye(3), -np.eye(3)])  # the ends of the scale
    depth = rng.uniform(0.3, 8, (HEIGHT, WIDTH))
    seg = rng.integers(0, len(CLASSES), (HEIGHT, WIDTH)).astype(np.uint8)
    seg[0], normal[0], depth[0] = 255, 0, 0
    entry = {"id": name, "room_type": "office", "seed": 1, "models": []}
    return pack.Room(entry, coarse.repeat(4, 0).repeat(4, 1), Labels(seg, normal, depth))


def write_source(folder: Path, counts: dict[str, int] = COUNTS) -> Path:
    """Write the set; gives its folder."""
    parts, rng = folder / "parts", np.random.default_rng(7)
    parts.mkdir()
    for split, count in counts.items():
        for number in range(count):
            pack.write_part(parts, make_room(f"{split}-{number:05d}", rng))
    pack.pack(parts, folder / "set", (HEIGHT, WIDTH), 1)
    (folder / "set" / "ATTRIBUTION.md").write_text("# Who made it\n")
    return folder / "set"


def read_source(folder: Path) -> dict[str, list[pack.Room]]:
    """The rooms of each split of a stand-in, as the set's own reader gives them."""
    found = {split: list(pack.read_rooms(folder, split)) for split in COUNTS}
    return {"train": found["train"] + found["val"], "test": found["test"]}


def read(path: Path) -> np.ndarray:
    if path.suffix == ".npy":
        return np.load(path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.array(image)


def tree(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
