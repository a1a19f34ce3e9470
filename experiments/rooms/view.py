"""A camera in a room, and the exact labels that it sees: one ray through the centre of each pixel."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import trimesh
from numpy.typing import NDArray

from experiments.rooms.catalog import CLASSES
from experiments.rooms.labels import IGNORE, Labels
from experiments.rooms.models import Part
from experiments.rooms.plan import Plan

KEY_CLASS = {
    "living_room": ("sofa",),
    "bedroom": ("bed",),
    "kitchen": ("appliance",),
    "office": ("screen", "table"),
    "bathroom": ("bathroom",),
}
RARE = ("bed", "sofa", "lamp", "plant", "screen", "bathroom", "appliance", "door_window")
Array = NDArray[Any]


@dataclass(frozen=True)
class Camera:
    """Where the camera stands, what it looks at (metres) and its horizontal angle of view in degrees."""

    origin: Array
    target: Array
    fov: float

    def axes(self) -> tuple[Array, Array, Array]:
        """Right, up and forward unit vectors."""
        forward = (self.target - self.origin) / np.linalg.norm(self.target - self.origin)
        right = np.cross(forward, [0.0, 1.0, 0.0])
        right /= np.linalg.norm(right)
        return right, np.cross(right, forward), forward

    def rays(self, height: int, width: int) -> Array:
        """Unit directions through the pixel centres, [height * width, 3], row by row from the top."""
        right, up, forward = self.axes()
        reach = np.tan(np.radians(self.fov) / 2)
        x = ((np.arange(width) + 0.5) / width * 2 - 1) * reach
        y = (1 - (np.arange(height) + 0.5) / height * 2) * reach * height / width
        directions = forward + x[None, :, None] * right + y[:, None, None] * up
        return (directions / np.linalg.norm(directions, axis=2, keepdims=True)).reshape(-1, 3)


class Eye:
    """Casts rays into a room."""

    def __init__(self, parts: list[Part]):
        self.parts = parts
        offsets = np.cumsum([0] + [len(part.vertices) for part in parts[:-1]])
        vertices = np.concatenate([part.vertices for part in parts])
        faces = np.concatenate([part.faces + offset for part, offset in zip(parts, offsets, strict=True)])
        self.classes = np.concatenate([np.full(len(part.faces), part.label, np.uint8) for part in parts])
        self.owner = np.repeat(np.arange(len(parts)), [len(part.faces) for part in parts])
        self.first = np.cumsum([0] + [len(part.faces) for part in parts[:-1]])
        self.mesh = trimesh.Trimesh(vertices, faces, process=False)

    def see(self, camera: Camera, height: int, width: int) -> Labels:
        """Give the labels of a picture of height x width pixels."""
        rays = camera.rays(height, width)
        hit, corners = self._hit(camera, rays)
        normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        size = np.linalg.norm(normal, axis=1, keepdims=True)
        known = (hit >= 0) & (size[:, 0] > 1e-12)
        normal = normal / np.maximum(size, 1e-12)
        slope = (normal * rays).sum(1)
        known &= np.abs(slope) > 1e-6
        normal = np.where((slope > 0)[:, None], -normal, normal)
        right, up, forward = camera.axes()
        distance = ((corners[:, 0] - camera.origin) * normal).sum(1) / np.where(known, -np.abs(slope), 1)
        depth = np.where(known, distance * (rays @ forward), 0)
        facing = np.stack([normal @ right, normal @ up, -(normal @ forward)], 1) * known[:, None]
        seg = np.where(known, self.classes[hit], IGNORE).astype(np.uint8)
        shape = (height, width)
        return Labels(seg.reshape(shape), facing.reshape(*shape, 3), depth.reshape(shape))

    def _hit(self, camera: Camera, rays: Array) -> tuple[Array, Array]:
        """The triangle that each ray meets first (-1 = none), and its corners."""
        hit = self.mesh.ray.intersects_first(np.repeat(camera.origin[None], len(rays), 0), rays)
        return hit, np.asarray(self.mesh.vertices)[np.asarray(self.mesh.faces)[hit]]

    def features(self, camera: Camera, height: int, width: int) -> tuple[Array, Array]:
        """Give what a denoiser is guided by, both [H, W, 3]: sRGB colour in [0, 1] and normals.

        Each pixel is the mean of four rays, so the guides are as smooth at edges as the picture.
        """
        labels = self.see(camera, 2 * height, 2 * width)
        rays = camera.rays(2 * height, 2 * width)
        hit, corners = self._hit(camera, rays)
        colours = np.stack([part.colour for part in self.parts])[self.owner[hit]]
        textured = {i for i in np.unique(self.owner[hit]) if self.parts[i].image is not None}
        for i in textured:
            mine = np.flatnonzero(self.owner[hit] == i)
            colours[mine] = self._texture(i, hit[mine], corners[mine], camera.origin, rays[mine])
        colours = colours.reshape(height, 2, width, 2, 3).mean((1, 3))
        return colours, labels.normal.reshape(height, 2, width, 2, 3).mean((1, 3))

    def _texture(self, index: int, hit: Array, corners: Array, origin: Array, rays: Array) -> Array:
        """Look a part's picture up where some rays meet it."""
        part = self.parts[index]
        assert part.image is not None and part.uv is not None
        a, b, c = corners.swapaxes(0, 1)
        normal = np.cross(b - a, c - a)
        area = np.maximum((normal * normal).sum(1), 1e-20)
        slope = (normal * rays).sum(1)
        reach = ((a - origin) * normal).sum(1) / np.where(np.abs(slope) < 1e-12, 1e-12, slope)
        point = origin + reach[:, None] * rays
        u = (np.cross(c - b, point - b) * normal).sum(1) / area
        v = (np.cross(a - c, point - c) * normal).sum(1) / area
        weight = np.stack([u, v, 1 - u - v], 1)[..., None]
        uv = (part.uv[part.faces[hit - self.first[index]]] * weight).sum(1) % 1
        rows, columns = part.image.shape[:2]
        y = np.minimum(((1 - uv[:, 1]) * rows).astype(int), rows - 1)
        x = np.minimum((uv[:, 0] * columns).astype(int), columns - 1)
        return part.image[y, x] / 255


