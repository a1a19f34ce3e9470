"""Measure the promises that the project makes and write them to ``runs/bench.json``.

Ratios are of two things timed in turns in one run on one machine, the median of at least five pairs, and come with a
check that both sides computed the same thing; ``loader_rate`` and ``paper_scale`` are absolute, so they need an idle
machine. ``python -m experiments.bench [--only NAME ...]``.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from cut.budget import Size, Sparsity
from cut.files import write_atomically
from cut.fusion import Ranking, Vote
from cut.network import MultiTaskNet, NetworkConfig
from cut.scores import Scores, sensitivity
from experiments import tracking
from experiments.arrival import newtask_cost_ratio
from experiments.halving import compact_latency_ratio
from experiments.loading import loader_rate
from experiments.scale import paper_scale

CHANNELS = {"seg": 40, "normal": 3, "depth": 1, "keypoint": 1, "edge": 1}
PAIRS = 5


def row(name: str, value: float, target: str, ok: bool, detail: str) -> dict[str, Any]:
    """One line of the result."""
    return {"name": name, "value": round(value, 4), "target": target, "ok": bool(ok), "detail": detail}


def interleaved(
    ours: Callable[[], Any], theirs: Callable[[], Any], what: str, pairs: int = PAIRS
) -> tuple[float, float]:
    """Median seconds of both, timed in turns after one warm-up each."""
    times: tuple[list[float], list[float]] = ([], [])
    for i in track(range(pairs + 1), what, transient=True):
        for side, run in enumerate((ours, theirs)):
            start = time.perf_counter()
            run()
            if i:
                times[side].append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


# --- scoring ---


class _MaskedConv(nn.Module):
    """A convolution whose frozen weight is multiplied by a mask parameter of ones, as the reference code does it."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv, self.mask = conv, nn.Parameter(torch.ones_like(conv.weight))
        conv.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv._conv_forward(x, self.conv.weight * self.mask, self.conv.bias)


def deeplab(
    tasks: list[str],
) -> tuple[MultiTaskNet, dict[str, Tensor], dict[str, Callable[[Tensor, Any], Tensor]]]:
    """DeepLab-ResNet34 with 1024-wide heads, a batch of 4 pictures of 64x64, and a loss per task."""
    torch.manual_seed(0)
    config = NetworkConfig(backbone="resnet34", output_stride=8, head="aspp", head_width=1024, dropout=0.0)
    net = MultiTaskNet({t: CHANNELS[t] for t in tasks}, config=config).eval()
    batch = {"image": torch.randn(4, 3, 64, 64), "seg": torch.randint(40, (4, 64, 64))}
    batch |= {t: torch.randn(4, CHANNELS[t], 64, 64) for t in tasks if t != "seg"}

    def loss(task: str) -> Callable[[Tensor, Any], Tensor]:
        measure = F.cross_entropy if task == "seg" else F.l1_loss
        return lambda out, b: measure(out, b[task])

    return net, batch, {t: loss(t) for t in tasks}


def naive_model(net: nn.Module) -> tuple[nn.Module, dict[str, _MaskedConv]]:
    """A copy of the network with a mask parameter on every convolution."""
    net, layers = copy.deepcopy(net), {}
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.Conv2d):
            parent, _, attribute = name.rpartition(".")
            layers[f"{name}.weight"] = _MaskedConv(module)
            setattr(net.get_submodule(parent), attribute, layers[f"{name}.weight"])
    return net, layers


def naive_scores(
    net: nn.Module,
    layers: dict[str, _MaskedConv],
    batches: list[Any],
    losses: dict[str, Any],
    tasks: list[str],
) -> dict[str, Scores]:
    """One full forward of all heads and one backward per task and batch; the sum of the masks' absolute gradients."""
    scores: dict[str, Scores] = {t: {} for t in tasks}
    for task in tasks:
        for batch in batches:
            net.zero_grad(set_to_none=True)
            losses[task](net(batch["image"])[task], batch).backward()
            for name, layer in layers.items():
                if layer.mask.grad is not None:
                    worth = layer.mask.grad.abs()
                    scores[task][name] = scores[task][name] + worth if name in scores[task] else worth
    return scores


