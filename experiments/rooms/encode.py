"""Rooms as the files of published data sets hold them: class maps, and one function per layout.

Each function gives the contents of one room's files by column of the set's index; :mod:`experiments.rooms.layouts`
says where they lie. The sources of every encoding are in ``docs/stand-ins.md``.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cut.data.cityscapes import CLASSES7 as CITYSCAPES7
from cut.data.cityscapes import CLASSES19 as CITYSCAPES19
from cut.data.filters import edge_strength, keypoint_response
from cut.data.nyuv2 import CLASSES13 as NYU13
from cut.data.nyuv2 import CLASSES40 as NYU40
from cut.data.taskonomy import CLASSES as TASKONOMY17
from experiments.rooms.catalog import CLASSES
from experiments.rooms.labels import IGNORE, Labels
from experiments.rooms.pack import Room, encode_normal

Array = NDArray[Any]

# NYU-v2's own reduction of the classes that occur here.
NYU13_OF_40 = {
    "wall": "wall", "floor": "floor", "ceiling": "ceiling", "bed": "bed", "chair": "chair", "sofa": "sofa",
    "table": "table", "cabinet": "furniture", "lamp": "objects", "other prop": "objects", "television": "tv",
    "toilet": "objects", "window": "window", "refrigerator": "furniture",
}  # fmt: skip
# How many of Cityscapes' 19 classes, in their order, are in each of its 7 categories.
CATEGORIES = (2, 3, 3, 2, 1, 2, 6)
FOREGROUND = ("human", "vehicle")
# A room's class as NYU-v2's (40), Cityscapes' (19) and Taskonomy's (17). Plants are "other prop" in NYU-v2 itself.
# Cityscapes has no furniture: loose pieces become vehicles, the rest what they resemble most, 15 different classes.
CLASS_MAP = {
    "wall": ("wall", "wall", "background"),
    "floor": ("floor", "road", "background"),
    "ceiling": ("ceiling", "sky", "background"),
    "bed": ("bed", "bus", "bed"),
    "chair": ("chair", "bicycle", "chair"),
    "sofa": ("sofa", "car", "couch"),
    "table": ("table", "truck", "dining table"),
    "cabinet": ("cabinet", "train", "background"),
    "lamp": ("lamp", "traffic light", "background"),
    "plant": ("other prop", "vegetation", "potted plant"),
    "screen": ("television", "traffic sign", "tv"),
    "bathroom": ("toilet", "fence", "toilet"),
    "door_window": ("window", "building", "background"),
    "appliance": ("refrigerator", "motorcycle", "refrigerator"),
    "other": ("other prop", "pole", "background"),
}

# Cityscapes holds inverse depth; 0.1 brings rooms of 1 to 7 metres to the size of its values.
INVERSE_DEPTH = 0.1
# Taskonomy: 1/512 m, 65535 = none, valid below 64500; responses fill this share of 16 bits before they are clipped.
PER_METRE, NO_DEPTH, DEEPEST = 512, 65535, 64499
KEYPOINT_FULL, EDGE_FULL = 0.005 * 65536, 0.08 * 65536
# Share of the uniform distribution in the class frequencies that Taskonomy's weights are the inverse of.
UNIFORM = 0.5


def nyu40() -> list[int]:
    """NYU-v2's class, 0 to 39, of each of the 15 room classes."""
    return [NYU40.index(CLASS_MAP[name][0]) for name in CLASSES]


def nyu13() -> list[int]:
    """NYU-v2's class, 0 to 12, of each of the 15 room classes."""
    return [NYU13.index(NYU13_OF_40[CLASS_MAP[name][0]]) for name in CLASSES]


def cityscapes19() -> list[int]:
    """Cityscapes' class, 0 to 18, of each of the 15 room classes."""
    return [CITYSCAPES19.index(CLASS_MAP[name][1]) for name in CLASSES]


def cityscapes7() -> list[int]:
    """Cityscapes' category, 0 to 6, of each of the 15 room classes."""
    categories = np.repeat(np.arange(len(CATEGORIES)), CATEGORIES)
    return [int(categories[number]) for number in cityscapes19()]


def cityscapes2() -> list[int]:
    """1 for each of the 15 room classes whose Cityscapes category is a human or a vehicle, else 0."""
    return [int(CITYSCAPES7[number] in FOREGROUND) for number in cityscapes7()]


def taskonomy17() -> list[int]:
    """Taskonomy's class, 0 to 16, of each of the 15 room classes."""
    return [TASKONOMY17.index(CLASS_MAP[name][2]) for name in CLASSES]


def as_classes(seg: Array, classes: Sequence[int], unknown: int, kind: type[np.integer[Any]]) -> Array:
    """A segmentation with another set's classes.

    Args:
        seg: Room classes [H, W], 255 = unknown.
        classes: The new class of each.
        unknown: The new value of what is unknown.
        kind: The type of the result.

    Raises:
        ValueError: A class is none of the room classes.

    Example:
        >>> as_classes(np.array([[0, 1, 255]], np.uint8), [7, 9], -1, np.int32).tolist()
        [[7, 9, -1]]
    """
    highest = seg[seg != IGNORE].max(initial=0)
    if highest >= len(classes):
        raise ValueError(f"class {highest} of a room; allowed: 0 to {len(classes) - 1}, {IGNORE}")
    table = np.full(256, unknown, kind)
    table[: len(classes)] = classes
    return table[seg]


