"""What stands in a bedroom, a living room, a kitchen, an office and a bathroom."""

from collections.abc import Callable

import numpy as np

from experiments.rooms.catalog import Model
from experiments.rooms.plan import ROOM_TYPES, Placed, Plan

FLOOR_PLAN = {
    "living_room": ((3.4, 5.2), (3.2, 4.6)),
    "bedroom": ((2.9, 4.4), (2.9, 4.2)),
    "kitchen": ((2.8, 4.4), (2.6, 3.8)),
    "office": ((2.8, 4.8), (2.8, 4.2)),
    "bathroom": ((2.1, 3.2), (2.0, 3.0)),
}
ON_TABLE = {
    "living_room": ("decoration", "small_plant", "table_lamp"),
    "bedroom": ("decoration", "table_lamp", "small_plant"),
    "kitchen": ("kitchen_item", "counter_appliance", "small_plant"),
    "office": ("office_item", "computer", "table_lamp", "small_plant"),
    "bathroom": ("bath_item", "small_plant", "decoration"),
}
# Drawn by class, not by model: every room is offered some of these, whatever its type.
FILLERS = {
    "plant": 1.4, "small_plant": 0.4, "floor_lamp": 1.0, "wall_lamp": 0.8, "radiator": 1.0, "chair": 0.9,
    "stool": 0.5, "shelf": 0.8, "floor_piece": 1.2, "wall_piece": 0.4, "armchair": 0.4, "rug": 0.5,
    "wall_appliance": 0.15, "floor_appliance": 0.15, "dresser": 0.4,
}  # fmt: skip


def furnish(room_type: str, models: list[Model], rng: np.random.Generator) -> Plan:
    """Lay out one room.

    Args:
        room_type: One of :data:`experiments.rooms.plan.ROOM_TYPES`.
        models: What may stand in it.
        rng: Source of every choice: the same state gives the same room.

    Raises:
        ValueError: The type is unknown.
    """
    if room_type not in ROOM_TYPES:
        raise ValueError(f"unknown room type {room_type!r}; known: {', '.join(ROOM_TYPES)}")
    width, depth = (rng.uniform(*side) for side in FLOOR_PLAN[room_type])
    by_role: dict[str, list[Model]] = {}
    for model in models:
        by_role.setdefault(model.role, []).append(model)
    plan = Plan(room_type, (width, rng.uniform(2.4, 2.8), depth), by_role, rng)
    for role, count in (("door", rng.integers(1, 3)), ("window", rng.integers(0, 3))):
        for _ in range(int(count)):
            plan.open_wall(plan.pick(role))
    _RECIPES[room_type](plan)
    _hang_lamps(plan)
    _fill(plan)
    return plan


def _some(plan: Plan, base: Placed | None, roles: tuple[str, ...], most: int) -> None:
    """Stand up to ``most`` things of the given roles on something."""
    for _ in range(int(plan.rng.integers(1, most + 1))):
        plan.on_top(base, plan.pick(str(plan.rng.choice(roles))))


def _beside(plan: Plan, base: Placed, wall: int, along: float, model: Model | None, side: int) -> Placed | None:
    """Stand a model next to another one at the same wall."""
    if model is None:
        return None
    return plan.at_wall(model, wall, along + side * (base.model.size[0] + model.size[0] + 0.1) / 2)


def _before(
    plan: Plan, base: Placed, model: Model | None, gap: float, facing: bool, shift: float = 0.0
) -> Placed | None:
    """Stand a model in front of another one, facing it or looking the same way."""
    if model is None:
        return None
    out = base.model.size[2] / 2 + gap + model.size[2] / 2
    dx, dz = ((0, 1), (1, 0), (0, -1), (-1, 0))[base.turn]
    x, z = base.x + dx * out + dz * shift, base.z + dz * out - dx * shift
    return plan.put(model, x, z, base.turn + (2 if facing else 0), 0.0)


def _table_with_chairs(plan: Plan, table: Placed | None, *roles: str) -> None:
    """Seat up to two chairs at each side of a table."""
    if table is None:
        return
    chair = plan.pick(*roles)
    if chair is None:
        return
    for turn in range(4):
        long = table.footprint[0] if turn % 2 == 0 else table.footprint[1]
        across = table.footprint[1] if turn % 2 == 0 else table.footprint[0]
        dx, dz = ((0, 1), (1, 0), (0, -1), (-1, 0))[turn]
        shifts = (0.0,) if long < 2.2 * chair.size[0] else (-long / 4, long / 4)
        for shift in shifts:
            if plan.chance(0.8):
                out = across / 2 + chair.size[2] / 2 + plan.rng.uniform(0.03, 0.15)
                plan.put(chair, table.x + dx * out + dz * shift, table.z + dz * out + dx * shift, turn + 2, 0.0)


