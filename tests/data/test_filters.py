import numpy as np
import pytest

from cut.data.filters import (
    EDGE_FULL,
    EDGE_SIGMA,
    FILTERS,
    KEYPOINT_FULL,
    edge_strength,
    grey,
    keypoint_response,
)


def noise(height: int = 24, width: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smoothed(luma: np.ndarray, sigma: float) -> np.ndarray:
    """A Gaussian as a plain sum over a window of 4 sigma, the border repeated."""
    radius = int(4 * sigma + 0.5)
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = np.outer(kernel, kernel) / kernel.sum() ** 2
    padded = np.pad(luma, radius, mode="edge")
    found = np.zeros_like(luma)
    for y in range(luma.shape[0]):
        for x in range(luma.shape[1]):
            found[y, x] = (padded[y : y + len(offsets), x : x + len(offsets)] * kernel).sum()
    return found


def test_edges_are_the_gradient_of_the_smoothed_luma() -> None:
    picture = noise()
    s = smoothed(grey(picture).astype(np.float64), EDGE_SIGMA)
    dx, dy = (s[1:-1, 2:] - s[1:-1, :-2]) / 2, (s[2:, 1:-1] - s[:-2, 1:-1]) / 2
    expected = np.clip(np.sqrt(dx**2 + dy**2) / EDGE_FULL, 0, 1)
    np.testing.assert_allclose(edge_strength(picture)[1:-1, 1:-1], expected, atol=1e-4)


def blob(sigma: float, contrast: float) -> np.ndarray:
    y, x = np.mgrid[0:41, 0:41] - 20
    light = 128 + contrast * np.exp(-(x**2 + y**2) / (2 * sigma**2))
    return light.round().astype(np.uint8)[..., None].repeat(3, -1)


def test_response_to_a_blob_is_the_hessian_s_in_closed_form() -> None:
    # A Gaussian blob stays one under smoothing: variances add, the height falls by s^2 / (s^2 + t^2), and the
    # determinant of the Hessian at its peak is (height / variance)^2. Differences of step 2 see a wider blob.
    s, t, contrast = 6.0, 3.0, 20.0
    variance = s**2 + t**2
    expected = contrast / 255 * s**2 / variance / variance * t**2
    assert keypoint_response(blob(s, contrast))[20, 20] * KEYPOINT_FULL == pytest.approx(expected, rel=0.1)


def test_blobs_respond_and_straight_edges_do_not() -> None:
    step = np.zeros((41, 41, 3), np.uint8)
    step[:, 20:] = 200
    assert keypoint_response(step)[5:-5, 5:-5].max() < 0.02
    assert edge_strength(step)[20].max() == 1
    response = keypoint_response(blob(3, 60))
    assert np.unravel_index(response.argmax(), response.shape) == (20, 20)


@pytest.mark.parametrize("name", FILTERS)
def test_labels_are_maps_in_the_unit_interval(name: str) -> None:
    found = FILTERS[name](noise())
    assert found.shape == (24, 32) and found.dtype == np.float32
    assert found.min() >= 0 and found.max() <= 1
    assert (FILTERS[name](np.full((8, 9, 3), 77, np.uint8)) < 1e-3).all()


@pytest.mark.parametrize("name", FILTERS)
def test_mirroring_commutes(name: str) -> None:
    picture = noise()
    np.testing.assert_allclose(FILTERS[name](picture[:, ::-1]), FILTERS[name](picture)[:, ::-1], atol=1e-5)


@pytest.mark.parametrize("name", FILTERS)
def test_scale_is_the_same_in_every_picture(name: str) -> None:
    picture = noise()
    half = (picture // 2 + 64).astype(np.uint8)
    strong, weak = FILTERS[name](picture), FILTERS[name](half)
    inside = (strong > 0.2) & (strong < 0.95)
    np.testing.assert_allclose(weak[inside] / strong[inside], 0.5, atol=0.1)


def test_wrong_pictures_are_named() -> None:
    with pytest.raises(ValueError, match=r"picture is float64 \[4, 4, 3\]; allowed: uint8"):
        edge_strength(np.zeros((4, 4, 3)))
    with pytest.raises(ValueError, match=r"uint8 \[4, 4\]"):
        keypoint_response(np.zeros((4, 4), np.uint8))
