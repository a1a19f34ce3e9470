"""IDX: the format of MNIST's and Fashion-MNIST's files: pictures or labels as bytes behind a short header."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

UNSIGNED_BYTES = 8  # the header's code of the numbers' type


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The numbers in an IDX file, uint8, in the shape that its header says.

    The format: two zero bytes, the type, the number of dimensions, each dimension as 4 bytes (the first one highest),
    then the numbers. Only unsigned bytes are read.

    Args:
        path: The file, not compressed.
        dimensions: How many dimensions it has to have: 3 for pictures, 1 for labels.

    Raises:
        ValueError: Naming the file, if it is not such a file or has more or fewer numbers than its header says.
        OSError: If it cannot be read.
    """
    content = path.read_bytes()
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise ValueError(f"{path} is damaged: {len(content)} bytes, its header alone has {start}")
    if content[:4] != bytes((0, 0, UNSIGNED_BYTES, dimensions)):
        wanted = bytes((0, 0, UNSIGNED_BYTES, dimensions)).hex(" ")
        raise ValueError(f"{path} is damaged: it starts with {content[:4].hex(' ')}, expected {wanted}")
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", dimensions, 4))
    total = start + math.prod(shape)
    if len(content) != total:
        raise ValueError(f"{path} is damaged: {len(content)} bytes, its header says {total}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
