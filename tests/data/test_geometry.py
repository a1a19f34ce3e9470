"""Mirrored and zoomed labels are those of the mirrored and zoomed scene: a tilted plane before a pinhole camera."""

from pathlib import Path

import numpy as np
import pytest
from layout_files import load, write_set

from cut.data.augmentation import Augmentation

SIZE, FOCAL = (32, 48), 40.0
NORMAL = np.array([0.5, 0.3, 0.8]) / np.linalg.norm([0.5, 0.3, 0.8])  # x right, y up, z to the camera
DISTANCE = 2.0
# Of an 8-bit normal's component, and of metres in 16 bits; Cityscapes' unit is 0.1 / metres.
TOLERANCE = {"nyuv2": 0.5 / 127.5, "nyuv2-npy": 1e-6, "taskonomy": 0.5 / 127.5}
COUNTS = {"train": 20, "test": 1}


def rays(size: tuple[int, int], focal: float) -> np.ndarray:
    """The point at depth 1 that each pixel's centre sees, [H, W, 3]."""
    v, u = np.mgrid[0 : size[0], 0 : size[1]]
    x, y = (u + 0.5 - size[1] / 2) / focal, (size[0] / 2 - v - 0.5) / focal
    return np.stack([x, y, -np.ones(size)], -1)


def plane_depth(normal: np.ndarray, size: tuple[int, int], focal: float) -> np.ndarray:
    """Depth of the plane normal . X = -DISTANCE."""
    return -DISTANCE / (rays(size, focal) @ normal)


def normals_from(depth: np.ndarray, focal: float) -> np.ndarray:
    """Normals of a surface from its depth alone, by differences of neighbouring points; [H-1, W-1, 3]."""
    points = rays(depth.shape, focal) * depth[..., None]
    right, down = points[:-1, 1:] - points[:-1, :-1], points[1:, :-1] - points[:-1, :-1]
    found = np.cross(down, right)
    return found / np.linalg.norm(found, axis=-1, keepdims=True)


def plane(rng: np.random.Generator, size: tuple[int, int]) -> dict[str, np.ndarray]:
    depth = plane_depth(NORMAL, size, FOCAL)
    assert depth.min() > 0.5 and depth.max() < 20
    picture = np.stack([np.arange(size[0] * size[1]).reshape(size) // n % 256 for n in (1, 5, 16)], -1)
    return {
        "picture": picture.astype(np.uint8),
        "classes": np.indices(size)[1],
        "normal": np.broadcast_to(NORMAL, (*size, 3)),
        "depth": depth,
        "keypoint": np.zeros(size),
        "edge": np.zeros(size),
    }


@pytest.fixture(scope="module", params=["nyuv2", "nyuv2-npy", "cityscapes", "cityscapes-npy", "taskonomy"])
def scene(request, tmp_path_factory) -> tuple[str, Path]:
    root = tmp_path_factory.mktemp(request.param)
    return request.param, write_set(request.param, root, COUNTS, SIZE, plane)


def metres(layout: str, depth: np.ndarray) -> np.ndarray:
    return np.where(depth > 0, 0.1 / depth.clip(1e-9), 0) if layout.startswith("cityscapes") else depth


def labels(layout: str, root: Path, augmentation: Augmentation, epoch: int = 0) -> dict[str, np.ndarray]:
    item = load(layout, root, augmentation=augmentation).splits["train"][epoch, 0]
    found = {"seg": item["seg"].numpy(), "depth": metres(layout, item["depth"][0].numpy())}
    if "normal" in item:
        found["normal"] = item["normal"].permute(1, 2, 0).numpy()
    return found


def mirrored(layout: str, root: Path, **arguments) -> dict[str, np.ndarray]:
    """The first epoch's labels that are mirrored: the classes, which count columns, then fall."""
    for epoch in range(20):
        found = labels(layout, root, Augmentation(mirror=True, **arguments), epoch)
        if found["seg"][0, 0] > found["seg"][0, 2]:
            return found
    raise AssertionError("never mirrored")


def precision(layout: str) -> float:
    return 0.6 / 512 if layout == "taskonomy" else 1e-5


def test_the_plane_is_itself(scene: tuple[str, Path]) -> None:
    layout, root = scene
    found = labels(layout, root, Augmentation(mirror=False))
    np.testing.assert_allclose(found["depth"], plane_depth(NORMAL, SIZE, FOCAL), atol=precision(layout))
    if "normal" in found:
        assert np.abs(found["normal"] - NORMAL).max() < 2 * TOLERANCE[layout]
        if layout != "taskonomy":
            assert np.abs(normals_from(found["depth"], FOCAL) - found["normal"][1:, 1:]).max() < 0.02


def test_a_mirrored_picture_has_the_labels_of_the_mirrored_plane(scene: tuple[str, Path]) -> None:
    layout, root = scene
    other = NORMAL * [-1, 1, 1]
    found = mirrored(layout, root)
    np.testing.assert_allclose(found["depth"], plane_depth(other, SIZE, FOCAL), atol=precision(layout))
    if "normal" in found:
        assert np.abs(found["normal"] - other).max() < 2 * TOLERANCE[layout]
        if layout != "taskonomy":
            assert np.abs(normals_from(found["depth"], FOCAL) - found["normal"][1:, 1:]).max() < 0.02


@pytest.mark.parametrize("factor", [0.5, 1.25, 2.0])
@pytest.mark.parametrize("mirror", [False, True])
def test_a_zoom_is_a_longer_lens(scene: tuple[str, Path], factor: float, mirror: bool) -> None:
    layout, root = scene
    size = (round(SIZE[0] * factor), round(SIZE[1] * factor))
    arguments = {"scale": (factor, factor), "crop": size, "pad": True}
    found = (
        mirrored(layout, root, **arguments) if mirror else labels(layout, root, Augmentation(mirror=False, **arguments))
    )
    normal = NORMAL * [-1, 1, 1] if mirror else NORMAL
    expected = plane_depth(normal, size, FOCAL * factor)
    # The nearest pixel is at most half a pixel of the coarser picture away, in both directions.
    step = sum(np.abs(np.diff(expected, axis=axis)).max() for axis in (0, 1)) * max(factor, 1)
    assert np.abs(found["depth"] - expected).max() <= step + precision(layout)
    assert np.abs(found["depth"] - expected).mean() < 0.02 * expected.mean()
    if "normal" in found:
        assert np.abs(found["normal"] - normal).max() < 2 * TOLERANCE[layout]


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.5])
def test_depth_is_divided_by_the_zoom_if_asked_for(scene: tuple[str, Path], factor: float) -> None:
    layout, root = scene
    kept, divided = (
        labels(layout, root, Augmentation(mirror=False, scale=(factor, factor), crop=SIZE, pad=True, divide_depth=d))
        for d in (False, True)
    )
    known = kept["seg"] != 255
    assert (divided["seg"] == kept["seg"]).all() and known.any()
    by = 1 / factor if layout.startswith("cityscapes") else factor  # there the file's unit is inverse
    np.testing.assert_allclose(divided["depth"][known], kept["depth"][known] / by, rtol=1e-5)
    if "normal" in kept:
        np.testing.assert_array_equal(divided["normal"], kept["normal"])
