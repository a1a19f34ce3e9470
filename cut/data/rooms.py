"""Rooms: furnished rooms with exact labels, five dense tasks and one image-level task. A small set ships with the package.

A set is a folder of zip shards ``<split>-<nnn>.zip`` beside a ``meta.json``. A shard holds, per room, ``<id>.jpg`` (the decoded
JPEG *is* the picture), ``<id>.seg.png`` (class, 255 = ignore), ``<id>.normal.png`` ((n + 1) / 2 x 255), ``<id>.depth.png``
(16-bit millimetres, 0 = unknown), and an ``index.json`` with each room's type and furniture. Edges and keypoints are computed
from the picture (:mod:`cut.data.filters`). Test rooms hold furniture that no training room has.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from cut.data.base import IMAGENET_MEAN, IMAGENET_STD, MultiTaskData
from cut.data.batch import normalise
from cut.data.filters import edge_strength, keypoint_response
from cut.tasks import Task, classification, depth, normals, regression_map, segmentation

EMBEDDED = Path(__file__).parent / "embedded"
TASKS = ("seg", "normal", "depth", "edge", "keypoint", "scene")
SPLITS = ("train", "val", "test")
# Loss weights that bring the tasks' losses to one order of magnitude on this set.
WEIGHTS = {"seg": 1.0, "normal": 3.0, "depth": 1.0, "edge": 5.0, "keypoint": 5.0, "scene": 0.3}


@dataclass(frozen=True)
class Augmentation:
    """Changes of training pictures that keep every label exact.

    Attributes:
        mirror: Mirror half of the pictures; the normals' x changes sign.
        crop: Height and width of a random crop.
    """

    mirror: bool = True
    crop: tuple[int, int] | None = None


def read_meta(root: Path) -> dict[str, Any]:
    """A set's ``meta.json``.

    Raises:
        ValueError: If it is missing or damaged.
    """
    path = root / "meta.json"
    if not path.exists():
        raise ValueError(f"no Rooms set in {root}: {path} is missing (make rooms OUT={root} renders one)")
    try:
        meta = json.loads(path.read_text())
        for key in ("classes", "room_types", "files", "splits"):
            meta[key]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return meta


def check_files(root: Path, meta: dict[str, Any]) -> None:
    """Compare every shard with its checksum.

    Raises:
        ValueError: Naming the file that is missing or damaged.
    """
    for name, digest in meta["files"].items():
        path = root / name
        if Path(name).name != name:
            raise ValueError(f"{root / 'meta.json'} names a file outside its folder: {name!r}")
        if not path.exists():
            raise ValueError(f"{path} is missing")
        if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise ValueError(f"{path} is damaged: its SHA-256 is not the one in meta.json")


@dataclass
class Room:
    """One room, decoded to compact arrays.

    Attributes:
        picture: uint8 [H, W, 3].
        labels: seg uint8 [H, W], normal int8 [H, W, 3] (127 = 1), depth uint16 [H, W] mm, edge and keypoint float16 [H, W].
        scene: Room type.
    """

    picture: np.ndarray
    labels: dict[str, np.ndarray]
    scene: int


class Shards:
    """Reads rooms out of a set's zip files, each at most once.

    Args:
        root: The set's folder.
        split: ``train``, ``val`` or ``test``.
        meta: The set's ``meta.json``.
    """

    def __init__(self, root: Path, split: str, meta: dict[str, Any]) -> None:
        self.types = list(meta["room_types"])
        self.rooms: list[tuple[Path, str, str]] = []
        for name in sorted(n for n in meta["files"] if n.startswith(f"{split}-")):
            try:
                with zipfile.ZipFile(root / name) as archive:
                    index = json.loads(archive.read("index.json"))["rooms"]
            except (zipfile.BadZipFile, KeyError, OSError, json.JSONDecodeError) as error:
                raise ValueError(f"{root / name} is damaged: {error}") from error
            self.rooms += [(root / name, room["id"], room["room_type"]) for room in index]
        self.cache: dict[int, Room] = {}

    def __len__(self) -> int:
        """Number of rooms."""
        return len(self.rooms)

    def room(self, index: int) -> Room:
        """One room; decoded when first asked for.

        Raises:
            ValueError: Naming the shard and room that cannot be read.
        """
        if index not in self.cache:
            path, name, kind = self.rooms[index]
            try:
                with zipfile.ZipFile(path) as archive:
                    self.cache[index] = _decode(archive, name, self.types.index(kind))
            except (zipfile.BadZipFile, KeyError, OSError, SyntaxError, ValueError) as error:
                raise ValueError(f"room {name} in {path} cannot be read: {error}") from error
        return self.cache[index]


def _decode(archive: zipfile.ZipFile, name: str, scene: int) -> Room:
    """One room from an open shard."""

    def image(suffix: str) -> np.ndarray:
        return np.array(Image.open(io.BytesIO(archive.read(f"{name}.{suffix}"))))

    picture = image("jpg")
    vectors = image("normal.png").astype(np.float32)
    unknown = (vectors == 128).all(-1)
    vectors = vectors / 127.5 - 1
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True).clip(1e-6)
    vectors[unknown] = 0
    labels = {
        "seg": image("seg.png"),
        "normal": (vectors * 32767).round().astype(np.int16),
        "depth": image("depth.png").astype(np.uint16),
        "edge": edge_strength(picture).astype(np.float16),
        "keypoint": keypoint_response(picture).astype(np.float16),
    }
    for key, label in labels.items():
        if label.shape[:2] != picture.shape[:2]:
            raise ValueError(f"{key} is {label.shape[:2]}, the picture is {picture.shape[:2]}")
    return Room(picture, labels, scene)


class RoomsSplit(Dataset[dict[str, Tensor]]):
    """One split as a data set; items are asked for as (epoch, index).

    Args:
        shards: Where the rooms come from.
        tasks: Label keys.
        mean: Of the input normalisation.
        std: Of the input normalisation.
        augmentation: For training pictures; None changes nothing.
        seed: Of the augmentation.
        count: Use the first so many rooms only.
    """

    def __init__(
        self,
        shards: Shards,
        tasks: Sequence[str],
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: Augmentation | None = None,
        seed: int = 0,
        count: int | None = None,
    ) -> None:
        self.shards, self.tasks, self.mean, self.std = shards, tuple(tasks), mean, std
        self.augmentation, self.seed = augmentation, seed
        self.count = len(shards) if count is None else min(count, len(shards))

    def __len__(self) -> int:
        """Number of pictures."""
        return self.count

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        """Picture and labels, as :mod:`cut.data.batch` documents them."""
        epoch, index = key
        room = self.shards.room(index)
        arrays = {"image": room.picture, **{t: room.labels[t] for t in self.tasks if t != "scene"}}
        mirrored = False
        if self.augmentation is not None:
            arrays, mirrored = self._augmented(arrays, np.random.default_rng((self.seed, epoch, index)))
        item = {"image": normalise(arrays.pop("image"), self.mean, self.std)}
        for task, array in arrays.items():
            item[task] = _tensor(task, array, mirrored)
        if "scene" in self.tasks:
            item["scene"] = torch.tensor(room.scene)
        return item

    def _augmented(self, arrays: dict[str, np.ndarray], rng: np.random.Generator) -> tuple[dict[str, np.ndarray], bool]:
        assert self.augmentation is not None
        height, width = arrays["image"].shape[:2]
        crop = self.augmentation.crop or (height, width)
        if crop[0] > height or crop[1] > width:
            raise ValueError(f"crop {crop[0]}x{crop[1]} is larger than the pictures ({height}x{width})")
        mirrored = self.augmentation.mirror and bool(rng.random() < 0.5)
        top, left = int(rng.integers(height - crop[0] + 1)), int(rng.integers(width - crop[1] + 1))
        found = {k: a[top : top + crop[0], left : left + crop[1]] for k, a in arrays.items()}
        return {k: a[:, ::-1] if mirrored else a for k, a in found.items()}, mirrored


def _tensor(task: str, array: np.ndarray, mirrored: bool) -> Tensor:
    """A label as a tensor; a mirrored picture's normals point the other way in x."""
    array = np.ascontiguousarray(array)
    if task == "seg":
        return torch.from_numpy(array).long()
    if task == "normal":
        vectors = torch.from_numpy(array).permute(2, 0, 1).float() / 32767
        return vectors * torch.tensor([-1.0, 1.0, 1.0]).view(3, 1, 1) if mirrored else vectors
    if task == "depth":
        return torch.from_numpy(array.astype(np.float32))[None] / 1000
    return torch.from_numpy(array.astype(np.float32))[None]