def scoring_ratio(count: int, target: float) -> dict[str, Any]:
    """Seconds of per-task scoring / seconds of the naive procedure."""
    tasks = list(CHANNELS)[:count]
    net, batch, losses = deeplab(tasks)
    copied, layers = naive_model(net)
    results: dict[str, dict[str, Scores]] = {}

    def ours() -> None:
        results["ours"] = sensitivity(net, [batch], losses, tasks)

    def naive() -> None:
        results["naive"] = naive_scores(copied, layers, [batch], losses, tasks)

    a, b = interleaved(ours, naive, f"scoring, {count} tasks")
    worst = 0.0
    for task in tasks:
        for name, expected in results["naive"][task].items():
            scale = expected.abs().amax().clamp_min(1e-30)
            worst = max(worst, float((results["ours"][task][name] - expected).abs().amax() / scale))
    same = worst < 1e-4 and all(set(results["ours"][t]) == set(results["naive"][t]) for t in tasks)
    detail = f"{a:.2f} s against {b:.2f} s, median of {PAIRS} pairs; largest relative difference of scores {worst:.1e}"
    return row(f"scoring_ratio_{count}", a / b, f"<= {target}", a / b <= target and same, detail)


# --- memory ---


def _peak() -> int:
    """Peak resident bytes of this process so far.

    The kernel's VmHWM, where there is one: ru_maxrss of a child starts from what its parent held.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _resident() -> int:
    """Resident bytes now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory_child(which: str) -> int:
    """Bytes at the peak, in a process of its own: of scoring or an Adam step, model included; or of fusion, scores not.

    What is asked for is left out: the stored scores, and the mask.
    """
    if which == "fuse":
        scores = large_scores()
        total = sum({n: s.numel() for per in scores.values() for n, s in per.items()}.values())
        start = _resident()
        Sparsity(0.9).mask(scores, Vote(0.5), Size(total))
        return _peak() - start - total
    tasks = list(CHANNELS)[:3]
    start = _resident()
    net, batch, losses = deeplab(tasks)
    if which == "score":
        found = sensitivity(net, [batch], losses, tasks)
        return _peak() - start - sum(v.numel() * 4 for s in found.values() for v in s.values())
    optimizer = torch.optim.Adam(net.train().parameters(), lr=1e-5)
    for _ in range(2):  # the second step is the steady state: the optimiser's moments exist
        optimizer.zero_grad(set_to_none=True)
        outputs = net(batch["image"])
        torch.stack([losses[t](outputs[t], batch) for t in tasks]).sum().backward()
        optimizer.step()
    return _peak() - start


def measured_in_child(which: str) -> int:
    """:func:`memory_child` in a fresh process."""
    command = [sys.executable, "-m", "experiments.bench", "--memory-child", which]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def scoring_memory() -> dict[str, Any]:
    """Peak of scoring / peak of one Adam training step of the same batch; fresh processes, median of five pairs."""
    peaks: dict[str, list[int]] = {"score": [], "adam": []}
    for _ in track(range(PAIRS), "memory of scoring", transient=True):
        for which, found in peaks.items():
            found.append(measured_in_child(which))
    a, b = (statistics.median(peaks[w]) for w in ("score", "adam"))
    detail = f"{a / 2**20:.0f} MiB against {b / 2**20:.0f} MiB, weights included, stored scores left out"
    return row("scoring_memory_ratio", a / b, "<= 1.0", a / b <= 1.0, detail)


# --- fusion ---


