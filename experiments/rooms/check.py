"""What a set holds: how often each class is seen, how large its files are, which furniture test has alone."""

from collections import Counter
from pathlib import Path

import numpy as np

from experiments.rooms.catalog import CLASSES
from experiments.rooms.pack import SPLITS, read_rooms

FEWEST_PIXELS = 20


def describe(folder: Path) -> str:
    """Count the classes of a set, as a table.

    Args:
        folder: Of the set.

    Raises:
        ValueError: There is no set or it is empty.
    """
    present, pixels = np.zeros((len(SPLITS), len(CLASSES))), np.zeros(256)
    rooms: Counter[str] = Counter()
    types: Counter[str] = Counter()
    used: dict[str, set[str]] = {split: set() for split in SPLITS}
    for room in read_rooms(folder):
        split = room.entry["id"].split("-")[0]
        counts = np.bincount(room.labels.seg.ravel(), minlength=256)
        present[SPLITS.index(split)] += counts[: len(CLASSES)] >= FEWEST_PIXELS
        pixels += counts
        rooms[split] += 1
        types[room.entry["room_type"]] += 1
        used[split].update(room.entry["models"])
    if not rooms:
        raise ValueError(f"{folder} holds no rooms")
    number = np.array([max(rooms[split], 1) for split in SPLITS])
    lines = [
        f"rooms: {dict(rooms)}, types: {dict(types)}",
        f"{'class':12s} {'pixels':>7s}   in pictures, {FEWEST_PIXELS} pixels or more: " + "   ".join(SPLITS),
    ]
    for i, name in enumerate(CLASSES):
        each = "  ".join(f"{part:6.1%}" for part in present[:, i] / number)
        lines.append(f"{name:12s} {pixels[i] / pixels.sum():7.1%} {present[:, i].sum() / rooms.total():7.1%}  {each}")
    shell, blank = pixels[:3].sum() / pixels.sum(), pixels[255] / pixels.sum()
    shared = used["test"] & (used["train"] | used["val"])
    sizes = [path.stat().st_size for path in folder.iterdir() if path.is_file()]
    lines += [
        f"wall + floor + ceiling: {shell:.1%} of the pixels; without label: {blank:.3%}",
        "models: " + ", ".join(f"{len(names)} in {split}" for split, names in used.items()),
        f"models in test and elsewhere: {len(shared)}",
        f"files: {len(sizes)}, {sum(sizes) / 1e6:.2f} MB in all, the largest {max(sizes) / 1e6:.2f} MB",
    ]
    return "\n".join(lines)