def _living_room(plan: Plan) -> None:
    sofa = plan.against_wall(plan.pick("sofa"), (0, 1)) or plan.against_wall(plan.pick("sofa"), (0, 1, 2, 3))
    opposite = (2, 3)
    if sofa is not None:
        item, wall, along = sofa
        opposite = ((wall + 2) % 4, (wall + 1) % 4)
        coffee = _before(plan, item, plan.pick("coffee_table"), plan.rng.uniform(0.25, 0.5), facing=False)
        _some(plan, coffee, ("decoration", "small_plant", "decoration"), 2)
        for side in (-1, 1):
            beside = plan.pick("bedside", "floor_lamp", "plant", "armchair")
            end = _beside(plan, item, wall, along, beside, side)
            if end is not None and end.model.role == "bedside":
                plan.on_top(end, plan.pick("table_lamp", "small_plant"))
    stand = plan.against_wall(plan.pick("tv_stand", "dresser"), (*opposite, 0, 1))
    if stand is not None and stand[0].model.top < 1.2:
        plan.on_top(stand[0], plan.pick("tv"))
        _some(plan, stand[0], ON_TABLE["living_room"], 2)
    else:
        _wall_tv(plan)
    for _ in range(int(plan.rng.integers(1, 3))):
        shelf = plan.against_wall(plan.pick("shelf", "dresser", "wall_piece"), (0, 1, 2, 3))
        if shelf is not None and shelf[0].model.top < 1.3:
            _some(plan, shelf[0], ON_TABLE["living_room"], 2)
    if plan.chance(0.6):
        plan.somewhere(plan.pick("armchair"))
    if plan.chance(0.35):
        table = plan.somewhere(plan.pick("table"))
        _table_with_chairs(plan, table, "chair")
        _some(plan, table, ("decoration", "kitchen_item", "small_plant"), 2)


def _wall_tv(plan: Plan) -> None:
    model = plan.pick("tv")
    if model is not None and model.size[2] < 0.2:
        plan.against_wall(model, y=1.0)


def _bedroom(plan: Plan) -> None:
    bed = plan.against_wall(plan.pick("bed"), (0, 0, 1, 1, 2))
    if bed is None:
        bed = plan.against_wall(min(plan.models["bed"], key=lambda model: model.size[0] * model.size[2]), (0, 1, 2, 3))
    if bed is not None:
        item, wall, along = bed
        for side in (-1, 1):
            stand = _beside(plan, item, wall, along, plan.pick("bedside"), side) if plan.chance(0.8) else None
            plan.on_top(stand, plan.pick("table_lamp", "table_lamp", "decoration"))
    plan.against_wall(plan.pick("wardrobe"), (0, 1, 2, 3))
    if plan.chance(0.7):
        dresser = plan.against_wall(plan.pick("dresser", "tv_stand", "shelf"), (0, 1, 2, 3))
        if dresser is not None and dresser[0].model.top < 1.3:
            plan.on_top(dresser[0], plan.pick("tv")) if plan.chance(0.4) else None
            _some(plan, dresser[0], ON_TABLE["bedroom"], 2)
    if plan.chance(0.15):
        plan.against_wall(plan.pick("sofa"), (0, 1, 2, 3))
    if plan.chance(0.3):
        _work_place(plan, (0, 1, 2, 3))
    if plan.chance(0.4):
        plan.somewhere(plan.pick("armchair", "chair"))


def _kitchen(plan: Plan) -> None:
    for wall in (0, 1) if plan.chance(0.6) else (int(plan.rng.integers(2)),):
        _counter(plan, wall)
    if plan.chance(0.75):
        table = plan.somewhere(plan.pick("table"), 24)
        _table_with_chairs(plan, table, "chair", "stool")
        _some(plan, table, ON_TABLE["kitchen"], 3)
    if plan.chance(0.5):
        plan.against_wall(plan.pick("fridge", "stove", "washer"), (0, 1, 2, 3))
    if plan.chance(0.4):
        plan.against_wall(plan.pick("shelf", "kitchen_tall"), (2, 3))


def _counter(plan: Plan, wall: int) -> None:
    """A row of kitchen units along a wall, with cupboards and a hood above and things on top."""
    row = ["fridge", "kitchen_base", "stove", "kitchen_base", "kitchen_base", "washer", "kitchen_tall"]
    row = [role for role in row if plan.chance(0.5 if role in ("washer", "kitchen_tall") else 0.85)]
    plan.rng.shuffle(row)
    along = plan.rng.uniform(0.0, 0.3)
    base = plan.pick("kitchen_base")
    for role in row:
        model = base if role == "kitchen_base" and plan.chance(0.6) else plan.pick(role)
        if model is None or along + model.size[0] > plan.length(wall):
            continue
        unit = plan.at_wall(model, wall, along + model.size[0] / 2)
        if unit is not None and model.size[1] < 1.3:
            upper = plan.pick("hood" if role == "stove" else "kitchen_wall")
            if upper is not None and upper.size[0] <= model.size[0] + 0.06 and plan.chance(0.75):
                plan.at_wall(upper, wall, along + model.size[0] / 2, max(upper.elevation, 1.45))
            if role != "stove":
                _some(plan, unit, ON_TABLE["kitchen"], 2)
        along += model.size[0] + 0.005