class Rooms(MultiTaskData):
    """The Rooms data module.

    Args:
        root: Folder of a set; None is the embedded one.
        tasks: Which of seg, normal, depth, edge, keypoint, scene.
        batch_size: Pictures per batch and process.
        num_workers: Loader processes.
        seed: Seed of order, augmentation and scoring batches.
        mean: Mean of the input normalisation.
        std: Standard deviation of it.
        augmentation: Of training pictures.
        subset: Use the first so many pictures of each split only.
    """

    name = "rooms"

    def __init__(
        self,
        root: str | None = None,
        tasks: Sequence[str] = TASKS,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        augmentation: Augmentation | None = None,
        subset: int | None = None,
    ) -> None:
        unknown = [t for t in tasks if t not in TASKS]
        if unknown or len(set(tasks)) != len(tasks) or not tasks:
            raise ValueError(f"Rooms tasks {list(tasks)}; allowed: some of {list(TASKS)}, each once")
        self.root = EMBEDDED if root is None else Path(root)
        self.meta = read_meta(self.root)
        super().__init__([self._task(t) for t in tasks], batch_size, num_workers, seed, mean, std)
        self.augmentation = augmentation or Augmentation()
        self.subset = subset

    def _task(self, name: str) -> Task:
        weight = WEIGHTS[name]
        if name == "seg":
            return segmentation(self.meta["classes"], weight=weight)
        if name == "scene":
            return classification(self.meta["room_types"], weight=weight)
        if name == "normal":
            return normals(weight=weight)
        return depth(weight=weight) if name == "depth" else regression_map(name, weight)

    def setup(self, stage: str | None = None) -> None:
        """Check all files and open the splits.

        Raises:
            ValueError: If a file is missing or damaged.
        """
        if self.splits:
            return
        check_files(self.root, self.meta)
        names = [t.name for t in self.tasks]
        shards = {split: Shards(self.root, split, self.meta) for split in SPLITS}
        plain = {s: RoomsSplit(shards[s], names, self.mean, self.std, count=self.subset) for s in SPLITS}
        augmented = RoomsSplit(shards["train"], names, self.mean, self.std, self.augmentation, self.seed, self.subset)
        self.splits = {"train": augmented, "val": plain["val"], "test": plain["test"], "plain": plain["train"]}

    @property
    def description(self) -> dict[str, Any]:
        """Name, seed, sizes and the hash of the set's file list, for records."""
        digest = hashlib.sha256(json.dumps(self.meta["files"], sort_keys=True).encode()).hexdigest()[:12]
        return super().description | {"set_seed": self.meta.get("seed"), "size": self.meta.get("size"), "hash": digest}
