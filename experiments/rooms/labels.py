"""The labels of one picture."""

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

IGNORE = 255


@dataclass(frozen=True)
class Labels:
    """What a picture shows.

    Attributes:
        seg: [H, W] class, uint8; 255 where nothing was hit.
        normal: [H, W, 3] unit vectors in the camera frame (x right, y up, z to the camera); 0 = unknown.
        depth: [H, W] metres along the optical axis; 0 = unknown.
    """

    seg: NDArray[Any]
    normal: NDArray[Any]
    depth: NDArray[Any]
