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

A data set of one's own may use other names; the rules for its labels are those of its tasks
(:mod:`cut.tasks`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from cut.tasks import Task

Batch = dict[str, Tensor]
# Of a label's vectors: 8-bit pictures of normals, decoded and normalised, are far better than that.
LENGTH_TOLERANCE = 0.01


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


def check_batch(batch: Mapping[str, Tensor], tasks: Iterable[Task]) -> None:
    """Compare a batch with what this module and its tasks demand of it.

    Args:
        batch: As a data module gives it.
        tasks: The tasks that it must have labels for.

    Raises:
        ValueError: Naming the first entry that is missing or has a wrong type, shape or value.
    """
    if "image" not in batch:
        raise ValueError(f"the batch has no 'image'; its entries are {sorted(batch)}")
    image = batch["image"]
    if image.ndim != 4 or image.shape[1] != 3 or image.dtype != torch.float32:
        raise ValueError(f"'image' is {_form(image)}; expected torch.float32 [B, 3, H, W]")
    if not image.isfinite().all():
        raise ValueError("'image' has values that are not finite")
    for task in tasks:
        if task.name not in batch:
            raise ValueError(f"the batch has no label {task.name!r}; its entries are {sorted(batch)}")
        _check_label(task, batch, image)


def _check_label(task: Task, batch: Mapping[str, Tensor], image: Tensor) -> None:
    label, size, pixels = batch[task.name], len(image), tuple(image.shape[-2:])
    forms: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "segmentation": (torch.int64, (size, *pixels)),
        "normals": (torch.float32, (size, 3, *pixels)),
        "depth": (torch.float32, (size, 1, *pixels)),
        "map": (torch.float32, (size, 1, *pixels)),
        "classification": (torch.int64, (size,)),
    }
    if task.kind in forms:
        dtype, shape = forms[task.kind]
        if label.dtype != dtype or label.shape != shape:
            raise ValueError(f"label {task.name!r} is {_form(label)}; expected {dtype} {list(shape)}")
    shape = (size, task.channels, *label.shape[-2:]) if task.dense else (size, task.channels)
    task.loss(torch.zeros(shape, device=label.device), batch)  # it knows the range of its labels
    if task.kind == "normals":
        length = (label * label).sum(1).sqrt()
        wrong = length[(length > 0) & ((length - 1).abs() > LENGTH_TOLERANCE)]
        if wrong.numel():
            raise ValueError(f"a vector of {task.name!r} has length {wrong[0]:g}; allowed: 1, or 0 = unknown")


def _form(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
