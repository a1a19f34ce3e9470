"""CIFAR-100 in its binary layout: 32x32 colour pictures of 100 classes in 20 superclasses of 5.

Nothing fetches it: put the published ``cifar-100-binary`` (``train.bin`` and ``test.bin``; a picture is a byte for the
superclass, one for the class and 3 x 32 x 32 bytes, red first) into the cache of data sets or a folder of one's own.
The layout with pickles is not read, since a pickle can run code.

Reference: Krizhevsky, Learning multiple layers of features from tiny images, 2009.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cut.data.mnist import SPLITS, cache, held_out

FOLDER = "cifar-100-binary"
SIDE = 32
RECORD = 2 + 3 * SIDE * SIDE
# Superclasses in the order of their labels; a class's label is its place among all 100 names.
SUPERCLASSES: dict[str, tuple[str, ...]] = {
    "aquatic_mammals": ("beaver", "dolphin", "otter", "seal", "whale"),
    "fish": ("aquarium_fish", "flatfish", "ray", "shark", "trout"),
    "flowers": ("orchid", "poppy", "rose", "sunflower", "tulip"),
    "food_containers": ("bottle", "bowl", "can", "cup", "plate"),
    "fruit_and_vegetables": ("apple", "mushroom", "orange", "pear", "sweet_pepper"),
    "household_electrical_devices": ("clock", "keyboard", "lamp", "telephone", "television"),
    "household_furniture": ("bed", "chair", "couch", "table", "wardrobe"),
    "insects": ("bee", "beetle", "butterfly", "caterpillar", "cockroach"),
    "large_carnivores": ("bear", "leopard", "lion", "tiger", "wolf"),
    "large_man-made_outdoor_things": ("bridge", "castle", "house", "road", "skyscraper"),
    "large_natural_outdoor_scenes": ("cloud", "forest", "mountain", "plain", "sea"),
    "large_omnivores_and_herbivores": ("camel", "cattle", "chimpanzee", "elephant", "kangaroo"),
    "medium_mammals": ("fox", "porcupine", "possum", "raccoon", "skunk"),
    "non-insect_invertebrates": ("crab", "lobster", "snail", "spider", "worm"),
    "people": ("baby", "boy", "girl", "man", "woman"),
    "reptiles": ("crocodile", "dinosaur", "lizard", "snake", "turtle"),
    "small_mammals": ("hamster", "mouse", "rabbit", "shrew", "squirrel"),
    "trees": ("maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"),
    "vehicles_1": ("bicycle", "bus", "motorcycle", "pickup_truck", "train"),
    "vehicles_2": ("lawn_mower", "rocket", "streetcar", "tank", "tractor"),
}
CLASSES = tuple(sorted(name for names in SUPERCLASSES.values() for name in names))


def read(split: str, root: str | Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Pictures, uint8 [N, 32, 32, 3], and labels, int64 [N]: places in :data:`CLASSES`.

    Args:
        split: ``train``, ``val`` (one in ten training pictures, by hash) or ``test``.
        root: Folder that holds ``cifar-100-binary``; None = the cache.

    Raises:
        ValueError: If there is no such split, or the file is missing or damaged.
    """
    if split not in SPLITS:
        raise ValueError(f"CIFAR-100 has no split {split!r}; allowed: {', '.join(SPLITS)}")
    path = (cache() if root is None else Path(root)) / FOLDER / ("test.bin" if split == "test" else "train.bin")
    try:
        content = np.frombuffer(path.read_bytes(), np.uint8)
    except OSError as error:
        reason = f"cannot be read: {error.strerror or error}"
        raise ValueError(f"{path} {reason}; put the binary version of CIFAR-100 there") from error
    if not content.size or content.size % RECORD:
        raise ValueError(f"{path} is damaged: {content.size} bytes, expected a multiple of {RECORD}, not 0")
    records = content.reshape(-1, RECORD)
    labels = records[:, 1].astype(np.int64)
    superclass = {name: i for i, names in enumerate(SUPERCLASSES.values()) for name in names}
    right = np.array([superclass[name] for name in CLASSES] + [-1] * (256 - len(CLASSES)))[labels]
    wrong = (right != records[:, 0]).nonzero()[0]
    if wrong.size:
        first = int(wrong[0])
        raise ValueError(
            f"{path} is damaged: picture {first} has superclass {records[first, 0]}, class {labels[first]}"
        )
    pictures = records[:, 2:].reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
    chosen = slice(None) if split == "test" else held_out("cifar100", len(labels)) == (split == "val")
    return np.ascontiguousarray(pictures[chosen]), labels[chosen]
