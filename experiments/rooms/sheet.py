"""A contact sheet: rooms as rows, the picture and its labels as columns, and the legend of the classes."""

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from cut.data.filters import edge_strength, keypoint_response
from experiments.rooms.catalog import CLASSES
from experiments.rooms.pack import Room, read_rooms
from experiments.rooms.plan import ROOM_TYPES

SCALE, MARGIN, GUTTER, TITLE = 2, 24, 8, 34
COLUMNS = ("picture", "segmentation", "normals", "depth", "edges", "keypoints")
PAPER, INK, FAINT = (255, 255, 255), (32, 32, 36), (120, 120, 128)
PALETTE = np.array(
    [
        (205, 200, 190), (150, 110, 80), (235, 235, 240), (214, 39, 40), (255, 127, 14), (148, 103, 189),
        (188, 189, 34), (140, 86, 75), (255, 215, 0), (44, 160, 44), (23, 23, 60), (23, 190, 207),
        (31, 119, 180), (227, 119, 194), (127, 127, 127),
    ],
    np.uint8,
)  # fmt: skip
_DEPTH = np.array([(253, 231, 37), (94, 201, 98), (33, 145, 140), (59, 82, 139), (68, 1, 84)], float)
_HEAT = np.array([(0, 0, 4), (81, 18, 124), (183, 55, 121), (252, 137, 97), (252, 253, 191)], float)
Array = NDArray[Any]


def ramp(values: Array, colours: Array) -> Array:
    """Colour numbers in [0, 1] along a row of colours: [..., 3] bytes.

    >>> ramp(np.array([0.0, 0.5, 1.0]), np.array([(0, 0, 0), (255, 255, 255)])).tolist()
    [[0, 0, 0], [128, 128, 128], [255, 255, 255]]
    """
    at = np.linspace(0, 1, len(colours))
    channels = [np.interp(values, at, colours[:, i]) for i in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)


def panels(room: Room) -> list[Array]:
    """One picture, [H, W, 3] bytes, for each of the columns."""
    labels = room.labels
    seg = np.where((labels.seg < len(CLASSES))[..., None], PALETTE[labels.seg % len(CLASSES)], 0)
    far = max(float(np.percentile(labels.depth, 99)), 1e-3)
    depth = np.where(labels.depth[..., None] > 0, ramp(labels.depth / far, _DEPTH), 0)
    normal = ((labels.normal + 1) * 127.5).round()
    edge, keypoint = edge_strength(room.picture), keypoint_response(room.picture)
    pictures = (room.picture, seg, normal, depth, ramp(edge, _HEAT[[0, -1]] * 1.0), ramp(keypoint, _HEAT))
    return [picture.astype(np.uint8) for picture in pictures]


def draw_sheet(folder: Path, out: Path, rows: int = 6) -> None:
    """Draw some test rooms of a set, one of each type and then more.

    Args:
        folder: Of the set.
        out: The PNG file.
        rows: How many rooms.

    Raises:
        ValueError: There is no set or it is empty.
    """
    rooms = list(islice(read_rooms(folder, "test"), 40)) or list(islice(read_rooms(folder), 40))
    if not rooms:
        raise ValueError(f"{folder} holds no rooms")
    chosen = _one_of_each(rooms, rows)
    height, width = (side * SCALE for side in chosen[0].picture.shape[:2])
    legend = 3 * 24 + 20
    size = (
        2 * MARGIN + len(COLUMNS) * width + (len(COLUMNS) - 1) * GUTTER,
        2 * MARGIN + TITLE + len(chosen) * (height + GUTTER) + legend,
    )
    sheet = Image.new("RGB", size, PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(17)
    for column, title in enumerate(COLUMNS):
        pen.text((MARGIN + column * (width + GUTTER), MARGIN), title, INK, font)
    for row, room in enumerate(chosen):
        top = MARGIN + TITLE + row * (height + GUTTER)
        for column, panel in enumerate(panels(room)):
            picture = Image.fromarray(panel).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (MARGIN + column * (width + GUTTER), top))
        _tag(pen, (MARGIN, top + height), room.entry["room_type"].replace("_", " "))
    _legend(pen, size[0], MARGIN + TITLE + len(chosen) * (height + GUTTER) + 14, font)
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out, optimize=True)


def _one_of_each(rooms: list[Room], count: int) -> list[Room]:
    """The liveliest rooms, of each type in turn: those that show most classes."""
    variety = {room.entry["id"]: len(np.unique(room.labels.seg)) for room in rooms}
    ranked = sorted(rooms, key=lambda room: -variety[room.entry["id"]])
    turns = [[room for room in ranked if room.entry["room_type"] == kind] for kind in ROOM_TYPES]
    mixed = [group[i] for i in range(len(rooms)) for group in turns if i < len(group)]
    return mixed[:count]


def _tag(pen: ImageDraw.ImageDraw, corner: tuple[int, int], text: str) -> None:
    """A small dark label in the lower left corner of a picture."""
    font = ImageFont.load_default(13)
    length = int(pen.textlength(text, font))
    pen.rectangle((corner[0], corner[1] - 20, corner[0] + length + 12, corner[1] - 1), (24, 24, 28))
    pen.text((corner[0] + 6, corner[1] - 18), text, (255, 255, 255), font)


def _legend(pen: ImageDraw.ImageDraw, width: int, top: int, font: Any) -> None:
    step = (width - 2 * MARGIN) // 8
    for i, name in enumerate(CLASSES):
        x, y = MARGIN + i % 8 * step, top + i // 8 * 26
        pen.rectangle((x, y, x + 18, y + 18), tuple(int(c) for c in PALETTE[i]), FAINT)
        pen.text((x + 26, y - 1), name.replace("_", " / "), INK, font)
    note = "depth: yellow = near, violet = far; normals: red = right, green = up, blue = to the camera"
    pen.text((MARGIN, top + 54), note, FAINT, ImageFont.load_default(15))
