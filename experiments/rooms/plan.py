"""The plan of one room: what stands where, without two things in one place."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from experiments.rooms.catalog import Model

ROOM_TYPES = ("living_room", "bedroom", "kitchen", "office", "bathroom")
SLACK = (0.01, 0.03, 0.01)
STICKS_OUT = 0.01


@dataclass(frozen=True)
class Placed:
    """A model at its place: the middle of its base (metres), and the quarter turns its front has made."""

    model: Model
    x: float
    y: float
    z: float
    turn: int

    @property
    def footprint(self) -> tuple[float, float]:
        """Width and depth along the room's axes."""
        width, _, depth = self.model.size
        return (width, depth) if self.turn % 2 == 0 else (depth, width)

    @property
    def box(self) -> tuple[float, float, float, float, float, float]:
        """The two opposite corners: x, y, z of the low one, x, y, z of the high one."""
        width, depth = self.footprint
        low = (self.x - width / 2, self.y, self.z - depth / 2)
        return (*low, self.x + width / 2, self.y + self.model.size[1], self.z + depth / 2)


@dataclass(frozen=True)
class Opening:
    """A door or window in a wall: its middle along the wall, and its hole's bottom, in metres."""

    model: Model
    wall: int
    along: float
    bottom: float

    @property
    def hole(self) -> tuple[float, float, float, float]:
        """Left, right, bottom and top of the hole, metres along and up the wall."""
        half = self.model.size[0] / 2 - 0.01
        return (self.along - half, self.along + half, self.bottom, self.bottom + self.model.size[1] - 0.01)


Box = tuple[float, float, float, float, float, float]


