"""Walls, floors and ceilings: procedural pictures that repeat, and the quads that carry them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

SIDE = 256
Picture = NDArray[Any]


def colour(rng: np.random.Generator, low: float, high: float, saturation: float) -> Picture:
    """Draw an sRGB colour [3] of brightness in [low, high] and at most the given saturation."""
    hue, value, grey = rng.uniform(0, 1), rng.uniform(low, high), rng.uniform(0, saturation)
    ramp = np.clip(np.abs((hue * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return value * (1 - grey * (1 - ramp))


def _noise(rng: np.random.Generator, sigma: tuple[float, float], strength: float) -> Picture:
    """Smooth noise [SIDE, SIDE, 1] around 1 that repeats without a seam."""
    field = ndimage.gaussian_filter(rng.standard_normal((SIDE, SIDE)), sigma, mode="wrap")
    return 1 + strength * (field / field.std())[..., None]


def _cells(rows: int, columns: int, shift: float = 0.0) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Row number, column number and distance to the joint (in cells) of each pixel of a grid of bricks."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    row = np.floor(y * rows).astype(int)
    x = (x * columns + row * shift) % columns
    column = np.floor(x).astype(int)
    v, u = y * rows % 1, x % 1
    joint = np.minimum(np.minimum(u, 1 - u) * rows / columns, np.minimum(v, 1 - v))
    return row, column, joint


def planks(rng: np.random.Generator) -> Picture:
    """A wooden floor."""
    rows, columns = int(rng.integers(10, 18)), int(rng.integers(2, 4))
    row, column, joint = _cells(rows, columns, rng.uniform(0.3, 0.7))
    tone = rng.uniform(0.8, 1.15, (rows, columns))[row, column][..., None]
    base = rng.uniform(0.35, 0.85) * np.array([1, rng.uniform(0.7, 0.88), rng.uniform(0.42, 0.72)])
    return base * tone * _noise(rng, (0.8, 14), 0.05) * np.where(joint < 0.05, 0.6, 1)[..., None]


def tiles(rng: np.random.Generator, saturation: float = 0.5, count: int | None = None) -> Picture:
    """Tiles with joints, of one colour or as a chessboard."""
    n = count or int(rng.choice([4, 6, 8]))
    row, column, joint = _cells(n, n)
    one = colour(rng, 0.45, 0.95, saturation * rng.random())
    other = colour(rng, 0.15, 0.95, saturation) if rng.random() < 0.35 else one
    tone = rng.uniform(0.93, 1.05, (n, n))[row, column][..., None]
    chess = ((row + column) % 2 == 0)[..., None]
    joints = np.where(joint < 0.03, rng.uniform(0.5, 0.9), 1)[..., None]
    return np.where(chess, one, other) * tone * joints


def carpet(rng: np.random.Generator) -> Picture:
    """A carpet or cast floor: one colour with soft mottling."""
    return colour(rng, 0.3, 0.8, 0.5 * rng.random()) * _noise(rng, (1, 1), 0.05) * _noise(rng, (12, 12), 0.04)


def floor(rng: np.random.Generator, room_type: str) -> Picture:
    """Draw a floor that suits the room: [SIDE, SIDE, 3] sRGB in [0, 1], two metres wide."""
    wet = room_type in ("kitchen", "bathroom")
    makers = (planks, tiles, carpet)
    maker = makers[rng.choice(3, p=(0.25, 0.65, 0.1) if wet else (0.6, 0.12, 0.28))]
    return np.clip(maker(rng), 0.03, 0.95)


def wall(rng: np.random.Generator, room_type: str) -> Picture:
    """Draw a wall: [SIDE, SIDE, 3] sRGB in [0, 1], two metres wide and as high as the room, with skirting."""
    paint = colour(rng, 0.7, 0.97, 0.35 if rng.random() < 0.25 else 0.14)
    kind = rng.choice(["plain", "stripes", "two", "pattern", "tiles"], p=(0.4, 0.15, 0.15, 0.15, 0.15))
    if room_type == "bathroom" and rng.random() < 0.6:
        kind = "tiles"
    picture = np.tile(paint, (SIDE, SIDE, 1)) * _noise(rng, (24, 24), 0.012)
    height = np.linspace(1, 0, SIDE)[:, None, None]
    second = np.clip(paint * rng.uniform(0.6, 1.1) + rng.uniform(-0.12, 0.12, 3), 0.2, 0.95)
    if kind == "stripes":
        stripe = np.arange(SIDE) * int(rng.integers(4, 11)) // SIDE % 2 == 0
        picture = np.where(stripe[None, :, None], picture, np.clip(second, 0.45, 0.95))
    elif kind == "two":
        edge = rng.uniform(0.3, 0.5)
        picture = np.where(height < edge, second, picture)
        picture = np.where(np.abs(height - edge) < 0.012, 0.85, picture)
    elif kind == "pattern":
        y, x = np.mgrid[:SIDE, :SIDE] / SIDE * 2 * np.pi * int(rng.integers(4, 9))
        wave = (np.sin(x) * np.sin(y) > rng.uniform(0.2, 0.6))[..., None]
        picture = np.where(wave, np.clip(second, 0.4, 0.95), picture)
    elif kind == "tiles":
        top = rng.choice([1.0, rng.uniform(0.45, 0.8)])
        picture = np.where(height < top, tiles(rng, 0.4, int(rng.choice([8, 10, 14]))), picture)
    if kind != "tiles":
        picture = np.where(height < 0.035, rng.choice([0.9, 0.35]) * np.array([1, 0.97, 0.92]), picture)
    return np.clip(picture, 0.05, 0.97)


def sky(rng: np.random.Generator, night: bool) -> Picture:
    """Draw what is seen through a window, as radiance [SIDE, SIDE, 3] relative to the sky's."""
    height = np.linspace(1, 0, SIDE)[:, None, None]
    above = np.array([0.75, 0.9, 1.1]) * (0.8 + 0.4 * height)
    below = colour(rng, 0.2, 0.5, 0.6) * np.array([0.8, 1, 0.6])
    horizon = rng.uniform(0.15, 0.45) + 0.04 * np.sin(np.arange(SIDE) * 2 * np.pi / SIDE * rng.integers(1, 4))
    picture = np.where(height > horizon[None, :, None], above, below)
    return picture * (0.02 if night else 1.0)
