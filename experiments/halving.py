"""Halving: how much faster a model is whose channels were cut to half of its multiply-accumulates."""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

from cut.compact import compact
from cut.cost import macs
from cut.export import export_onnx, session
from cut.limits import MACs
from cut.masks import apply_mask
from cut.network import MultiTaskNet, NetworkConfig
from cut.scores import sensitivity
from cut.structured import make_unit_mask

CHANNELS = {"seg": 40, "normal": 3, "depth": 1}
SIZE = (128, 160)
ROUNDING, CALLS = 8, 10


def halved(size: tuple[int, int] = SIZE) -> tuple[nn.Module, nn.Module, nn.Module, Tensor]:
    """ResNet-18 with three heads: dense, masked to half the multiply-accumulates, and compact; and a picture."""
    torch.manual_seed(0)
    dense = MultiTaskNet(CHANNELS, config=NetworkConfig("resnet18")).eval()
    for module in dense.modules():  # random weights, but no branch that a fresh network has switched off
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    picture = torch.randn(1, 3, *size)
    batch: dict[str, Tensor] = {"image": torch.randn(2, 3, *size)}
    batch |= {t: torch.randn(2, c, *size) for t, c in CHANNELS.items()}
    losses: Any = {t: lambda out, b, task=t: F.l1_loss(out, b[task]) for t in CHANNELS}
    scores = sensitivity(dense, [batch], losses, list(CHANNELS))
    mask = make_unit_mask(dense, scores, batch, losses, list(CHANNELS), budget=MACs(0.5), rounding=ROUNDING)
    masked = copy.deepcopy(dense)
    apply_mask(masked, mask)
    return dense, masked, compact(dense, list(CHANNELS), mask, batch), picture


def compact_latency_ratio(pairs: int = 7) -> tuple[float, str, bool, str]:
    """Milliseconds of the compact file / of the dense file, in ONNX Runtime on one thread, timed in turns.

    Returns:
        The ratio, the target, whether it is met with equal outputs, and how it came about.
    """
    dense, masked, small, picture = halved()
    times: dict[str, list[float]] = {"compact": [], "dense": []}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        opened = {}
        for name, network in (("compact", small), ("dense", dense)):
            path = Path(folder) / f"{name}.onnx"
            export_onnx(network, path, picture, tasks=list(CHANNELS))
            opened[name] = session(path, threads=1)
        feed = {"image": picture.numpy()}
        for i in track(range(pairs + 1), "compact against dense", transient=True):
            for name, found in times.items():
                start = time.perf_counter()
                for _ in range(CALLS):
                    outputs = opened[name].run(None, feed)
                if i:
                    found.append((time.perf_counter() - start) / CALLS * 1e3)
                if name == "compact":
                    shipped = dict(zip(CHANNELS, map(torch.from_numpy, outputs), strict=True))
        worst = max(float((shipped[t] - o).abs().max() / o.abs().max()) for t, o in masked(picture).items())
    a, b = (statistics.median(times[n]) for n in ("compact", "dense"))
    share = macs(small, picture) / macs(dense, picture)
    detail = (
        f"{a:.1f} ms against {b:.1f} ms, median of {pairs} pairs of {CALLS} calls, one thread; "
        f"{share:.1%} of the MACs; largest relative difference from the masked model {worst:.1e}"
    )
    return a / b, "<= 0.6", a / b <= 0.6 and worst <= 1e-4, detail
