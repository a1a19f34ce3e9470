"""Filters: edges and 2-D keypoints of a picture, as Taskonomy defines these tasks (labels computed from the picture itself)."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

EDGE_SIGMA = 1.0
# Fixed scales, so that a value means the same in every picture; chosen on indoor pictures for means of 0.1 to 0.2.
EDGE_FULL = 0.25
KEYPOINT_SIGMAS = (1.2, 2.0, 3.0)
KEYPOINT_FULL = 0.10


def grey(picture: np.ndarray) -> np.ndarray:
    """Luma (ITU-R BT.601) of a uint8 RGB picture [H, W, 3], float32 in [0, 1].

    Raises:
        ValueError: If the picture has another shape or type.
    """
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise ValueError(f"expected a uint8 picture [H, W, 3]; got {picture.dtype} {picture.shape}")
    return picture.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32) / np.float32(255)


def edge_strength(picture: np.ndarray) -> np.ndarray:
    """Canny's gradient magnitude without non-maximum suppression ("edge texture"), float32 [H, W] in [0, 1].

    The luma is smoothed with a Gaussian of one pixel; the magnitude of its central differences is divided by 0.25 a pixel
    and clipped.

    Example:
        >>> step = np.zeros((5, 8, 3), np.uint8); step[:, 4:] = 255
        >>> edge_strength(step)[2].round(1).tolist() == edge_strength(step[:, ::-1])[2, ::-1].round(1).tolist()
        True
    """
    smooth = ndimage.gaussian_filter(grey(picture), EDGE_SIGMA, mode="nearest")
    dy, dx = np.gradient(smooth)
    return np.clip(np.hypot(dx, dy) / EDGE_FULL, 0, 1).astype(np.float32)


def keypoint_response(picture: np.ndarray) -> np.ndarray:
    """The heat map of a blob and corner detector (SURF's determinant of the Hessian), float32 [H, W] in [0, 1].

    At each scale sigma the determinant of the Hessian of the smoothed luma, times sigma^4, positive part; the maximum over
    the scales; its square root (so that it grows with contrast, not contrast squared) is divided by 0.10 and clipped.
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
