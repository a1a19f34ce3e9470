"""Scale: the paper's largest network through every step on a small machine, and what its tables would take on GPUs.

    python -m experiments.scale             # DeepLab-ResNet34 with five 1024-wide heads, 137 M parameters
    python -m experiments.scale --estimate  # GPU hours and memory of the three tables, as in docs/paper-scale.md

Each step is timed, with the peak memory of the process while it runs. The labels are random: what is shown is that the
library's own functions fit into memory and time, not that anything is learned. It is ``paper_scale`` of ``make bench``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from cut import checkpoint, export, tasks
from cut.budget import Sparsity
from cut.compact import compact
from cut.cost import size_on_disk
from cut.decomposition import prunable
from cut.files import write_atomically
from cut.fusion import Vote
from cut.masks import apply_mask, make_mask
from cut.network import MultiTaskNet, NetworkConfig
from cut.records import peak_memory
from cut.scores import sensitivity
from cut.tasks import Task
from experiments import estimate

CONFIG = Path(__file__).parent.parent / "configs/model/deeplab_resnet34.yaml"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES = 17
TARGET = 0.9
BATCHES, PICTURES, SIDE = 2, 2, 64
MOST_SECONDS, MOST_BYTES = 600, 12 * 10**9
TOLERANCE = 1e-3  # between ONNX Runtime and PyTorch
STAGES = ("build", "score", "fuse", "cut", "compact", "save", "load", "export", "compare")


@dataclass(frozen=True)
class Stage:
    """One step: its name, seconds, and the process's peak resident bytes while it ran."""

    name: str
    seconds: float
    peak: int


@dataclass(frozen=True)
class Report:
    """A run of all steps.

    Attributes:
        stages: In order.
        params: Parameters of the dense network.
        sparsity: Zeros over Conv and Linear weights, after the cut.
        exact: Whether that is the budget to the weight.
        same: Whether the loaded model gives the compact one's outputs to the bit.
        difference: Largest difference between ONNX Runtime's outputs and the loaded model's.
        saved: Bytes of the compact model's files.
        exported: Bytes of the ONNX file.
        threads: Of PyTorch.
    """

    stages: tuple[Stage, ...]
    params: int
    sparsity: float
    exact: bool
    same: bool
    difference: float
    saved: int
    exported: int
    threads: int

    @property
    def seconds(self) -> float:
        """Of all steps."""
        return sum(s.seconds for s in self.stages)

    @property
    def peak(self) -> int:
        """Peak resident bytes over all steps."""
        return max(s.peak for s in self.stages)

    @property
    def right(self) -> bool:
        """Whether the budget is met exactly, loading changes nothing, and ONNX agrees."""
        return self.exact and self.same and self.difference <= TOLERANCE

    @property
    def within(self) -> bool:
        """Whether it was right, and within the time and the memory that are promised."""
        return self.right and self.seconds <= MOST_SECONDS and self.peak <= MOST_BYTES


def _forget_peak() -> None:
    """Start the process's peak anew, where the kernel can; elsewhere a step's peak is the highest so far."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


class Clock:
    """Times steps; shows which one runs."""

    def __init__(self) -> None:
        self.stages: list[Stage] = []
        self._progress = Progress(console=Console(stderr=True), transient=True)
        self._bar = self._progress.add_task("", total=len(STAGES))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Show the bar."""
        with self._progress:
            yield

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time one step."""
        self._progress.update(self._bar, description=name)
        _forget_peak()
        start = time.perf_counter()
        yield
        self.stages.append(Stage(name, round(time.perf_counter() - start, 3), peak_memory()))
        self._progress.advance(self._bar)


def paper_config() -> NetworkConfig:
    """The network of ``configs/model/deeplab_resnet34.yaml``."""
    return NetworkConfig(**yaml.safe_load(CONFIG.read_text())["model"]["init_args"]["network"])


def five_tasks() -> list[Task]:
    """Tiny-Taskonomy's five tasks: 17, 3, 1, 1 and 1 channels."""
    return [
        tasks.segmentation([str(i) for i in range(CLASSES)]),
        tasks.normals(),
        tasks.depth(),
        tasks.regression_map("keypoint"),
        tasks.regression_map("edge"),
    ]