def _work_place(plan: Plan, walls: tuple[int, ...]) -> None:
    """A desk with a computer, a lamp, and a chair before it."""
    desk = plan.against_wall(plan.pick("desk"), walls)
    if desk is None:
        return
    plan.on_top(desk[0], plan.pick("computer"))
    if plan.chance(0.6):
        plan.on_top(desk[0], plan.pick("table_lamp"))
    _some(plan, desk[0], ("office_item", "small_plant", "computer"), 2)
    _before(plan, desk[0], plan.pick("office_chair"), plan.rng.uniform(0.02, 0.25), facing=True)


def _office(plan: Plan) -> None:
    for walls in ((0, 0, 1), (1, 2, 3))[: int(plan.rng.integers(1, 3))]:
        _work_place(plan, walls)
    if plan.chance(0.45):
        table = plan.somewhere(plan.pick("desk", "table"))
        _table_with_chairs(plan, table, "office_chair", "office_chair", "chair")
        _some(plan, table, ON_TABLE["office"], 3)
    for role in ("shelf", "filing", "wall_piece", "dresser"):
        if plan.chance(0.55):
            item = plan.against_wall(plan.pick(role), (0, 1, 2, 3))
            if item is not None and item[0].model.top < 1.3:
                _some(plan, item[0], ON_TABLE["office"], 2)
    if plan.chance(0.2):
        plan.against_wall(plan.pick("floor_appliance"))
    if plan.chance(0.2):
        plan.against_wall(plan.pick("sofa"), (1, 2, 3))


def _bathroom(plan: Plan) -> None:
    order = ["tub", "basin", "toilet"]
    plan.rng.shuffle(order)
    for role in order:
        plan.against_wall(plan.pick(role), (0, 0, 1, 1, 2))
    if plan.chance(0.5):
        plan.against_wall(plan.pick("basin", "urinal", "toilet"), (0, 1, 2, 3))
    if plan.chance(0.4):
        washer = plan.against_wall(plan.pick("washer"), (0, 1, 2, 3))
        _some(plan, washer[0], ON_TABLE["bathroom"], 2) if washer is not None else None
    if plan.chance(0.45):
        shelf = plan.against_wall(plan.pick("shelf", "wardrobe", "filing"), (0, 1, 2, 3))
        _some(plan, shelf[0], ON_TABLE["bathroom"], 2) if shelf is not None else None
    for _ in range(2):
        plan.against_wall(plan.pick("bath_item"), (0, 1, 2, 3))
    if plan.chance(0.3):
        plan.somewhere(plan.pick("stool"))


_RECIPES: dict[str, Callable[[Plan], None]] = {
    "living_room": _living_room,
    "bedroom": _bedroom,
    "kitchen": _kitchen,
    "office": _office,
    "bathroom": _bathroom,
}


def _hang_lamps(plan: Plan) -> None:
    """Hang a lamp from the ceiling, at times two."""
    width, height, depth = plan.size
    for _ in range(int(plan.rng.choice([0, 1, 1, 1, 2]))):
        model = plan.pick("ceiling_lamp")
        if model is not None:
            x, z = plan.rng.uniform(0.25, 0.75) * width, plan.rng.uniform(0.25, 0.75) * depth
            plan.put(model, x, z, int(plan.rng.integers(4)), height - model.size[1])


def _fill(plan: Plan) -> None:
    """Offer the room some more things, drawn by role so that no class starves."""
    roles, weights = list(FILLERS), np.array(list(FILLERS.values()))
    count = 3 if plan.room_type == "bathroom" else 5
    for role in plan.rng.choice(roles, count, p=weights / weights.sum()):
        model = plan.pick(role)
        if model is None:
            continue
        if role in ("rug", "plant", "floor_piece", "chair", "stool", "armchair") and plan.chance(0.5):
            plan.somewhere(model)
        elif role == "small_plant":
            bases = [item for item in plan.placed if 0.3 < item.model.top < 1.3 and item.model.role != "stove"]
            plan.on_top(bases[int(plan.rng.integers(len(bases)))], model) if bases else None
        else:
            plan.against_wall(model, (0, 1, 0, 1, 2, 3))