def large_scores(tasks: int = 5, shared: int = 21_000_000, private: int = 23_000_000) -> dict[str, Scores]:
    """Scores like those of a 5-task DeepLab: 44 million a task, 21 million of them shared; layers of ResNet size."""
    g = torch.Generator().manual_seed(0)

    def draw(size: int) -> Tensor:
        return torch.randn(size, generator=g).mul_(torch.randn(size, generator=g)).abs_()

    layer, wide = 1_050_000, 5_750_000
    return {
        f"t{t}": {f"trunk.{i}": draw(layer) for i in range(shared // layer)}
        | {f"head{t}.{i}": draw(wide).mul_(0.1) for i in range(private // wide)}
        for t in range(tasks)
    }


def fuse_speedup() -> dict[str, Any]:
    """Seconds of ``torch.sort`` with indices per task / seconds of fusion and exact budget."""
    scores = large_scores()
    total = sum({n: s.numel() for per in scores.values() for n, s in per.items()}.values())
    result: dict[str, Any] = {}

    def ours() -> None:
        result.pop("mask", None)
        result["mask"] = Sparsity(0.9).mask(scores, Vote(0.5), Size(total))

    def sort() -> None:
        for per in scores.values():
            torch.sort(torch.cat([s.flatten() for s in per.values()]), descending=True)

    a, b = interleaved(ours, sort, "fusion of 5 x 44 M scores")
    mask = result.pop("mask")
    one_task = sum(s.numel() * 4 for s in scores["t0"].values())
    extra = measured_in_child("fuse") / one_task
    exact = sum(int(m.sum()) for m in mask.values()) == total - round(0.9 * total)
    same = exact and _equals_sorting()
    detail = (
        f"{a:.2f} s against {b:.2f} s, median of {PAIRS} pairs; extra memory {extra:.2f} copies of one task's scores; "
        f"budget met exactly: {exact}; equals full sorting at 2 M units: {same}"
    )
    return row("fuse_speedup", b / a, ">= 5, <= 3 copies", b / a >= 5 and extra <= 3 and same, detail)


def _equals_sorting() -> bool:
    """Whether the selected units are those of a full sort, at a size where that is cheap."""
    scores = {t: {n: s[: s.numel() // 100] for n, s in per.items()} for t, per in large_scores(3).items()}
    values = Ranking(scores, 0.5).values()
    flat = torch.cat([v.flatten() for v in values.values()])
    kept = len(flat) - round(0.9 * len(flat))
    expected = torch.zeros(len(flat), dtype=torch.bool)
    expected[flat.sort(stable=True).indices[:kept]] = True
    mask = Sparsity(0.9).mask(scores, Vote(0.5), Size(len(flat)))
    return torch.equal(torch.cat([mask[n].flatten() for n in values]), expected)


# --- the callback ---


def mask_step_overhead() -> dict[str, Any]:
    """Seconds in the pruning callback's step hook / seconds of a whole training step, MobileNetV2 on Rooms."""
    import lightning.pytorch as pl

    from cut.data.rooms import Rooms
    from cut.model import MultiTaskModel
    from cut.pruning import Pruning

    data = Rooms(tasks=("seg", "normal", "depth"), batch_size=16, subset=96)
    model = MultiTaskModel(data.tasks, NetworkConfig(backbone="mobilenetv2_100", output_stride=16))
    pruning = Pruning(Sparsity(0.9), batches=2)

    class Clock(pl.Callback):
        steps, seconds, begun = 0, 0.0, 0.0

        def on_train_batch_start(self, *_: Any) -> None:
            self.begun = time.perf_counter()

        def on_train_batch_end(self, *_: Any) -> None:
            self.seconds += time.perf_counter() - self.begun
            self.steps += 1

    clock = Clock()
    trainer = pl.Trainer(
        max_epochs=2,
        callbacks=[pruning, clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        accelerator="cpu",
    )
    trainer.fit(model, data)
    dead = all(not p[~pruning.mask[n]].any() for n, p in model.network.named_parameters() if n in pruning.mask)
    share = pruning.hook_seconds / clock.seconds
    detail = (
        f"{1e3 * pruning.hook_seconds / clock.steps:.2f} ms of {1e3 * clock.seconds / clock.steps:.0f} ms a step, "
        f"{clock.steps} steps; cut weights are zero at the end: {dead}"
    )
    return row("mask_step_overhead", share, "<= 0.03", share <= 0.03 and dead, detail)


MEASURES: dict[str, Callable[[], dict[str, Any]]] = {
    "scoring_ratio_3": lambda: scoring_ratio(3, 0.65),
    "scoring_ratio_5": lambda: scoring_ratio(5, 0.52),
    "scoring_memory_ratio": scoring_memory,
    "fuse_speedup": fuse_speedup,
    "mask_step_overhead": mask_step_overhead,
    "compact_latency_ratio": lambda: row("compact_latency_ratio", *compact_latency_ratio()),
    "newtask_cost_ratio": lambda: row("newtask_cost_ratio", *newtask_cost_ratio()),
    "loader_rate": lambda: row("loader_rate", *loader_rate()),
    "paper_scale": lambda: row("paper_scale", *paper_scale()),
}


def print_rows(rows: list[dict[str, Any]]) -> None:
    """The ratios beside their promises, on the terminal."""
    table = Table("promise", "measured", "target", "", "how")
    for r in rows:
        table.add_row(
            r["name"],
            f"{r['value']:.3g}",
            r["target"],
            "kept" if r["ok"] else "[bold red]not kept",
            r["detail"],
        )
    Console().print(table)


def main(argv: list[str] | None = None) -> None:
    """Run all measurements, or those named, one after the other; write the file after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(MEASURES), help="measure only these")
    parser.add_argument("--out", type=Path, default=Path("runs/bench.json"))
    parser.add_argument("--wandb", action="store_true", help="log the measurements to W&B too")
    parser.add_argument("--memory-child", choices=["score", "adam", "fuse"], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.memory_child:
        print(memory_child(args.memory_child))
        return
    rows = []
    for name in args.only or MEASURES:
        rows.append(MEASURES[name]())
        write_atomically(args.out, json.dumps(rows, indent=1) + "\n")
    print_rows(rows)
    if args.wandb:
        tracking.log_bench(rows, args.out.parent)


if __name__ == "__main__":
    main()