def choose(plan: Plan, eye: Eye, rng: np.random.Generator, tries: int = 20) -> Camera:
    """Draw some cameras and keep the one that shows most: many classes, the room's key, not just walls."""
    best, best_score = None, -np.inf
    for _ in range(tries):
        camera = _draw(plan, rng)
        score = _score(eye.see(camera, 24, 32), plan.room_type) + rng.normal(0, 0.25)
        if score > best_score:
            best, best_score = camera, score
    assert best is not None
    return best


def _draw(plan: Plan, rng: np.random.Generator) -> Camera:
    width, _, depth = plan.size
    origin = np.array([width / 2, 1.5, depth / 2])
    for _ in range(20):
        origin = np.array([rng.uniform(0.08, 0.92) * width, rng.uniform(1.0, 1.9), rng.uniform(0.08, 0.92) * depth])
        if not any(_near(item.box, origin) for item in plan.placed):
            break
    items = plan.placed
    if items:
        keys = [CLASSES.index(name) for name in KEY_CLASS[plan.room_type]]
        weights = np.array([4.0 if item.model.label in keys else 1.0 for item in items])
        item = items[int(rng.choice(len(items), p=weights / weights.sum()))]
        target = np.array([item.x, item.y + item.model.size[1] / 2, item.z])
    else:
        target = np.array([width / 2, 1.0, depth / 2])
    target = target + rng.normal(0, 0.25, 3)
    flat = max(float(np.hypot(*(target - origin)[[0, 2]])), 0.3)
    target[1] = np.clip(target[1], origin[1] - 0.75 * flat, origin[1] + 0.2 * flat)
    return Camera(origin, target, float(rng.uniform(55, 78)))


def _near(box: tuple[float, ...], point: Array, margin: float = 0.25) -> bool:
    return all(box[i] - margin < point[i] < box[i + 3] + margin for i in range(3))


def _score(labels: Labels, room_type: str) -> float:
    share = np.bincount(labels.seg[labels.seg != IGNORE], minlength=len(CLASSES)) / labels.seg.size
    shell = share[:3].sum()
    seen = share > 0.006
    key = max(share[CLASSES.index(name)] for name in KEY_CLASS[room_type])
    close = (labels.depth < 0.7).mean()
    return float(
        0.35 * seen[3:].sum()
        + 0.3 * sum(seen[CLASSES.index(name)] for name in RARE)
        + 0.35 * seen[:3].sum()
        + 1.6 * min(key / 0.05, 1)
        - 4 * max(shell - 0.55, 0)
        - 4 * max(share[3:].max() - 0.4, 0)
        - 5 * close
    )
