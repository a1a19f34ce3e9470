import hashlib

import numpy as np
import pytest
from PIL import Image

from cut.data.augmentation import Augmentation
from cut.data.filters import edge_strength

H, W = 24, 32

BORDER = 2  # beside the window's edge, the windowed zoom does not see the pixels outside


def naive(
    original: dict[str, np.ndarray],
    rng: np.random.Generator,
    scale: tuple[float, float],
    crop: tuple[int, int],
    uniform: bool = False,
    pad: bool = False,
) -> tuple[dict[str, np.ndarray], bool, tuple[slice, slice]]:
    """Zoom everything, pixel by pixel, then cut, then mirror; also gives the part in the zoomed picture."""
    height, width = original["image"].shape[:2]
    mirrored = bool(rng.random() < 0.5)
    factor = rng.uniform(scale[0], scale[1]) if uniform else np.exp(rng.uniform(np.log(scale[0]), np.log(scale[1])))
    tall, wide = round(height * factor), round(width * factor)
    top = int(rng.integers(max(0, tall - crop[0]) + 1 if pad else tall - crop[0] + 1))
    left = int(rng.integers(max(0, wide - crop[1]) + 1 if pad else wide - crop[1] + 1))
    found = {"image": np.array(Image.fromarray(original["image"]).resize((wide, tall), Image.Resampling.BILINEAR))}
    for key, array in original.items():
        if key == "edge" and not pad and (tall, wide) != (height, width):
            found[key] = edge_strength(found["image"])
        elif key != "image":
            found[key] = np.zeros((tall, wide, *array.shape[2:]), array.dtype)
            for y, x in np.ndindex(tall, wide):
                found[key][y, x] = array[int((y + 0.5) * height / tall), int((x + 0.5) * width / wide)]
    part = (slice(top, top + crop[0]), slice(left, left + crop[1]))
    return {key: a[part][:, ::-1] if mirrored else a[part] for key, a in found.items()}, mirrored, part


def arrays() -> dict[str, np.ndarray]:
    """A smooth picture whose labels name each pixel's place."""
    y, x = np.mgrid[0:H, 0:W]
    image = np.stack([y * 8, x * 8, (x + y) * 4], -1).astype(np.uint8)
    return {"image": image, "seg": (y * W + x).astype(np.uint16), "edge": edge_strength(image)}


def draw(augmentation: Augmentation, seed: int = 0) -> tuple[dict[str, np.ndarray], bool]:
    return augmentation(arrays(), np.random.default_rng(seed))


def test_mirrors_half_of_the_pictures_and_nothing_else() -> None:
    original, number = arrays(), 0
    for seed in range(200):
        found, mirrored = draw(Augmentation(), seed)
        number += mirrored
        for key, array in found.items():
            np.testing.assert_array_equal(array, original[key][:, ::-1] if mirrored else original[key])
    assert 70 < number < 130


def test_off_changes_nothing() -> None:
    found, mirrored = draw(Augmentation(mirror=False))
    assert not mirrored
    for key, array in arrays().items():
        np.testing.assert_array_equal(found[key], array)


def test_crop_cuts_picture_and_labels_alike() -> None:
    places = set()
    for seed in range(50):
        found, _ = draw(Augmentation(mirror=False, crop=(10, 12)), seed)
        assert found["image"].shape == (10, 12, 3)
        y, x = divmod(int(found["seg"][0, 0]), W)
        places.add((y, x))
        for key, array in arrays().items():
            np.testing.assert_array_equal(found[key], array[y : y + 10, x : x + 12])
    assert len(places) > 30


@pytest.mark.parametrize(("scale", "crop"), [((1.5, 1.5), None), ((0.5, 0.5), (12, 16)), ((1.0, 2.0), None)])
def test_zoom_keeps_labels_where_the_picture_shows_them(
    scale: tuple[float, float], crop: tuple[int, int] | None
) -> None:
    original = arrays()
    for seed in range(5):
        found, _ = draw(Augmentation(mirror=False, scale=scale, crop=crop), seed)
        assert found["image"].shape[:2] == found["seg"].shape == (crop or (H, W))
        assert np.isin(found["seg"], original["seg"]).all()  # no mixtures
        shown = original["image"].reshape(-1, 3)[found["seg"]]
        assert np.abs(shown.astype(int) - found["image"]).max() <= 10  # a pixel's step is 8


def test_edges_of_a_zoomed_picture_are_its_own() -> None:
    found, _ = draw(Augmentation(mirror=False, scale=(1.5, 1.5)))
    inside = (slice(6, -6), slice(6, -6))
    np.testing.assert_allclose(found["edge"][inside], edge_strength(found["image"])[inside], atol=1e-5)


