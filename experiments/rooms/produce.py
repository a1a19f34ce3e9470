"""A whole set: one job per room, on all cores, taken up again where it was stopped."""

import importlib.util
import json
import multiprocessing
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from experiments.rooms.catalog import Model, read_catalog
from experiments.rooms.furnish import furnish
from experiments.rooms.pack import SPLITS, Room, pack, write_atomically, write_part
from experiments.rooms.plan import ROOM_TYPES

SAMPLES = 16
SMALLEST, LARGEST = 16, 1024
NEEDED = ("mitsuba", "trimesh", "embreex", "pyoidn")


@dataclass(frozen=True)
class Settings:
    """What decides every pixel of a set: number of rooms by split, picture size, seed, light paths."""

    train: int
    val: int
    test: int
    height: int
    width: int
    seed: int
    samples: int = SAMPLES


def parse_size(text: str) -> tuple[int, int]:
    """Read "HxW", for example "96x128".

    Raises:
        ValueError: It is not of that form or out of range.

    >>> parse_size("96x128")
    (96, 128)
    """
    try:
        height, width = (int(side) for side in text.lower().split("x"))
    except ValueError as error:
        raise ValueError(f"unknown size {text!r}; it is HEIGHTxWIDTH, for example 96x128") from error
    if not all(SMALLEST <= side <= LARGEST for side in (height, width)):
        raise ValueError(f"size {text!r} is out of range; sides are {SMALLEST} to {LARGEST} pixels")
    return height, width


def parse_splits(text: str, num: int) -> dict[str, int]:
    """Share a number of rooms out over the splits, "train:0.75,val:0.1,test:0.15".

    Raises:
        ValueError: Unknown split, a share that is no positive number, or no room at all.

    >>> parse_splits("train:0.75,val:0.1,test:0.15", 100)
    {'train': 75, 'val': 10, 'test': 15}
    """
    if num < 1:
        raise ValueError(f"number of rooms {num} is not positive")
    shares = dict.fromkeys(SPLITS, 0.0)
    for item in text.split(","):
        name, _, share = item.partition(":")
        try:
            value = float(share)
        except ValueError as error:
            raise ValueError(f"split {item!r} is not NAME:SHARE") from error
        if name not in shares or not 0 <= value < float("inf"):
            raise ValueError(f"unknown split {item!r}; known: {', '.join(SPLITS)}, each with a share >= 0")
        shares[name] = value
    total = sum(shares.values())
    if total == 0:
        raise ValueError(f"the splits {text!r} share nothing out")
    edges = np.round(np.cumsum([0, *shares.values()]) / total * num).astype(int)
    return {name: int(count) for name, count in zip(SPLITS, np.diff(edges), strict=True)}


Job = tuple[Settings, Path, Path, str, int]


@cache
def _models(furniture: Path) -> tuple[Model, ...]:
    return tuple(read_catalog(furniture))


def make_room(settings: Settings, furniture: Path, split: str, number: int) -> Room:
    """Plan, build and render one room; the same arguments give the same room, bit for bit.

    Args:
        settings: Of the set.
        furniture: Folder of the archives.
        split: Test rooms use the held-out models and no others; train and val use the rest.
        number: Which room of its split.
    """
    # These need the extra "render", which reading and drawing a set does without.
    from experiments.rooms.render import render
    from experiments.rooms.scene import build
    from experiments.rooms.view import Eye, choose

    rng = np.random.default_rng([settings.seed, SPLITS.index(split), number])
    models = [model for model in _models(furniture) if model.held_out == (split == "test")]
    room_type = ROOM_TYPES[number % len(ROOM_TYPES)]
    plan = furnish(room_type, models, rng)
    eye = Eye(build(plan, furniture, rng))
    camera = choose(plan, eye, rng)
    labels = eye.see(camera, settings.height, settings.width)
    light_seed = int(rng.integers(1 << 30))
    picture = render(eye, camera, settings.height, settings.width, settings.samples, light_seed)
    names = {item.model.name for item in plan.placed} | {item.model.name for item in plan.openings}
    entry = {
        "id": f"{split}-{number:05d}",
        "room_type": room_type,
        "seed": settings.seed,
        "models": sorted(names),
    }
    return Room(entry, picture, labels)


def render_set(settings: Settings, furniture: Path, out: Path, processes: int | None = None) -> dict[str, Any]:
    """Render a set into a folder and give its ``meta.json``; a stopped run goes on where it was.

    Args:
        settings: What to render.
        furniture: Folder of the archives.
        out: Where the set goes.
        processes: How many at once; default one for each core.

    Raises:
        ValueError: The folder cannot be written or holds rooms of other settings, or the extra "render" is
            not installed.
        RuntimeError: A process died; the same call goes on from there.
    """
    _require_renderer()
    parts = _open(out, settings)
    if parts is None:
        meta: dict[str, Any] = json.loads((out / "meta.json").read_text())
        return meta
    jobs = [job for job in _jobs(settings) if not (parts / f"{job[0]}-{job[1]:05d}.zip").exists()]
    total = settings.train + settings.val + settings.test
    columns = (
        TextColumn("rooms"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(),
    )  # fmt: skip
    tasks = [(settings, furniture, parts, *job) for job in jobs]
    workers = max(1, min(processes or os.cpu_count() or 1, len(jobs)))
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("rooms", total=total, completed=total - len(jobs))
        for _ in map(_work, tasks) if workers == 1 else _in_parallel(tasks, workers):
            progress.advance(bar)
    meta = pack(parts, out, (settings.height, settings.width), settings.seed)
    write_atomically(out / "settings.json", _text(settings))
    shutil.rmtree(parts)
    return meta


def _require_renderer() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"rendering needs {', '.join(missing)}: pip install 'cut[render]'")


def _in_parallel(tasks: list[Job], workers: int) -> Iterable[None]:
    """Work on all tasks at once; yields after each."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker)
    try:
        for done in as_completed([pool.submit(_work, task) for task in tasks]):
            yield done.result()
    except BrokenProcessPool as error:
        raise RuntimeError("a rendering process died; run the same command again to go on") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """One thread for each process, and an end with the parent, however that ended."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OIDN_NUM_THREADS"):
        os.environ[name] = "1"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(task: Job) -> None:
    settings, furniture, parts, split, number = task
    write_part(parts, make_room(settings, furniture, split, number))


def _jobs(settings: Settings) -> Iterator[tuple[str, int]]:
    """All rooms, the splits interleaved, so that a stopped run has its share of each."""
    counts = {split: getattr(settings, split) for split in SPLITS}
    order = [((number + 0.5) / count, split, number) for split, count in counts.items() for number in range(count)]
    for _, split, number in sorted(order):
        yield split, number


def _text(settings: Settings) -> bytes:
    return (json.dumps(asdict(settings)) + "\n").encode()


def _open(out: Path, settings: Settings) -> Path | None:
    """Make the folder of finished rooms; None where the whole set is there already."""
    parts = out / "parts"
    for place, finished in ((out / "settings.json", True), (parts / "settings.json", False)):
        if place.is_file():
            known = json.loads(place.read_text())
            if known != asdict(settings):
                raise ValueError(f"{out} holds rooms of other settings ({known}): choose another folder")
            if finished:
                return None
    try:
        parts.mkdir(parents=True, exist_ok=True)
        write_atomically(parts / "settings.json", _text(settings))
    except OSError as error:
        raise ValueError(f"cannot write to {out}: {error}") from error
    return parts
