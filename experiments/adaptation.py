"""Adaptation: what happens from the moment a new task arrives, as a callback for :mod:`experiments.run`.

A run for a new task starts from the backbone of a model that was never trained for it, with a fresh head. Before the
cut the head is fitted on a few pictures over the frozen backbone, the same for every method: through a random head no
score and no gradient says anything about the task. The time and the memory until the sub-network is ready are
measured, and the test set is looked at after set numbers of steps.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from cut.library import Library
from cut.model import MultiTaskModel
from cut.neighbours import SimilarTasks
from cut.pruning import Pruning
from cut.records import peak_memory
from experiments.experts import EXPERTS, WithExperts
from experiments.probe import fit_head

STEPS = (0, 20, 60, 100)


def load_backbone(model: MultiTaskModel, folder: str | Path) -> None:
    """Load the backbone of a dense run; the heads stay as they are.

    Raises:
        ValueError: If the run's backbone is another one.
    """
    path, start = Path(folder) / "last.ckpt", "network.backbone."
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    theirs = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
    mine = model.network.backbone.state_dict()
    wrong = sorted(theirs.keys() ^ mine.keys()) or sorted(k for k in mine if mine[k].shape != theirs[k].shape)
    if wrong:
        raise ValueError(f"{path} has another backbone: {len(wrong)} tensors differ, the first is {wrong[0]!r}")
    model.network.backbone.load_state_dict(theirs)


def from_start(pruning: Pruning, folder: str | Path) -> None:
    """Let a scorer of similar tasks find its library, and a similarity its classifiers, in the dense run's folder."""
    scorer = pruning.scorer
    if not isinstance(scorer, SimilarTasks):
        return
    if (Path(folder) / scorer.library.folder).is_dir():
        scorer.library = Library(Path(folder) / scorer.library.folder)
    if isinstance(scorer.similarity, WithExperts):
        scorer.similarity.folder = Path(folder) / EXPERTS


def _resident() -> int:
    """Resident bytes of this process now, 0 where the system does not say."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    line = next(x for x in status.read_text().splitlines() if x.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def _forget_peak() -> None:
    """Let the process's peak memory start from what it holds now, where the system allows that."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


class Adaptation(pl.Callback):
    """Fit the new head, measure what it takes until the sub-network is ready, and follow the adaptation.

    It has to come after the pruning callback, so that an epoch begins for it when the cut is made.

    Args:
        at: Steps after which the test set is looked at; 0 = right after the cut. The last one is the run's end.
        head_steps: Steps of the new head alone, before anything is scored.
        head_batches: Batches that it sees, of the data's size: the first of the scoring batches.
        head_rate: Its learning rate.

    Attributes:
        facts: For the record: seconds, memory, similarities and the curve.

    Raises:
        ValueError: For a number that is not allowed.
    """

    def __init__(
        self, at: Sequence[int] = STEPS, head_steps: int = 40, head_batches: int = 4, head_rate: float = 3e-3
    ) -> None:
        if list(at) != sorted(set(at)) or min(at, default=-1) < 0:
            raise ValueError(f"steps {list(at)}; allowed: numbers of at least 0, in rising order")
        if head_steps < 0 or head_batches < 1 or head_rate <= 0:
            raise ValueError(
                f"head_steps={head_steps}, head_batches={head_batches}, head_rate={head_rate}; "
                "allowed: at least 0 steps, at least 1 batch, a rate above 0"
            )
        self.at, self.head_steps, self.head_batches, self.head_rate = list(at), head_steps, head_batches, head_rate
        self.facts: dict[str, Any] = {}
        self._start, self._resident = 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        """What is known so far; plain numbers."""
        return {"facts": self.facts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the facts of a checkpoint."""
        self.facts = dict(state_dict["facts"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The new task arrives: start the clock and fit its head."""
        if self.facts:
            return
        _forget_peak()
        self._resident, self._start = _resident(), time.perf_counter()
        module: Any = pl_module
        data: Any = trainer
        task = _only(module.active)
        found = data.datamodule.score_batches(self.head_batches)
        batches = [{k: v.to(module.device) for k, v in b.items()} for b in found]
        fit_head(module.network, task, batches, module.losses[task], self.head_steps, self.head_rate)
        self.facts = {"task": task, "head_seconds": round(time.perf_counter() - self._start, 3), "curve": []}

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The cut is made: stop the clock, and look at the test set before any step."""
        if trainer.current_epoch or "ready_seconds" in self.facts:
            return
        self.facts["ready_seconds"] = round(time.perf_counter() - self._start, 3)
        self.facts["ready_memory"] = max(0, peak_memory() - self._resident)
        callbacks: Any = trainer
        scorer = next(c for c in callbacks.callbacks if isinstance(c, Pruning)).scorer
        if isinstance(scorer, SimilarTasks):
            told = {n: round(v, 6) if abs(v) < float("inf") else None for n, v in scorer.similarities.items()}
            self.facts |= {"similarities": told, "neighbours": {n: round(w, 6) for n, w in scorer.weights.items()}}
        if 0 in self.at:
            self._look(trainer, pl_module, 0)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the test set after a step of the list; the pruning callback has applied its mask by now."""
        if trainer.global_step in self.at[:-1]:
            self._look(trainer, pl_module, trainer.global_step)

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        module: Any = pl_module
        data: Any = trainer
        limit = trainer.limit_test_batches
        loader = data.datamodule.test_dataloader()
        found = module.evaluate(islice(loader, limit if isinstance(limit, int) else None), "test")
        self.facts["curve"].append({"step": step, **{k: round(v, 6) for k, v in found.items()}})

    def told(self, metrics: Mapping[str, float], step: int) -> dict[str, Any]:
        """The facts with the run's last metrics at the end of the curve."""
        last = {"step": step, **{f"test/{k}": round(v, 6) for k, v in metrics.items()}}
        return {**self.facts, "curve": [*self.facts.get("curve", []), last]}


def _only(tasks: Sequence[str]) -> str:
    if len(tasks) != 1:
        raise ValueError(f"tasks {list(tasks)}; a new task comes alone: allowed is one")
    return tasks[0]