def random_batch(count: int, side: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Noise with labels that the five tasks allow: pictures [count, 3, side, side]."""

    def uniform(channels: int) -> Tensor:
        return torch.rand(count, channels, side, side, generator=generator)

    return {
        "image": torch.randn(count, 3, side, side, generator=generator),
        "seg": torch.randint(CLASSES, (count, side, side), generator=generator),
        "normal": torch.nn.functional.normalize(uniform(3) - 0.5, dim=1),
        "depth": uniform(1) + 0.5,
        "keypoint": uniform(1),
        "edge": uniform(1),
    }


def run(folder: Path, config: NetworkConfig | None = None, side: int = SIDE) -> Report:
    """Build, score, fuse, cut at 90 %, compact, save, load, export, compare.

    Args:
        folder: For the model's files and the ONNX file.
        config: Default: the paper's network.
        side: Height and width of the scoring pictures.

    Returns:
        What it took and whether the results are right; never a refusal for being slow.
    """
    clock, config = Clock(), config or paper_config()
    generator = torch.Generator().manual_seed(0)
    batches = [random_batch(PICTURES, side, generator) for _ in range(BATCHES)]
    image, kept = batches[0]["image"], five_tasks()
    names, losses = [t.name for t in kept], {t.name: t.loss for t in kept}
    with clock.running():
        with clock("build"):
            torch.manual_seed(0)
            net = MultiTaskNet({t.name: t.channels for t in kept}, config=config).eval()
        params = sum(p.numel() for p in net.parameters())
        with clock("score"):
            scores = sensitivity(net, batches, losses, names)
        with clock("fuse"):
            mask = make_mask(net, scores, batches[0], losses, names, fusion=Vote(0.5), budget=Sparsity(TARGET))
        del scores
        with clock("cut"):
            apply_mask(net, mask)
        weights = prunable(net)
        total = sum(w.numel() for w in weights.values())
        zeros = sum(int((~mask[n]).sum()) for n in weights)
        with clock("compact"):
            small = compact(net, names, mask, image)
        del net, mask, weights
        with clock("save"):
            saved = checkpoint.save(small, folder / "compact")
        with torch.no_grad():
            expected = small(image)
        del small
        with clock("load"):
            loaded = checkpoint.load(folder / "compact")
        with torch.no_grad():
            same = all(torch.equal(out, expected[t]) for t, out in loaded(image).items())
        path = folder / "cut.onnx"
        with clock("export"):
            meta = export.metadata(kept, MEAN, STD, (side, side))
            export.export_onnx(loaded, path, image, tasks=names, meta=meta)
        with clock("compare"):
            difference = max(export.parity(path, loaded, [image]).values())
    exact = zeros == round(TARGET * total)
    sizes = (saved, size_on_disk(path), torch.get_num_threads())
    return Report(tuple(clock.stages), params, zeros / total, exact, same, difference, *sizes)


def paper_scale() -> tuple[float, str, bool, str]:
    """Seconds of a run in a process of its own, the target, whether it is met, and how: a line of ``make bench``.

    Raises:
        CalledProcessError: If the run died.
    """
    command = [sys.executable, "-m", "experiments.scale", "--json"]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if found.returncode not in (0, 1):
        raise subprocess.CalledProcessError(found.returncode, command)
    content = json.loads(found.stdout.splitlines()[-1])
    content["stages"] = tuple(Stage(**s) for s in content["stages"])
    report = Report(**content)
    steps = ", ".join(f"{s.name} {s.seconds:.1f} s {s.peak / 1e9:.1f} GB" for s in report.stages)
    detail = (
        f"{report.params / 1e6:.1f} M parameters, 5 tasks, {report.threads} threads, peak {report.peak / 1e9:.2f} GB: "
        f"{steps}; budget exact: {report.exact}, same after loading: {report.same}, "
        f"ONNX differs by {report.difference:.0e}"
    )
    return report.seconds, f"<= {MOST_SECONDS} s, <= {MOST_BYTES // 10**9} GB", report.within, detail


def print_report(report: Report) -> None:
    """The steps on the terminal."""
    table = Table(
        "step", "seconds", "peak GB", title=f"{report.params / 1e6:.2f} M parameters, {report.threads} threads"
    )
    for stage in report.stages:
        table.add_row(stage.name, f"{stage.seconds:.1f}", f"{stage.peak / 1e9:.2f}")
    table.add_row("all", f"{report.seconds:.1f}", f"{report.peak / 1e9:.2f}", style="bold")
    console = Console()
    console.print(table)
    console.print(
        f"sparsity {report.sparsity:.6f}, exact: {report.exact}; same after loading: {report.same}; ONNX differs by "
        f"{report.difference:.1e}; files: compact {report.saved / 1e6:.0f} MB, ONNX {report.exported / 1e6:.0f} MB; "
        f"within {MOST_SECONDS} s and {MOST_BYTES / 1e9:.0f} GB: {report.within}"
    )


def _options(argv: Sequence[str] | None) -> Mapping[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m experiments.scale", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    parser.add_argument("--estimate", action="store_true", help="print GPU hours and memory of the paper's tables")
    parser.add_argument("--write", action="store_true", help="with --estimate: put it into docs/paper-scale.md")
    return vars(parser.parse_args(argv))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 1 if a run took more than promised or its results are wrong."""
    options = _options(argv)
    if options["estimate"]:
        text = estimate.page()
        print(text)
        if options["write"]:
            write_atomically(estimate.PAGE, estimate.updated(estimate.PAGE.read_text(), text))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        report = run(Path(folder))
    if options["json"]:
        print(json.dumps(asdict(report)))
    else:
        print_report(report)
    return 0 if report.within else 1


if __name__ == "__main__":
    sys.exit(main())
