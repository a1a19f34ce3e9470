"""What a batch holds: the one place where keys, shapes, units and ignore values are written down.

===========  =======  ================  =====================================================  =========
key          type     shape             meaning                                                unknown
===========  =======  ================  =====================================================  =========
image        float32  [B, 3, H, W]      RGB, (x / 255 - mean) / std
seg          int64    [B, H, W]         class                                                  255
normal       float32  [B, 3, H, W]      unit vector, camera frame: x right, y up, z to camera  (0, 0, 0)
depth        float32  [B, 1, H, W]      metres along the optical axis                          0
edge         float32  [B, 1, H, W]      edge strength in [0, 1]                                NaN
keypoint     float32  [B, 1, H, W]      2-D keypoint response in [0, 1]                        NaN
scene        int64    [B]               class of the picture                                   255
===========  =======  ================  =====================================================  =========

A data set of one's own may use other names; the rules for its labels are those of its tasks (:mod:`cut.tasks`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Batch = dict[str, Tensor]


def normalise(picture: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """A uint8 RGB picture [H, W, 3] as a float32 input [3, H, W].

    Example:
        >>> normalise(np.full((1, 1, 3), 255, np.uint8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)).flatten().tolist()
        [1.0, 1.0, 1.0]
    """
    scaled = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1).float() / 255
    return (scaled - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def picture(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """The uint8 RGB picture [H, W, 3] that an input [3, H, W] was made from."""
    scaled = image.cpu().float() * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    return (scaled * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
