"""Filters: edges and 2-D keypoints, labels that Taskonomy too computes from the picture itself."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import ndimage

EDGE_SIGMA = 1.0
# Fixed, so that a value means the same in every picture. Chosen for means of 0.1 to 0.3 and hardly any
# clipping on indoor pictures: 0.14 and 0.15 on Rooms, 0.11 and 0.10 on NYU-v2 at 480x640, 0.26 and 0.24 at
# 96x128.
EDGE_FULL = 0.18
KEYPOINT_SIGMAS = (1.2, 2.0, 3.0)
KEYPOINT_FULL = 0.06


def grey(picture: np.ndarray) -> np.ndarray:
    """Luma (ITU-R BT.601) of a uint8 RGB picture [H, W, 3], float32 [H, W] in [0, 1].

    Raises:
        ValueError: If the picture has another shape or type, or a side below 2.
    """
    wrong = picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8
    if wrong or min(picture.shape[:2]) < 2:
        raise ValueError(
            f"picture is {picture.dtype} {list(picture.shape)}; allowed: uint8 [H, W, 3], sides of at least 2"
        )
    return picture.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32) / np.float32(255)


def edge_strength(picture: np.ndarray) -> np.ndarray:
    """Canny's gradient magnitude without non-maximum suppression ("edge texture"), float32 [H, W] in [0, 1].

    The luma is smoothed with a Gaussian of one pixel; the magnitude of its central differences is divided by
    0.18 a pixel and clipped.

    Args:
        picture: uint8 RGB [H, W, 3].

    Example:
        >>> step = np.zeros((5, 8, 3), np.uint8)
        >>> step[:, 4:] = 255
        >>> [round(float(x), 2) for x in edge_strength(step)[2]]
        [0.02, 0.16, 0.82, 1.0, 1.0, 0.82, 0.16, 0.02]
    """
    smooth = ndimage.gaussian_filter(grey(picture), EDGE_SIGMA, mode="nearest")
    dy, dx = np.gradient(smooth)
    return np.clip(np.hypot(dx, dy) / EDGE_FULL, 0, 1).astype(np.float32)


def keypoint_response(picture: np.ndarray) -> np.ndarray:
    """The heat map of SURF's detector, the determinant of the Hessian, float32 [H, W] in [0, 1].

    At sigmas of 1.2, 2 and 3 pixels the determinant of the Hessian of the smoothed luma, times sigma^4,
    positive part: blobs and corners respond, straight edges do not. The maximum over the sigmas; its square
    root, which grows with contrast as edges do, is divided by 0.06 and clipped.

    Args:
        picture: uint8 RGB [H, W, 3].
    """
    luma = grey(picture)
    best = np.zeros_like(luma)
    for sigma in KEYPOINT_SIGMAS:
        smooth = ndimage.gaussian_filter(luma, sigma, mode="nearest")
        dy, dx = np.gradient(smooth)
        dyy, dyx = np.gradient(dy)
        dxx = np.gradient(dx, axis=1)
        best = np.maximum(best, (dxx * dyy - dyx**2) * sigma**4)
    return np.clip(np.sqrt(best) / KEYPOINT_FULL, 0, 1).astype(np.float32)


FILTERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "edge": edge_strength,
    "keypoint": keypoint_response,
}
