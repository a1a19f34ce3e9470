"""The picture of a view: light traced by Mitsuba, cleaned by Open Image Denoise and then developed."""

import os
from typing import Any

os.environ.setdefault("OIDN_NUM_THREADS", "1")

import drjit as dr
import mitsuba as mi
import numpy as np
import pyoidn
from numpy.typing import NDArray

from experiments.rooms.models import Part
from experiments.rooms.view import Camera, Eye

mi.set_variant("scalar_rgb")
mi.set_log_level(mi.LogLevel.Error)

Array = NDArray[Any]
COARSE = 0.26
EXTRA = 3


def linear(srgb: Array) -> Array:
    """Turn sRGB values in [0, 1] into linear light."""
    srgb = np.asarray(srgb, float)
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def encoded(light: Array) -> Array:
    """Turn linear light in [0, 1] into sRGB values.

    >>> float(encoded(linear(0.5)))
    0.5
    """
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * np.maximum(light, 1e-9) ** (1 / 2.4) - 0.055)


def render(eye: Eye, camera: Camera, height: int, width: int, samples: int, seed: int) -> Array:
    """Trace a picture: [height, width, 3] sRGB, uint8, without visible grain.

    Args:
        eye: The room.
        camera: The view.
        height: Rows.
        width: Columns.
        samples: Light paths for each pixel.
        seed: The same seed gives the same picture.
    """
    dr.set_thread_count(1)
    scene = mi.load_dict(_scene(eye.parts, camera, height, width, samples))
    guides = eye.features(camera, height, width)
    light = _trace(scene, seed)
    clean = _denoise(light, guides)
    if _grain(light, clean) > COARSE:  # light that only finds its way by chance: take more of it
        more = [_trace(scene, seed + 1 + i) for i in range(EXTRA)]
        clean = _denoise(np.mean([light, *more], 0), guides)
    return develop(clean, float(np.random.default_rng(seed).uniform(0.85, 1.2)))


def _trace(scene: Any, seed: int) -> Array:
    light: Any = mi.render(scene, seed=seed)  # type: ignore[arg-type]
    return np.nan_to_num(np.array(light, np.float32), posinf=0.0).clip(0)


def _denoise(light: Array, guides: tuple[Array, Array]) -> Array:
    albedo, normal = linear(guides[0]).astype(np.float32), guides[1].astype(np.float32)
    clean: Array = pyoidn.denoise(np.ascontiguousarray(light), albedo=albedo, normal=normal, hdr=True)
    return clean


def _grain(light: Array, clean: Array) -> float:
    """The median relative difference that the denoiser made."""
    light, clean = light.mean(2), clean.mean(2)
    return float(np.median(np.abs(light - clean) / (clean + 0.02)))


def develop(light: Array, exposure: float) -> Array:
    """Expose linear light to a middle grey, roll the highlights off and write sRGB bytes."""
    luminance = light @ np.array([0.2126, 0.7152, 0.0722])
    key = np.exp(np.log(luminance + 1e-3).mean())
    x = light * (0.3 * exposure / key)
    white = 4.0
    x = x * (1 + x / white**2) / (1 + x * 0.6)
    return (encoded(x.clip(0, 1)) * 255).round().astype(np.uint8)


def _scene(parts: list[Part], camera: Camera, height: int, width: int, samples: int) -> dict[str, Any]:
    look = mi.ScalarTransform4f().look_at(origin=camera.origin.tolist(), target=camera.target.tolist(), up=[0, 1, 0])
    scene: dict[str, Any] = {
        "type": "scene",
        "integrator": {"type": "path", "max_depth": 6, "rr_depth": 4},
        "sensor": {
            "type": "perspective",
            "fov": camera.fov,
            "fov_axis": "x",
            "near_clip": 0.01,
            "to_world": look,
            "sampler": {"type": "independent", "sample_count": samples},
            "film": {
                "type": "hdrfilm", "width": width, "height": height, "rfilter": {"type": "box"},
                "pixel_format": "rgb",
            },
        },
    }  # fmt: skip
    plain = [part for part in parts if _is_plain(part)]
    if plain:
        scene["plain"] = _merged(plain)
    for i, part in enumerate(parts):
        if not part.hidden and not _is_plain(part):
            scene[f"part{i}"] = _shape(part)
    return scene


def _is_plain(part: Part) -> bool:
    special = part.image is not None or part.emission is not None or part.roughness is not None
    return not (special or part.hidden or part.opacity < 1)


def _merged(parts: list[Part]) -> Any:
    """All matt, plain parts as one mesh with a colour per face: far fewer shapes to set up."""
    offsets = np.cumsum([0] + [len(part.vertices) for part in parts[:-1]])
    vertices = np.concatenate([part.vertices for part in parts])
    faces = np.concatenate([part.faces + offset for part, offset in zip(parts, offsets, strict=True)])
    colours = [np.tile(linear(part.colour).clip(0.02, 0.9), (len(part.faces), 1)) for part in parts]
    bsdf = _two_sided({"type": "diffuse", "reflectance": {"type": "mesh_attribute", "name": "face_color"}})
    mesh = _mesh(vertices, faces, None, bsdf, None)
    mesh.add_attribute("face_color", 3, np.concatenate(colours).astype(np.float32).ravel())
    return mesh


def _two_sided(bsdf: dict[str, Any]) -> dict[str, Any]:
    return {"type": "twosided", "inner": bsdf}


def _shape(part: Part) -> Any:
    reflectance: dict[str, Any] = {"type": "rgb", "value": linear(part.colour).clip(0.02, 0.9).tolist()}
    if part.image is not None:
        reflectance = _bitmap(linear(part.image / 255.0).clip(0.01, 0.92))
    bsdf = _two_sided({"type": "diffuse", "reflectance": reflectance})
    if part.roughness is not None:
        bsdf = _two_sided({"type": "roughplastic", "diffuse_reflectance": reflectance, "alpha": part.roughness})
    if part.opacity < 1:
        bsdf = {"type": "mask", "opacity": float(part.opacity), "inner": bsdf}
    emitter = None
    if part.emission is not None:
        flat = part.emission.ndim == 1
        light = {"type": "rgb", "value": part.emission.tolist()} if flat else _bitmap(part.emission)
        emitter = {"type": "area", "radiance": light}
    return _mesh(part.vertices, part.faces, part.uv, bsdf, emitter)


def _bitmap(values: Array) -> dict[str, Any]:
    return {"type": "bitmap", "bitmap": mi.Bitmap(values.astype(np.float32)), "raw": True}


def _mesh(vertices: Array, faces: Array, uv: Array | None, bsdf: dict[str, Any], emitter: Any) -> Any:
    properties = mi.Properties()
    properties["bsdf"] = mi.load_dict(bsdf)
    if emitter is not None:
        properties["emitter"] = mi.load_dict(emitter)
    mesh = mi.Mesh("part", len(vertices), len(faces), has_vertex_texcoords=uv is not None, props=properties)
    values = mi.traverse(mesh)
    values["vertex_positions"] = np.ascontiguousarray(vertices, np.float32).ravel()
    values["faces"] = np.ascontiguousarray(faces, np.uint32).ravel()
    if uv is not None:
        # Mitsuba counts rows from the top, Wavefront files from the bottom.
        values["vertex_texcoords"] = np.ascontiguousarray(uv * (1, -1) + (0, 1), np.float32).ravel()
    values.update()
    return mesh
