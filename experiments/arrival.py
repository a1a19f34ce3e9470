"""Arrival: what it costs to cut a model for a new task by its neighbours' masks, against scoring it from scratch."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from cut.budget import Sparsity
from cut.data.rooms import TASKS, Rooms
from cut.fusion import Fusion, Vote
from cut.library import Library, base_hash
from cut.masks import make_mask
from cut.neighbours import SimilarTasks
from cut.network import MultiTaskNet, NetworkConfig
from cut.poll import Poll
from cut.scorebatches import FEW
from cut.scores import Scores, sensitivity
from cut.selection import Mask
from experiments.experts import any_loss

NEW = "scene"
SCORING, SIMILAR = 50, 6  # batches: CUT's default, and at most an eighth of them
SPARSITY = 0.9
TARGET = 0.2


@dataclass
class Setting:
    """A network with a new task's head, a library over its backbone, and the new task's pictures."""

    network: MultiTaskNet
    batches: list[Any]
    losses: dict[str, Callable[..., Any]]
    library: Library


def setting(folder: Path, scoring: int = SCORING, batch_size: int = 16, backbone: str = "mobilenetv2_100") -> Setting:
    """MobileNetV2 on Rooms; five library tasks and the room's type as the new one.

    Args:
        folder: Of the library.
        scoring: Batches of the new task.
        batch_size: Pictures of each.
        backbone: Of the network.
    """
    torch.manual_seed(0)
    data = Rooms(batch_size=batch_size)
    channels = {t.name: t.channels for t in data.tasks}
    config = NetworkConfig(backbone=backbone, weights="auto", output_stride=16)
    network = MultiTaskNet(channels, [NEW], config).eval()
    batches = data.score_batches(scoring)
    losses: dict[str, Callable[..., Any]] = {t.name: t.loss for t in data.tasks}
    known = [t for t in TASKS if t != NEW]
    scores = sensitivity(network, batches[:2], losses, known)
    few = _few(batches[0])
    shared = sorted(set.intersection(*(set(per) for per in scores.values())))
    library, base = Library(folder), base_hash(network, shared)
    stand_ins = dict.fromkeys(losses, any_loss)
    for task in known:
        mask = make_mask(network, {task: scores[task]}, few, stand_ins, [task], budget=Sparsity(0.8), silent=False)
        kept = {n: mask[n] for n in shared}
        library.add(kept, {"task": task, "units": "weights", "base": base}, scores[task], shared)
    for task in known:
        del network.heads[task]
    network.select([NEW])
    return Setting(network, batches, {NEW: losses[NEW]}, library)


def _few(batch: Any) -> Any:
    """A few pictures of a batch: enough to see what belongs to which task, as the pruning callback does."""
    return {k: v[:FEW] for k, v in batch.items()}


def voted(s: Setting, batches: int = SIMILAR) -> Mask:
    """The new task's mask by its neighbours' vote, library read from disk."""
    scorer = SimilarTasks(Library(s.library.folder), batches=batches)
    scores = scorer(s.network, s.batches[:batches], s.losses, [NEW])
    few = _few(s.batches[0])
    return make_mask(
        s.network, scores, few, s.losses, [NEW], fusion=Poll(), budget=Sparsity(SPARSITY), floor_share=0.02
    )


def scored(s: Setting) -> Mask:
    """The new task's mask by CUT's score of it on all batches."""
    scores = sensitivity(s.network, s.batches, s.losses, [NEW])
    return _cut(s, scores, Vote(0.5))


def _cut(s: Setting, scores: Mapping[str, Scores], fusion: Fusion) -> Mask:
    options: dict[str, Any] = {"fusion": fusion, "budget": Sparsity(SPARSITY), "floor_share": 0.02}
    return make_mask(s.network, scores, _few(s.batches[0]), s.losses, [NEW], **options)


def newtask_cost_ratio(pairs: int = 5) -> tuple[float, str, bool, str]:
    """Seconds from a new task to its mask by voting / by scoring from scratch, timed in turns.

    Returns:
        The ratio, the target, whether it is met with equal sizes, and how it came about.
    """
    with tempfile.TemporaryDirectory() as folder:
        s = setting(Path(folder))
        sides: dict[str, Callable[[], Mask]] = {"vote": lambda: voted(s), "score": lambda: scored(s)}
        times: dict[str, list[float]] = {k: [] for k in sides}
        sizes: dict[str, int] = {}
        for i in track(range(pairs + 1), "a new task", transient=True):
            for name, run in sides.items():
                start = time.perf_counter()
                mask = run()
                if i:
                    times[name].append(time.perf_counter() - start)
                sizes[name] = sum(int(mask[n].sum()) for n in mask if mask[n].dim() > 1)
    a, b = (statistics.median(times[n]) for n in ("vote", "score"))
    same = sizes["vote"] == sizes["score"]
    detail = (
        f"{a:.2f} s by {SIMILAR} batches of 16 pictures and 5 library tasks against {b:.2f} s by {SCORING}, median of "
        f"{pairs} pairs; MobileNetV2 on Rooms, {SPARSITY:.0%} of the weights; both keep {sizes['vote']} weights: {same}"
    )
    return a / b, f"<= {TARGET}", a / b <= TARGET and same, detail