def test_all_randomness_comes_from_the_generator() -> None:
    augmentation = Augmentation(scale=(1, 2), crop=(9, 11))
    first, second = draw(augmentation, 4), draw(augmentation, 4)
    assert first[1] == second[1]
    for key in first[0]:
        np.testing.assert_array_equal(first[0][key], second[0][key])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": (2, 1)}, r"scale \(2, 1\)"),
        ({"scale": (0, 1)}, "positive"),
        ({"crop": (0, 4)}, r"crop \(0, 4\)"),
    ],
)
def test_numbers_out_of_range_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**arguments)


def test_a_crop_must_fit_the_smallest_zoom() -> None:
    Augmentation(scale=(0.5, 1), crop=(12, 16)).check((H, W))
    with pytest.raises(ValueError, match=r"crop 24x32 is larger than pictures of 24x32 zoomed by 0.5"):
        Augmentation(scale=(0.5, 1)).check((H, W))


# --- what committed records depend on ---


def test_the_default_draws_what_it_always_drew() -> None:
    """Pinned, and equal to the algorithm spelled out: records that are kept were made with these pictures."""
    digest = hashlib.sha256()
    cases = [((1.0, 1.0), None), ((1.0, 1.5), None), ((0.75, 1.25), (16, 20)), ((1.0, 2.0), (24, 32))]
    for scale, crop in cases:
        for seed in range(6):
            found, mirrored = draw(Augmentation(scale=scale, crop=crop), seed)
            wanted, flipped, _ = naive(arrays(), np.random.default_rng(seed), scale, crop or (H, W))
            assert mirrored == flipped and found.keys() == wanted.keys()
            for key, array in found.items():
                np.testing.assert_array_equal(array, wanted[key])
                if key != "edge":  # floating point, which may differ between machines
                    digest.update(np.ascontiguousarray(array).tobytes())
    assert digest.hexdigest()[:16] == "818bc1b2d1163a7e"


# --- padding, uniform zooms, division of depth ---


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize(("scale", "crop"), [((0.5, 1.5), (18, 22)), ((1.0, 3.0), (24, 32)), ((0.4, 0.9), (8, 40))])
def test_a_window_is_the_whole_zoomed_and_then_cut(
    scale: tuple[float, float], crop: tuple[int, int], uniform: bool
) -> None:
    augmentation = Augmentation(scale=scale, crop=crop, pad=True, uniform=uniform)
    for seed in range(12):
        original = arrays() | {"normal": np.random.default_rng(seed).normal(size=(H, W, 3))}
        found, mirrored = augmentation(original, np.random.default_rng(seed))
        wanted, flipped, _ = naive(original, np.random.default_rng(seed), scale, crop, uniform, pad=True)
        assert mirrored == flipped
        for key in ("seg", "edge", "normal"):  # edges, too, by the nearest pixel: they are files
            np.testing.assert_array_equal(found[key], wanted[key])
        assert found["image"].shape == wanted["image"].shape and found["image"].dtype == np.uint8
        inside = (slice(BORDER, -BORDER), slice(BORDER, -BORDER))
        difference = np.abs(found["image"][inside].astype(int) - wanted["image"][inside])
        assert difference.max(initial=0) <= 2


def test_a_padded_picture_is_left_smaller_than_its_crop() -> None:
    found, _ = draw(Augmentation(mirror=False, scale=(0.5, 0.5), crop=(20, 14), pad=True))
    assert {a.shape[:2] for a in found.values()} == {(12, 14)}
    Augmentation(scale=(0.5, 1), crop=(99, 99), pad=True).check((H, W))


def test_padding_changes_no_draw_where_none_is_needed() -> None:
    for seed in range(10):
        plain, padded = (draw(Augmentation(scale=(1, 1), crop=(10, 12), pad=pad), seed) for pad in (False, True))
        assert plain[1] == padded[1]
        for key, array in plain[0].items():
            np.testing.assert_array_equal(array, padded[0][key])


@pytest.mark.parametrize("uniform", [False, True])
def test_zooms_are_spread_as_asked_for(uniform: bool) -> None:
    augmentation = Augmentation(scale=(0.5, 2.0), uniform=uniform)
    rng = np.random.default_rng(0)
    factors = np.array([augmentation._factor(rng) for _ in range(4000)])
    assert factors.min() >= 0.5 and factors.max() <= 2
    share = (factors < 1).mean()
    assert share == pytest.approx(1 / 3 if uniform else 1 / 2, abs=0.03)


@pytest.mark.parametrize("pad", [False, True])
def test_depth_is_divided_by_the_zoom_only_if_asked_for(pad: bool) -> None:
    depth = np.linspace(1, 9, H * W).reshape(H, W).astype(np.float32)
    depth[0] = 0
    for divide in (False, True):
        augmentation = Augmentation(mirror=False, scale=(1.6, 1.6), pad=pad, divide_depth=divide)
        found, _ = augmentation(arrays() | {"depth": depth}, np.random.default_rng(1))
        wanted = depth.ravel()[found["seg"]] / (1.6 if divide else 1)
        np.testing.assert_allclose(found["depth"], wanted, rtol=1e-6)
        assert found["depth"].dtype == np.float32
