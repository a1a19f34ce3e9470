"""Cost: what a model takes in parameters, multiply-accumulates, bytes on disk and time on this machine."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cut.compact import keep_tasks
from cut.masks import apply_mask


@dataclass(frozen=True)
class Cost:
    """What a model takes.

    Attributes:
        params: Parameters, tied ones counted once.
        nonzero: Those that are not zero.
        macs: Multiply-accumulates for one input of the example's size, in convolutions and matrix products
            (linear layers, attention); nothing else is counted. An unstructured mask does not change them.
        bytes: Bytes on disk, None if no file was given.
    """

    params: int
    nonzero: int
    macs: int
    bytes: int | None = None


@dataclass(frozen=True)
class Latency:
    """Milliseconds per call: median and 95th percentile over ``repeats`` calls on ``threads`` threads."""

    median_ms: float
    p95_ms: float
    repeats: int
    threads: int


def cost(
    model: nn.Module,
    example: Tensor,
    tasks: Sequence[str] | None = None,
    mask: Mapping[str, Tensor] | None = None,
    *,
    path: str | Path | None = None,
) -> Cost:
    """What a model takes for one input; the model is left as it is.

    Args:
        model: Any module.
        example: An input batch; the cost is that of one of its entries.
        tasks: Count the model as it is when only these tasks are kept (it then returns ``{task: Tensor}``).
        mask: Parameter name to bool, True = kept; counted as zero is also what it cuts.
        path: The model's file or folder.

    Raises:
        ValueError: If a task is unknown, the mask does not fit, or there is no such file.
    """
    size = None if path is None else size_on_disk(path)
    if tasks is not None:
        model = keep_tasks(model, tasks, example, mask=mask)
    elif mask is not None:
        model = copy.deepcopy(model)
        apply_mask(model, mask)
    parameters = list(model.parameters())
    return Cost(
        params=sum(p.numel() for p in parameters),
        nonzero=sum(int(torch.count_nonzero(p)) for p in parameters),
        macs=macs(model, example),
        bytes=size,
    )


def macs(model: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of the model for the first entry of the example, in eval mode.

    Example:
        >>> macs(nn.Conv2d(3, 8, 3, bias=False), torch.zeros(4, 3, 10, 10)) == 8 * 8 * 8 * 3 * 9
        True
    """
    modes = [(m, m.training) for m in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    try:
        # Fused attention on a CPU is not counted, plain matrix products are.
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(example[:1])
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in modes:
            module.training = training
    return counter.get_total_flops() // 2


def size_on_disk(path: str | Path) -> int:
    """Bytes of a file, or of all files below a folder.

    Raises:
        ValueError: If there is neither.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"no file or folder {path}")
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files)


def latency(fn: Callable[[], Any], *, threads: int = 1, warmup: int = 5, repeats: int = 30) -> Latency:
    """Time of a call on this machine, which should be idle.

    Args:
        fn: Called without arguments; its result is dropped. PyTorch runs it without gradients; another
            runtime has its own setting for threads, which must agree with ``threads``.
        threads: PyTorch's threads during the measurement; put back afterwards.
        warmup: Calls before the clock starts.
        repeats: Timed calls.

    Raises:
        ValueError: If ``threads`` or ``repeats`` is less than one or ``warmup`` negative.
    """
    if threads < 1 or repeats < 1 or warmup < 0:
        raise ValueError(f"threads {threads}, repeats {repeats}, warmup {warmup}: allowed are >= 1, >= 1, >= 0")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            for _ in range(warmup):
                fn()
            times = [_milliseconds(fn) for _ in range(repeats)]
    finally:
        torch.set_num_threads(before)
    return summary(times, threads)


def summary(times: Sequence[float], threads: int) -> Latency:
    """Median and 95th percentile of the times of single calls.

    Args:
        times: Milliseconds, at least one.
        threads: Those that the calls ran on.
    """
    ordered, repeats = sorted(times), len(times)
    p95 = ordered[min(repeats - 1, -(-95 * repeats // 100) - 1)]
    return Latency(statistics.median(ordered), p95, repeats, threads)


def _milliseconds(fn: Callable[[], Any]) -> float:
    start = time.perf_counter_ns()
    fn()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter_ns() - start) / 1e6
