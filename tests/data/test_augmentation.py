import numpy as np
import pytest

from cut.data.augmentation import Augmentation
from cut.data.filters import edge_strength

H, W = 24, 32


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
