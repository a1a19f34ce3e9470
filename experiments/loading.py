"""Loading: how many augmented NYU-v2 pictures the loader gives per second; ``loader_rate`` of ``make bench``.

    python -m experiments.loading [--root DIR] [--workers N]

Without a folder, a few synthetic pictures are written at 480x640 in AdaShare's layout, whose PNG files are about as
large as those of the real set, and linked under many names. They are augmented and cut to 321x321 as in
``configs/data/nyuv2.yaml``.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor

from cut.data.augmentation import Augmentation
from cut.data.nyuv2 import CLASSES40, NYUv2
from cut.data.published import FileSplit
from cut.files import write_atomically

TARGET = 60.0  # pictures per second with two workers
WORKERS, BATCH, PASSES = 2, 16, 5
SIZE, CROP = (480, 640), (321, 321)
FILES, LISTED = 24, 240  # pictures written, and training pictures of the index, which are links to them
STAGED = 24  # pictures of which the stages are timed in this process
AUGMENTATION = Augmentation(scale=(0.5, 1.5), crop=CROP, pad=True, uniform=True)


@dataclass(frozen=True)
class Rate:
    """What was measured.

    Attributes:
        per_second: Pictures per second of each pass.
        processor: Milliseconds of processor time per picture in all processes, which other programs do not change.
        stages: Milliseconds of processor time per picture in one process, by stage.
        same: Whether the workers' batches are those of this process.
    """

    per_second: tuple[float, ...]
    processor: float
    stages: dict[str, float]
    same: bool

    @property
    def median(self) -> float:
        """Pictures per second."""
        return statistics.median(self.per_second)


def _smooth(rng: np.random.Generator, cells: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """A smooth random picture, uint8 [H, W, 3]."""
    coarse = Image.fromarray(rng.integers(0, 256, (*cells, 3), dtype=np.uint8))
    return np.array(coarse.resize(size[::-1], Image.Resampling.BICUBIC))


def synthetic(rng: np.random.Generator, size: tuple[int, int] = SIZE) -> dict[str, np.ndarray]:
    """An example as AdaShare's files hold it: smooth shapes with a camera's grain, a third of the normals unknown."""
    height, width = size
    grain = rng.integers(-1, 3, (height, width, 1))
    image = (_smooth(rng, (height // 24, width // 24), size) + grain).clip(0, 255).astype(np.uint8)
    normal = _smooth(rng, (height // 8, width // 8), size).clip(0, 254)
    normal[_smooth(rng, (height // 60 + 1, width // 60 + 1), size)[..., 0] > 150] = 255
    shapes = _smooth(rng, (height // 120 + 1, width // 120 + 1), size)[..., 0] // 16
    depth = 1 + _smooth(rng, (3, 4), size)[..., 0].astype(np.float32) / 40
    return {"img": image, "seg": (shapes % len(CLASSES40)).astype(np.uint8), "normal_mask": normal, "depth": depth}


def _path(column: str, number: int) -> str:
    """Where a file of the set lies."""
    return f"nyu_train_val/training/{column}/{number:04d}.{'npy' if column == 'depth' else 'png'}"


def write_set(root: Path, files: int = FILES, listed: int = LISTED, size: tuple[int, int] = SIZE) -> Path:
    """Synthetic pictures in AdaShare's layout, each under many names, of which the last is for test; gives the folder.

    Names are links: a picture that is listed twice would be refused.
    """
    rng, columns = np.random.default_rng(0), ("img", "seg", "normal_mask", "depth")
    rows = [[_path(column, number) for column in columns] for number in range(listed + 1)]
    for number in range(files):
        for column, array in synthetic(rng, size).items():
            buffer = BytesIO()
            if column == "depth":
                np.save(buffer, array)
            else:
                Image.fromarray(array).save(buffer, "PNG")
            write_atomically(root / _path(column, number), buffer.getvalue())
    for number in range(files, listed + 1):
        for column in columns:
            (root / _path(column, number)).hardlink_to(root / _path(column, number % files))
    write_atomically(root / "nyu_v2_3task.json", json.dumps({"train": rows[:-1], "test": rows[-1:]}))
    return root


def _milliseconds(action: Callable[[], object], pictures: int) -> float:
    """Processor time per picture, the best of three: other processes cost no processor time of this one."""
    times = []
    for _ in range(3):
        start = time.process_time()
        action()
        times.append(time.process_time() - start)
    return 1e3 * min(times) / pictures


def stages(split: FileSplit, pictures: int = STAGED) -> dict[str, float]:
    """Milliseconds per picture in this process: decoding, zooming with all else that augments, labels, everything."""
    augmentation = split.augmentation or Augmentation(mirror=False)
    examples = split.examples[:pictures]
    read = [split.read(example) for example in examples]

    def zoom() -> list[tuple[dict[str, np.ndarray], bool]]:
        return [augmentation(arrays, np.random.default_rng((0, i))) for i, arrays in enumerate(read)]

    zoomed = zoom()

    def labels() -> None:
        for arrays, mirrored in zoomed:
            for name in split.kinds:
                split.layout.label(name, arrays[name], mirrored, split.legacy)

    count = len(examples)
    return {
        "decode": _milliseconds(lambda: [split.read(example) for example in examples], count),
        "zoom": _milliseconds(zoom, count),
        "labels": _milliseconds(labels, count),
        "all": _milliseconds(lambda: [split[0, i] for i in range(count)], count),
    }


def measure(
    root: Path, workers: int = WORKERS, passes: int = PASSES, augmentation: Augmentation = AUGMENTATION
) -> Rate:
    """Read the training pictures once to warm up, then ``passes`` times, in epochs of their own.

    Args:
        root: Folder of NYU-v2.
        workers: Loader processes.
        passes: Timed passes.
        augmentation: Of the pictures.

    Raises:
        ValueError: If it is no such set, or a file is damaged.
    """
    data = NYUv2(root, batch_size=BATCH, num_workers=workers, augmentation=augmentation)
    data.setup()
    split = data.splits["train"]
    assert isinstance(split, FileSplit)
    loader, rates, same, total, seconds = data.train_dataloader(), [], True, 0, -_in_children()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a worker has one, too
    for epoch in track(range(passes + 1), "loading pictures", transient=True, console=Console(stderr=True)):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        first: dict[str, Tensor] = {}
        start, begun, pictures = time.perf_counter(), time.process_time(), 0
        for batch in loader:
            pictures, first = pictures + len(batch["image"]), first or batch
        rates.append(pictures / (time.perf_counter() - start))
        total, seconds = total + pictures, seconds + time.process_time() - begun
        expected = [split[key] for _, key in zip(range(BATCH), loader.sampler, strict=False)]
        same &= all(torch.equal(value, torch.stack([e[key] for e in expected])) for key, value in first.items())
    del loader  # its processes end, and what they used is known
    processor = 1e3 * (seconds + _in_children()) / total
    found = Rate(tuple(rates[1:]), processor, stages(split), same)
    torch.set_num_threads(threads)
    return found


def _in_children() -> float:
    """Seconds of processor time of child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def loader_rate() -> tuple[float, str, bool, str]:
    """The bench's line: pictures per second, the target, whether it is met, and how."""
    with tempfile.TemporaryDirectory() as folder:
        rate = measure(write_set(Path(folder)))
    return rate.median, f">= {TARGET:g}", rate.median >= TARGET and rate.same, describe(rate)


def describe(rate: Rate, workers: int = WORKERS) -> str:
    """One line."""
    parts = ", ".join(f"{name} {value:.1f}" for name, value in rate.stages.items() if name != "all")
    spread = f"{min(rate.per_second):.0f} to {max(rate.per_second):.0f}"
    return (
        f"{rate.median:.0f} augmented {CROP[0]}x{CROP[1]} pictures a second, {workers} workers, median of "
        f"{len(rate.per_second)} passes ({spread}); {rate.processor:.1f} ms of processor time a picture in all, "
        f"{rate.stages['all']:.1f} in one process ({parts}); workers give the same batches: {rate.same}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure a folder, or synthetic pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="folder of NYU-v2; default: synthetic pictures")
    parser.add_argument("--workers", type=int, default=WORKERS, help=f"loader processes (default: {WORKERS})")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        print(describe(measure(args.root or write_set(Path(folder)), args.workers), args.workers))


if __name__ == "__main__":
    main()
