"""Writes tiny synthetic sets in the published layouts, with the encodings spelled out once more."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from cut.data.cityscapes import Cityscapes
from cut.data.nyuv2 import NYUv2
from cut.data.published import Published
from cut.data.taskonomy import Taskonomy

SIZE = (24, 32)
COUNTS = {"train": 20, "test": 3}
Arrays = dict[str, np.ndarray]


def random_scene(rng: np.random.Generator, size: tuple[int, int] = SIZE) -> Arrays:
    """A picture, unit normals (x right, y up, z to camera), metres, responses; the first row's labels are unknown."""
    height, width = size
    normal = rng.normal(size=(height, width, 3))
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    depth = rng.uniform(0.5, 9, (height, width))
    classes = rng.integers(0, 1000, (height, width))
    normal[0], depth[0], classes[0] = 0, 0, -1
    coarse = Image.fromarray(rng.integers(0, 256, (height // 6, width // 6, 3), dtype=np.uint8))
    return {
        "picture": np.array(coarse.resize((width, height), Image.Resampling.BILINEAR)),
        "classes": classes,
        "normal": normal,
        "depth": depth,
        "keypoint": rng.uniform(0, 1.5, (height, width)),
        "edge": rng.uniform(0, 1.5, (height, width)),
    }


def classes_of(scene: Arrays, count: int, unknown: int) -> np.ndarray:
    return np.where(scene["classes"] < 0, unknown, scene["classes"] % count)


def nyuv2(scene: Arrays) -> Arrays:
    x, y, z = np.moveaxis(scene["normal"], -1, 0)
    colours = ((np.stack([x, -z, y], -1) + 1) / 2 * 255).round().clip(0, 254)
    colours[(scene["normal"] == 0).all(-1)] = 255
    return {
        "img": scene["picture"],
        "seg": classes_of(scene, 40, 255).astype(np.uint8),
        "normal_mask": colours.astype(np.uint8),
        "depth": scene["depth"].astype(np.float32),
    }


def nyuv2_npy(scene: Arrays) -> Arrays:
    return {
        "image": scene["picture"] / 255,
        "label": classes_of(scene, 13, -1).astype(np.float32),
        "depth": scene["depth"].astype(np.float32)[..., None],
        "normal": scene["normal"].astype(np.float32),
    }


def cityscapes(scene: Arrays) -> Arrays:
    inverse = np.where(scene["depth"] > 0, 0.1 / scene["depth"].clip(1e-3), 0)
    return {
        "image": (scene["picture"] / 255).astype(np.float32),
        "depth": inverse.astype(np.float32)[..., None],
        **{f"label_{n}": classes_of(scene, n, -1).astype(np.int8) for n in (2, 7, 19)},
    }


def cityscapes_npy(scene: Arrays) -> Arrays:
    found = cityscapes(scene)
    return {"image": found["image"], "label": found["label_7"].astype(np.float64), "depth": found["depth"]}


def taskonomy(scene: Arrays) -> Arrays:
    return {
        "rgb": scene["picture"],
        "segment_semantic": (classes_of(scene, 17, -1) + 1).astype(np.uint8),
        "normal": ((scene["normal"] + 1) / 2 * 255).round().astype(np.uint8),
        "depth_zbuffer": np.where(scene["depth"] > 0, scene["depth"] * 512, 65535).round().astype(np.uint16),
        "keypoints2d": (scene["keypoint"] * 0.005 * 65536).astype(np.uint16),
        "edge_texture": (scene["edge"] * 0.08 * 65536).astype(np.uint16),
    }


Encoder = Callable[[Arrays], Arrays]
# Layout to its loader, encoding, index, the folders of train and test, and where a file lies.
LAYOUTS: dict[str, tuple[type[Published], Encoder, str | None, tuple[str, str], str]] = {
    "nyuv2": (NYUv2, nyuv2, "nyu_v2_3task.json", ("training", "testing"), "nyu_train_val/{folder}/{key}/{n:04d}.{ext}"),
    "nyuv2-npy": (NYUv2, nyuv2_npy, None, ("train", "val"), "{folder}/{key}/{n}.{ext}"),
    "cityscapes": (Cityscapes, cityscapes, "cityscape.json", ("train", "val"), "{folder}/{key}/{n}.{ext}"),
    "cityscapes-npy": (Cityscapes, cityscapes_npy, None, ("train", "val"), "{folder}/{key}/{n}.{ext}"),
    "taskonomy": (
        Taskonomy,
        taskonomy,
        "taskonomy.json",
        ("leonardo", "oyens"),
        "{key}/taskonomy/{folder}/p_{n}.{ext}",
    ),
}


def is_npy(layout: str, key: str) -> bool:
    return layout not in ("nyuv2", "taskonomy") or (layout == "nyuv2" and key == "depth")


def contents(array: np.ndarray, suffix: str) -> bytes:
    """A file's bytes."""
    buffer = io.BytesIO()
    if suffix == ".npy":
        np.save(buffer, array)
    else:
        Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, array: np.ndarray) -> Path:
    """Write an array as npy or png, as the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(contents(array, path.suffix))
    return path


def file_of(layout: str, root: Path, split: str, number: int, key: str) -> Path:
    """Where one file of a set lies."""
    *_, folders, form = LAYOUTS[layout]
    folder, ext = folders[split == "test"], "npy" if is_npy(layout, key) else "png"
    return root / form.format(folder=folder, key=key, n=number, ext=ext)


def write_index(layout: str, root: Path, rows: dict[str, list[list[str]]]) -> Path:
    name = LAYOUTS[layout][2]
    assert name is not None
    (root / name).write_text(json.dumps(rows))
    return root / name


def write_set(
    layout: str,
    root: Path,
    counts: dict[str, int] = COUNTS,
    size: tuple[int, int] = SIZE,
    scene: Callable[[np.random.Generator, tuple[int, int]], Arrays] = random_scene,
) -> Path:
    """Write a set; gives its folder."""
    _, encode, index, _, _ = LAYOUTS[layout]
    rng, rows = np.random.default_rng(5), {}
    for split, count in counts.items():
        rows[split] = []
        for number in range(count):
            arrays = encode(scene(rng, size))
            paths = [write(file_of(layout, root, split, number, key), array) for key, array in arrays.items()]
            row = [path.relative_to(root).as_posix() for path in paths]
            if layout == "taskonomy":  # the index names folders as they were before
                row = ["/".join((p.split("/")[2], p.split("/")[0], p.split("/")[3])) for p in row]
            rows[split].append(row)
    if index is not None:
        write_index(layout, root, rows)
    if layout == "taskonomy":
        np.save(root / "semseg_prior_factor.npy", np.linspace(0.5, 2, 17))
    return root


def load(layout: str, root: Path, **arguments) -> Published:
    """The set's loader, set up."""
    data = LAYOUTS[layout][0](root, **arguments)
    data.setup()
    return data


def read_all(data: Published) -> None:
    """Read every file that the module's tasks have."""
    for split in ("plain", "val", "test"):
        for index in range(len(data.splits[split])):
            data.splits[split][0, index]
