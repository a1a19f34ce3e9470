"""A model's geometry: triangles in metres that stand on the origin and face +z, coloured and textured."""

import io
import posixpath
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import trimesh
from numpy.typing import NDArray

from experiments.rooms.catalog import Model

TEXTURE_SIDE = 128
THINNEST_GLASS = 0.3
FARTHEST_UV = 1000


@dataclass(eq=False)
class Part:
    """Triangles of one material.

    Attributes:
        vertices: [V, 3], metres; y is up.
        faces: [F, 3], indices into the vertices.
        colour: sRGB in [0, 1], [3]; used where there is no image.
        label: Index of the class.
        uv: [V, 2] texture coordinates, or None.
        image: [H, W, 3] sRGB, uint8, or None.
        opacity: Share of the light that is not let through.
        emission: Radiance, [3], or an [H, W, 3] picture of it (needs ``uv``), or None.
        roughness: Of a glossy coat, or None for a matt surface.
        hidden: Seen by the labels alone (a pane of glass before an open sky).
    """

    vertices: NDArray[Any]
    faces: NDArray[Any]
    colour: NDArray[Any]
    label: int = 0
    uv: NDArray[Any] | None = None
    image: NDArray[Any] | None = None
    opacity: float = 1.0
    emission: NDArray[Any] | None = None
    roughness: float | None = None
    hidden: bool = False


class _Archive(trimesh.resolvers.Resolver):
    """Lets trimesh read materials and textures out of a furniture archive."""

    def __init__(self, archive: zipfile.ZipFile, base: str):
        self.archive, self.base = archive, base

    def get(self, name: str) -> bytes:
        return self.archive.read(posixpath.join(self.base, name.strip().removeprefix("./")))

    def namespaced(self, namespace: str) -> "_Archive":
        return _Archive(self.archive, posixpath.join(self.base, namespace))

    def write(self, name: str, data: bytes) -> None:
        raise OSError("furniture archives are only read")

    def keys(self) -> list[str]:
        return []


@cache
def _archive(path: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


@cache
def load(furniture: Path, model: Model) -> tuple[Part, ...]:
    """Read the parts of a model; its base is centred on the origin and its size is the catalog's.

    Args:
        furniture: Folder of the archives.
        model: Which model; the result is kept for the next call.
    """
    archive = _archive(furniture / f"{model.library}.sh3f")
    scene: Any = trimesh.load(
        io.BytesIO(archive.read(model.path)),
        file_type="obj",
        resolver=_Archive(archive, posixpath.dirname(model.path)),
        process=False,
        group_material=True,
    )
    meshes = list(scene.geometry.values()) if isinstance(scene, trimesh.Scene) else [scene]
    parts = [_part(mesh, model) for mesh in meshes if len(mesh.faces)]
    corners = np.concatenate([part.vertices for part in parts])
    low, high = corners.min(0), corners.max(0)
    scale = np.array(model.size) / np.maximum(high - low, 1e-6)
    origin = np.array([(low[0] + high[0]) / 2, low[1], (low[2] + high[2]) / 2])
    for part in parts:
        part.vertices = ((part.vertices - origin) * scale).astype(np.float32)
    return tuple(part for part in parts if part.opacity > 0)


def _part(mesh: Any, model: Model) -> Part:
    material, uv = getattr(mesh.visual, "material", None), getattr(mesh.visual, "uv", None)
    diffuse = getattr(material, "diffuse", None)
    colour = np.full(3, 0.6) if diffuse is None else np.asarray(diffuse[:3], float) / 255
    picture = getattr(material, "image", None)
    opacity, image = _opacity(material), None
    if picture is not None and uv is not None:
        side = (min(picture.width, TEXTURE_SIDE), min(picture.height, TEXTURE_SIDE))
        pixels = np.array(picture.convert("RGBA").resize(side))
        image = np.ascontiguousarray(pixels[..., :3])
        if (pixels[..., 3] < 128).mean() > 0.5:  # a decal: next to nothing of it is there
            opacity = 0.0
    rotation = np.array(model.rotation).reshape(3, 3)
    return Part(
        vertices=np.asarray(mesh.vertices, float) @ rotation.T,
        faces=np.asarray(mesh.faces, np.uint32),
        colour=colour,
        label=model.label,
        uv=None if image is None else _sane(np.asarray(uv, np.float32)),
        image=image,
        opacity=opacity,
    )


def _sane(uv: NDArray[Any]) -> NDArray[Any]:
    """Texture coordinates without the few that some files have at infinity (they would make light)."""
    return np.where(np.abs(uv) < FARTHEST_UV, uv, 0).astype(np.float32)


def _opacity(material: Any) -> float:
    """The ``d`` (or 1 - ``Tr``) of a material, but never so clear that a labelled surface is invisible."""
    text = getattr(material, "kwargs", {}).get("d", 1.0)
    value = float(text[0] if isinstance(text, list) else text)
    return 1.0 if value > 0.95 else max(value, THINNEST_GLASS)
