"""Tiny-Taskonomy: indoor pictures with five dense tasks, as Taskonomy lays them out and AdaShare's index lists them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cut.data.decoding import classes_label, load_npy, planes, read_png, unit_label
from cut.data.files import Example, Layout, inside, read_index
from cut.data.published import Published
from cut.tasks import Task, depth, normals, regression_map, segmentation

# The papers' lambdas.
WEIGHTS = {"seg": 1.0, "normal": 3.0, "depth": 2.0, "keypoint": 7.0, "edge": 7.0}
TASKS = tuple(WEIGHTS)
SOURCE = (
    "Taskonomy is obtained from its repository (StanfordVL/taskonomy), the index from AdaShare's "
    "(sunxm2357/AdaShare); docs/datasets.md has the details"
)
CLASSES = (
    *("background", "bottle", "chair", "couch", "potted plant", "bed", "dining table", "toilet", "tv", "microwave"),
    *("oven", "toaster", "sink", "refrigerator", "book", "clock", "vase"),
)
PRIOR = "semseg_prior_factor.npy"
SIDE = 256  # larger pictures are resized to it
UNKNOWN_NORMAL = 128
DEEPEST, PER_METRE = 64500, 512
WIDE = ("depth", "keypoint", "edge")  # their files have 16 bits
CLIP = {"keypoint": 0.005, "edge": 0.08}  # of 2^16


class Taskonomy16(Layout):
    """An index of png files; depth, keypoints and edges have 16 bits."""

    marker = "taskonomy.json"
    expected = (
        "taskonomy.json with rows of [rgb, segment_semantic, normal, depth_zbuffer, keypoints2d, edge_texture] png "
        f"files, and {PRIOR}"
    )
    size = (SIDE, SIDE)
    classes = CLASSES
    columns = ("image", *TASKS)

    def examples(self, root: Path, split: str) -> list[Example]:
        """The rows of the index."""
        rows = read_index(root / self.marker, len(self.columns))[split]
        return [Example(row[0], {k: located(root, p) for k, p in zip(self.columns, row, strict=True)}) for row in rows]

    def array(self, example: Example, key: str) -> np.ndarray:
        """A decoded file, at most 256x256; depth as float32, infinite where it is not known."""
        path = example.files[key]
        found = shrunk(read_png(path, 3 if key in ("image", "normal") else 1))
        if key in WIDE and found.dtype != np.uint16:
            raise ValueError(f"{path} has 8 bits; expected 16")
        if key == "depth":  # dividing by a zoom must neither wrap nor make an unknown depth known
            return np.where(found < DEEPEST, found.astype(np.float32), np.float32(np.inf))
        return found

    def label(self, key: str, array: np.ndarray, mirrored: bool, legacy: bool) -> Tensor:
        """A label; the legacy protocol has logarithmic depth, and keypoints and edges in [-1, 1]."""
        if key == "seg":
            return classes_label(array.astype(np.int32) - 1, len(self.classes))  # 0 is not known
        if key == "normal":
            colours = planes(array)
            return unit_label(colours / 127.5 - 1, (colours != UNKNOWN_NORMAL).any(0), mirrored)
        raw = torch.from_numpy(np.ascontiguousarray(array).astype(np.float32))[None]
        if key == "depth":
            scaled = torch.log1p(raw) / np.log(2.0**16) if legacy else raw / PER_METRE
            return scaled.where(raw.isfinite(), 0.0)
        response = (raw / 2**16).clamp_max(CLIP[key]) / CLIP[key]
        return response * 2 - 1 if legacy else response


def located(root: Path, listed: str) -> Path:
    """Where a listed file is: as written if it is there, else with its first two folders swapped, as published.

    The index names ``<building>/<domain>/<file>``; the files lie in ``<domain>/taskonomy/<building>/<file>``.

    Example:
        >>> located(Path("data"), "allensville/rgb/point_1.png").as_posix()
        'data/rgb/taskonomy/allensville/point_1.png'
    """
    written = inside(root, listed)
    parts = PurePosixPath(listed).parts
    if len(parts) < 3 or written.exists():
        return written
    return root.joinpath(parts[1], "taskonomy", parts[0], *parts[2:])


def shrunk(array: np.ndarray) -> np.ndarray:
    """An array of pixels, at most 256x256, by the nearest pixel."""
    height, width = array.shape[:2]
    if height <= SIDE and width <= SIDE:
        return array
    rows = ((np.arange(SIDE) + 0.5) * height / SIDE).astype(np.intp)
    columns = ((np.arange(SIDE) + 0.5) * width / SIDE).astype(np.intp)
    return array[rows[:, None], columns]


def class_weights(root: Path) -> list[float]:
    """The weights of the segmentation's classes that come with the set.

    Raises:
        ValueError: If the file is missing or does not hold 17 positive numbers.
    """
    path = root / PRIOR
    if not path.is_file():
        raise ValueError(f"{path} is missing: Taskonomy's class weights (taskbank/lib/data of its repository)")
    found = load_npy(path).ravel()
    if found.dtype.kind not in "iuf":
        raise ValueError(f"{path} holds {found.dtype}; expected numbers")
    if len(found) != len(CLASSES) or not np.isfinite(found).all() or found.min() <= 0:
        raise ValueError(f"{path} holds {len(found)} numbers; expected {len(CLASSES)} positive ones")
    return [float(v) for v in found]


class Taskonomy(Published):
    """The Tiny-Taskonomy data module.

    Args:
        root: Folder of the set.
        tasks: Which of seg, normal, depth, keypoint, edge.
        legacy: The published protocol: BGR minus a mean colour, logarithmic depth, keypoints and edges in [-1, 1]. A
            model trained so takes BGR.
        **kwargs: Those of :class:`cut.data.published.Published`.

    Raises:
        ValueError: If there is no such set, or an argument is not allowed.
    """

    name, title, source = "taskonomy", "Tiny-Taskonomy", SOURCE
    layouts, lambdas = (Taskonomy16(),), WEIGHTS

    def __init__(
        self, root: str | Path | None = None, tasks: Sequence[str] = TASKS, legacy: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(root, tasks, legacy=legacy, **kwargs)

    def task(self, name: str, weight: float) -> Task:
        """One of the set's tasks.

        Raises:
            ValueError: If the segmentation's class weights are missing or damaged.
        """
        if name == "seg":
            return segmentation(self.layout.classes, weight=weight, class_weights=class_weights(self.root))
        if name == "normal":
            return normals(weight=weight, raw=self.legacy)  # decoded: its angles are true ones there too
        if name == "depth":
            return depth(weight=weight, unit="log(1 + depth) / log(2^16)" if self.legacy else "m")
        return regression_map(name, weight, -1.0 if self.legacy else 0.0)