@dataclass
class Plan:
    """A room that is being furnished; walls 0 to 3 look to +z, +x, -z and -x.

    Attributes:
        room_type: One of :data:`ROOM_TYPES`.
        size: Width (x), height (y) and depth (z), metres.
        models: What may be used, by role.
        rng: Source of every choice.
        placed: Furniture so far.
        openings: Doors and windows so far.
        kept_free: Boxes nothing may enter (before doors and windows).
    """

    room_type: str
    size: tuple[float, float, float]
    models: dict[str, list[Model]]
    rng: np.random.Generator
    placed: list[Placed] = field(default_factory=list)
    openings: list[Opening] = field(default_factory=list)
    kept_free: list[Box] = field(default_factory=list)

    def chance(self, probability: float) -> bool:
        """Decide by lot."""
        return bool(self.rng.random() < probability)

    def pick(self, *roles: str) -> Model | None:
        """Draw a model of these roles, or None where there is none."""
        pool = [model for role in roles for model in self.models.get(role, [])]
        return pool[int(self.rng.integers(len(pool)))] if pool else None

    def length(self, wall: int) -> float:
        """Length of a wall in metres."""
        return self.size[0] if wall % 2 == 0 else self.size[2]

    def world(self, wall: int, along: float, out: float) -> tuple[float, float]:
        """Give x and z of the point that lies so far along a wall and so far out of it."""
        width, _, depth = self.size
        return {
            0: (along, out),
            1: (out, depth - along),
            2: (width - along, depth - out),
            3: (width - out, along),
        }[wall]

    def fits(self, item: Placed, inside: Placed | None = None) -> bool:
        """Tell whether an item lies in the room and in nothing else (but the thing it stands on)."""
        x0, y0, z0, x1, y1, z1 = item.box
        width, height, depth = self.size
        if min(x0, z0, y0) < -1e-6 or x1 > width + 1e-6 or z1 > depth + 1e-6 or y1 > height + 1e-6:
            return False
        others: list[Box] = [other.box for other in self.placed if other is not inside] + self.kept_free
        return not any(_overlap(item.box, other) for other in others)

    def put(self, model: Model | None, x: float, z: float, turn: int, y: float | None = None) -> Placed | None:
        """Place a model with its middle at x, z if there is room for it; its height is the catalog's."""
        if model is None:
            return None
        y = min(model.elevation, self.size[1] - model.size[1]) if y is None else y
        item = Placed(model, x, max(y, 0.0), z, turn % 4)
        if not self.fits(item):
            return None
        self.placed.append(item)
        return item

    def against_wall(
        self, model: Model | None, walls: Sequence[int] = (0, 0, 1, 1, 2, 3), y: float | None = None
    ) -> tuple[Placed, int, float] | None:
        """Place a model with its back to a wall; gives it, the wall and how far along it stands."""
        for _ in range(14 if model is not None else 0):
            assert model is not None
            wall = int(self.rng.choice(walls))
            free = self.length(wall) - model.size[0]
            if free < 0:
                continue
            corner = self.rng.random()
            share = 0.0 if corner < 0.15 else 1.0 if corner > 0.85 else self.rng.random()
            along = model.size[0] / 2 + share * free
            item = self.put(model, *self.world(wall, along, model.size[2] / 2 + STICKS_OUT), wall, y)
            if item is not None:
                return item, wall, along
        return None

    def at_wall(self, model: Model | None, wall: int, along: float, y: float | None = None) -> Placed | None:
        """Place a model with its back to a wall, so far along it."""
        if model is None:
            return None
        return self.put(model, *self.world(wall, along, model.size[2] / 2 + STICKS_OUT), wall, y)

    def somewhere(self, model: Model | None, tries: int = 14) -> Placed | None:
        """Place a model anywhere on the floor, turned any way."""
        for _ in range(tries if model is not None else 0):
            assert model is not None
            turn = int(self.rng.integers(4))
            x, z = self.rng.uniform(0.1, 0.9) * self.size[0], self.rng.uniform(0.1, 0.9) * self.size[2]
            item = self.put(model, x, z, turn, 0.0)
            if item is not None:
                return item
        return None

    def on_top(self, base: Placed | None, model: Model | None, tries: int = 8) -> Placed | None:
        """Stand a model on another thing, facing the same way."""
        if base is None or model is None or base.model.top <= 0:
            return None
        width, depth = base.footprint
        for _ in range(tries):
            turn = base.turn
            own = (model.size[0], model.size[2]) if turn % 2 == 0 else (model.size[2], model.size[0])
            room = (width - own[0], depth - own[1])
            if min(room) < -0.06:
                return None
            x = base.x + self.rng.uniform(-0.5, 0.5) * max(room[0] - 0.04, 0)
            z = base.z + self.rng.uniform(-0.5, 0.5) * max(room[1] - 0.04, 0)
            item = Placed(model, x, base.y + base.model.top + 0.002, z, turn)
            if self.fits(item, inside=base):
                self.placed.append(item)
                return item
        return None

    def open_wall(self, model: Model | None, walls: Sequence[int] = (0, 1, 2, 3)) -> Opening | None:
        """Set a door or window into a wall and keep the floor before a door free."""
        for _ in range(10 if model is not None else 0):
            assert model is not None
            wall = int(self.rng.choice(walls))
            free = self.length(wall) - model.size[0] - 0.3
            if free < 0:
                continue
            along = 0.15 + model.size[0] / 2 + self.rng.random() * free
            door = model.role == "door" or model.elevation < 0.2
            bottom = 0.0 if model.role == "door" else model.elevation
            if bottom + model.size[1] > self.size[1] - 0.08:
                continue
            opening = Opening(model, wall, along, bottom)
            box = self._clearance(opening, 0.55 if door else 0.1)
            if not any(_overlap(box, other) for other in self.kept_free):
                self.openings.append(opening)
                self.kept_free.append(box)
                return opening
        return None

    def _clearance(self, opening: Opening, reach: float) -> Box:
        left, right, bottom, top = opening.hole
        a, b = self.world(opening.wall, left, 0.0), self.world(opening.wall, right, reach)
        return (min(a[0], b[0]), bottom, min(a[1], b[1]), max(a[0], b[0]), top, max(a[1], b[1]))


def _overlap(a: Box, b: Box) -> bool:
    """Tell whether two boxes share space; 3 cm of height do not count, so that furniture stands on rugs."""
    return all(a[i] < b[i + 3] - slack and b[i] < a[i + 3] - slack for i, slack in enumerate(SLACK))