def zoom(room: Room, size: tuple[int, int]) -> Room:
    """A room at another size: scaled alike in both directions until it fills the size, the middle cut out.

    A zoom is a longer lens: normals and depth stay what they are. The picture is resized bilinearly, labels by the
    nearest pixel.

    Args:
        room: The room.
        size: New height and width.
    """
    height, width = room.picture.shape[:2]
    if size == (height, width):
        return room
    factor = max(size[0] / height, size[1] / width)
    top, left = (height - size[0] / factor) / 2, (width - size[1] / factor) / 2
    rows = (top + (np.arange(size[0]) + 0.5) / factor).astype(np.intp).clip(0, height - 1)
    columns = (left + (np.arange(size[1]) + 0.5) / factor).astype(np.intp).clip(0, width - 1)
    box = (left, top, min(left + size[1] / factor, width), min(top + size[0] / factor, height))
    resized = Image.fromarray(room.picture).resize(size[::-1], Image.Resampling.BILINEAR, box)
    seg, normal, depth = (
        label[rows[:, None], columns] for label in (room.labels.seg, room.labels.normal, room.labels.depth)
    )
    return Room(room.entry, np.asarray(resized), Labels(seg, normal, depth))


def nyuv2(room: Room) -> dict[str, Array]:
    """AdaShare's NYU-v2: ``img``, ``seg``, ``normal_mask`` (uint8) and ``depth`` (float32 [H, W], metres).

    Its normals' axes are x right, y into the picture, z up. 255 in a channel means unknown, so known ones end at
    254.
    """
    x, y, z = np.moveaxis(room.labels.normal, -1, 0)
    normal = np.round((np.stack([x, -z, y], -1) + 1) / 2 * 255).clip(0, 254).astype(np.uint8)
    normal[(room.labels.normal == 0).all(-1)] = 255
    return {
        "img": room.picture,
        "seg": as_classes(room.labels.seg, nyu40(), IGNORE, np.uint8),
        "normal_mask": normal,
        "depth": room.labels.depth.astype(np.float32),
    }


def nyuv2_npy(room: Room) -> dict[str, Array]:
    """LibMTL's NYU-v2: ``image`` in [0, 1], ``label`` (-1 = unknown), ``depth`` [H, W, 1] in metres, ``normal``."""
    return {
        "image": _fractions(room.picture),
        "label": as_classes(room.labels.seg, nyu13(), -1, np.int32),
        "depth": room.labels.depth.astype(np.float32)[..., None],
        "normal": room.labels.normal.astype(np.float32),
    }


def cityscapes(room: Room) -> dict[str, Array]:
    """AdaShare's Cityscapes: ``image`` in [0, 1], inverse ``depth`` [H, W, 1], ``label_2``, ``_7``, ``_19``."""
    seg = room.labels.seg
    return {
        "image": _fractions(room.picture),
        "depth": _inverse(room.labels.depth)[..., None],
        "label_2": as_classes(seg, cityscapes2(), -1, np.int32),
        "label_7": as_classes(seg, cityscapes7(), -1, np.int32),
        "label_19": as_classes(seg, cityscapes19(), -1, np.int32),
    }


def cityscapes_npy(room: Room) -> dict[str, Array]:
    """LibMTL's Cityscapes: ``image`` in [0, 1], ``label`` of 7 classes (-1 = unknown), inverse ``depth``."""
    found = cityscapes(room)
    return {"image": found["image"], "label": found["label_7"], "depth": found["depth"]}


def taskonomy(room: Room) -> dict[str, Array]:
    """Taskonomy: all columns as pictures of 8 bits, ``depth_zbuffer``, ``keypoints2d``, ``edge_texture`` of 16.

    A depth of 65535 is unknown, and so is the normal there.
    """
    depth = room.labels.depth
    raw = np.round(depth.astype(np.float64) * PER_METRE).clip(1, DEEPEST)
    classes = [number + 1 for number in taskonomy17()]
    return {
        "rgb": room.picture,
        "segment_semantic": as_classes(room.labels.seg, classes, 0, np.uint8),
        "normal": encode_normal(room.labels.normal),
        "depth_zbuffer": np.where(depth > 0, raw, NO_DEPTH).astype(np.uint16),
        "keypoints2d": np.round(keypoint_response(room.picture) * KEYPOINT_FULL).astype(np.uint16),
        "edge_texture": np.round(edge_strength(room.picture) * EDGE_FULL).astype(np.uint16),
    }


def prior_factor(counts: Array) -> Array:
    """Class weights as in Taskonomy's ``semseg_prior_factor.npy``.

    The inverse of the frequencies mixed with as much of the uniform distribution, scaled so that their mean over
    all pixels is 1: what reproduces the published 17 numbers from the frequencies that they imply.

    Args:
        counts: Pixels of each class, in any unit.

    Returns:
        Positive weights, float64; classes that are never seen share the largest one.

    Raises:
        ValueError: If there are no pixels.

    Example:
        >>> prior_factor(np.array([8, 2, 0])).round(2).tolist()
        [0.82, 1.73, 2.78]
    """
    total = counts.sum()
    if not total > 0:
        raise ValueError("no pixel of a train picture has a class: there are no class weights")
    share = counts / total
    factor = 1 / ((1 - UNIFORM) * share + UNIFORM / len(counts))
    found: Array = factor / (share * factor).sum()
    return found


def _fractions(picture: Array) -> Array:
    return picture.astype(np.float32) / np.float32(255)


def _inverse(depth: Array) -> Array:
    """Inverse depth, float32; 0 stays unknown."""
    known = depth > 0
    return np.where(known, INVERSE_DEPTH / np.where(known, depth, 1), 0).astype(np.float32)
