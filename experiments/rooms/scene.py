"""A planned room as triangles: walls with holes, floor, ceiling, furniture and the light sources."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.rooms import surfaces
from experiments.rooms.catalog import CLASSES
from experiments.rooms.models import Part, load
from experiments.rooms.plan import Opening, Plan

WALL, FLOOR, CEILING, LAMP, OPENING = (
    CLASSES.index(name) for name in ("wall", "floor", "ceiling", "lamp", "door_window")
)
PERIOD = 2.0
Points = NDArray[Any]


@dataclass(frozen=True)
class Mood:
    """The light of a room: radiance of the sky and of the lamps, [3] each, and whether it is night."""

    sky: Points
    lamp: Points
    night: bool


def draw_mood(rng: np.random.Generator, windows: int) -> Mood:
    """Draw daylight, lamp light or both."""
    night = bool(rng.random() < 0.25)
    tint = np.array([1, rng.uniform(0.86, 1), rng.uniform(0.68, 1)])
    strength = rng.uniform(4, 9) if night or not windows else rng.choice([0.0, rng.uniform(2, 8)], p=(0.3, 0.7))
    return Mood(np.full(3, 0.3 if night else rng.uniform(4, 9)), tint * strength, night)


def build(plan: Plan, furniture: Path, rng: np.random.Generator) -> list[Part]:
    """Turn a plan into coloured triangles in the room's frame (metres, y up).

    Args:
        plan: What stands where.
        furniture: Folder of the archives.
        rng: Source of colours, textures and light.
    """
    mood = draw_mood(rng, sum(opening.model.role == "window" for opening in plan.openings))
    parts = [*_shell(plan, rng), *_panels(plan, mood, rng)]
    for opening in plan.openings:
        parts += _opening(plan, opening, furniture, mood, rng)
    for item in plan.placed:
        spread = 0.2 if rng.random() < 0.4 else 0.05
        tint = rng.uniform(0.65, 1.1) * rng.uniform(1 - spread, 1 + spread, 3)
        pieces = load(furniture, item.model)
        shade = _shade(pieces) if rng.random() < 0.6 and mood.lamp.any() else None
        for part in pieces:
            placed = _dressed(part, _moved(part, item.turn, (item.x, item.y, item.z)), tint)
            parts.append(_lit(placed, mood) if part is shade else placed)
    return parts


def _moved(part: Part, turn: int, position: tuple[float, float, float]) -> Points:
    """The vertices after some quarter turns about the vertical and a shift."""
    cosine, sine = ((1, 0), (0, 1), (-1, 0), (0, -1))[turn % 4]
    x, y, z = part.vertices.T
    return np.stack([x * cosine + z * sine, y, z * cosine - x * sine], 1) + np.array(position)


def _dressed(part: Part, vertices: Points, tint: Points) -> Part:
    """A copy in its place, its plain colour varied."""
    colour = part.colour if part.image is not None else np.clip(part.colour * tint, 0.02, 0.95)
    return replace(part, vertices=vertices, colour=colour)


def _brightness(part: Part) -> float:
    return float(part.colour.mean() if part.image is None else part.image.mean() / 255)


def _shade(pieces: tuple[Part, ...]) -> Part | None:
    """The part of a lamp that shines: its largest bright one; more sources would only bring grain."""
    bright = [part for part in pieces if part.label == LAMP and _brightness(part) > 0.5]
    return max(bright, key=lambda part: float(np.ptp(part.vertices, 0).prod()), default=None)


def _lit(part: Part, mood: Mood) -> Part:
    seen = part.colour if part.image is None else part.image.mean((0, 1)) / 255
    return replace(part, emission=seen * mood.lamp / mood.lamp.max() * 1.6, image=None, uv=None, opacity=1.0)


def quad(corners: Sequence[tuple[float, ...]], label: int, colour: Points, **extra: Any) -> Part:
    """Two triangles over four corners, given in turn."""
    faces = np.array([[0, 1, 2], [0, 2, 3]], np.uint32)
    return Part(np.array(corners, np.float32), faces, np.asarray(colour, float), label, **extra)


def _shell(plan: Plan, rng: np.random.Generator) -> list[Part]:
    width, height, depth = plan.size
    floor = [(0, 0, 0), (width, 0, 0), (width, 0, depth), (0, 0, depth)]
    gloss = float(rng.uniform(0.15, 0.35)) if rng.random() < 0.4 else None
    white = rng.uniform(0.8, 0.95) * np.array([1, rng.uniform(0.95, 1), rng.uniform(0.9, 1)])
    parts = [
        quad(
            [(x, 0, z) for x, _, z in floor],
            FLOOR,
            np.full(3, 0.5),
            uv=np.array([(x / PERIOD, z / PERIOD) for x, _, z in floor], np.float32),
            image=_bytes(surfaces.floor(rng, plan.room_type)),
            roughness=gloss,
        ),
        quad([(x, height, z) for x, _, z in floor], CEILING, white),
    ]
    paper = _bytes(surfaces.wall(rng, plan.room_type))
    accent = _bytes(surfaces.wall(rng, plan.room_type)) if rng.random() < 0.25 else paper
    for wall in range(4):
        parts.append(_wall(plan, wall, accent if wall == 0 else paper))
    return parts


def _bytes(picture: Points) -> Points:
    return (picture * 255).round().astype(np.uint8)


def _wall(plan: Plan, wall: int, image: Points) -> Part:
    """One wall: the rectangles that its holes leave over."""
    height = plan.size[1]
    vertices: list[tuple[float, float, float]] = []
    faces: list[tuple[int, int, int]] = []
    uv: list[tuple[float, float]] = []
    holes = [opening.hole for opening in plan.openings if opening.wall == wall]
    for left, right, bottom, top in _rectangles(plan.length(wall), height, holes):
        start = len(vertices)
        for along, up in ((left, bottom), (right, bottom), (right, top), (left, top)):
            x, z = plan.world(wall, along, 0.0)
            vertices.append((x, up, z))
            uv.append((along / PERIOD, up / height))
        faces += [(start, start + 1, start + 2), (start, start + 2, start + 3)]
    return Part(
        np.array(vertices, np.float32), np.array(faces, np.uint32), np.full(3, 0.7), WALL,
        uv=np.array(uv, np.float32), image=image,
    )  # fmt: skip


def _rectangles(
    length: float, height: float, holes: list[tuple[float, float, float, float]]
) -> Iterator[tuple[float, float, float, float]]:
    """Cut a wall into the cells of a grid along the edges of its holes and leave the holes out."""
    across = sorted({0.0, length, *(edge for hole in holes for edge in hole[:2])})
    up = sorted({0.0, height, *(edge for hole in holes for edge in hole[2:])})
    for left, right in pairwise(across):
        for bottom, top in pairwise(up):
            x, y = (left + right) / 2, (bottom + top) / 2
            if not any(hole[0] < x < hole[1] and hole[2] < y < hole[3] for hole in holes):
                yield left, right, bottom, top


def _opening(plan: Plan, opening: Opening, furniture: Path, mood: Mood, rng: np.random.Generator) -> list[Part]:
    """A door or window in its hole, the sides of the hole, and the sky (or the dark hall) behind it."""
    model, wall = opening.model, opening.wall
    left, right, bottom, top = opening.hole
    back = -model.wall_depth - 0.02

    def at(along: float, up: float, out: float) -> tuple[float, float, float]:
        x, z = plan.world(wall, along, out)
        return (x, up, z)

    ring = ((left, bottom), (right, bottom), (right, top), (left, top))
    parts = [
        quad([at(*a, 0.0), at(*b, 0.0), at(*b, back), at(*a, back)], WALL, np.full(3, 0.85))
        for a, b in zip(ring, ring[1:] + ring[:1], strict=True)
    ]
    light = surfaces.sky(rng, mood.night) * mood.sky if model.role == "window" else np.full(3, 0.12)
    corner_uv = np.array([(0, 0), (1, 0), (1, 1), (0, 1)], np.float32)
    # The sky looks into the room: its front is the side on which the corners run anticlockwise.
    corners = [at(*corner, back) for corner in ring]
    parts.append(quad(corners, OPENING, np.full(3, 0.2), uv=corner_uv, emission=light))
    x, z = plan.world(wall, opening.along, model.size[2] / 2 - model.wall_depth)
    tint = np.full(3, rng.uniform(0.75, 1.1))
    for part in load(furniture, model):
        placed = _dressed(part, _moved(part, wall, (x, opening.bottom, z)), tint)
        parts.append(replace(placed, hidden=part.opacity < 1))
    return parts


def _panels(plan: Plan, mood: Mood, rng: np.random.Generator) -> list[Part]:
    """Flat lamps on the ceiling; they carry most of the lamp light."""
    if not mood.lamp.any():
        return []
    width, height, depth = plan.size
    high = [item.box for item in plan.placed if item.box[4] > height - 0.25]
    parts: list[Part] = []
    for _ in range(12):
        half = rng.uniform(0.14, 0.34, 2)
        x = rng.uniform(0.2, 0.8) * (width - 1) + 0.5
        z = rng.uniform(0.2, 0.8) * (depth - 1) + 0.5
        covered = any(
            box[0] < x + half[0] and x - half[0] < box[3] and box[2] < z + half[1] and z - half[1] < box[5]
            for box in high
        )
        if not covered:
            ring = ((-1, -1), (1, -1), (1, 1), (-1, 1))
            corners: list[tuple[float, ...]] = [(x + a * half[0], height - 0.02, z + b * half[1]) for a, b in ring]
            emission = mood.lamp * 0.3 / (4 * half[0] * half[1]) ** 0.8
            parts.append(quad(corners, LAMP, np.full(3, 0.8), emission=emission))
        if len(parts) == 2 or (parts and rng.random() < 0.5):
            break
    return parts
