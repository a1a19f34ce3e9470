"""History: what a run's callbacks keep for its record and for runs that start from it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from cut.model import MultiTaskModel


def save(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(content, part)
    os.replace(part, path)


class History(pl.Callback):
    """Metrics of every epoch, for the record; kept in checkpoints, so that a resumed run has them all.

    After an epoch with validation the test set is looked at too: a table says which epoch it reports
    (:func:`experiments.selection.select`), and only a table marked as legacy may choose by what it sees there.
    """

    def __init__(self) -> None:
        self.epochs: list[dict[str, Any]] = []
        self.seconds = 0.0
        self._start: float | None = None
        self._validated = False

    def state_dict(self) -> dict[str, Any]:
        """The epochs so far and the seconds they took."""
        return {"epochs": self.epochs, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the epochs of a checkpoint."""
        self.epochs, self.seconds = list(state_dict["epochs"]), float(state_dict["seconds"])

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Start the clock: scoring is over by now."""
        if self._start is None:
            self._start = time.perf_counter()

    def _stop(self) -> None:
        if self._start is not None:
            self.seconds += time.perf_counter() - self._start
            self._start = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock: evaluation is not training."""
        self._stop()
        self._validated = trainer.state.fn == "fit" and not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the epoch's numbers; validation has run by now."""
        self._stop()
        found = {k: float(v) for k, v in trainer.callback_metrics.items()}
        if not self._validated:
            found = {k: v for k, v in found.items() if not k.startswith("val/")}
        elif isinstance(pl_module, MultiTaskModel) and getattr(trainer, "datamodule", None) is not None:
            data: Any = trainer
            found |= pl_module.evaluate(data.datamodule.test_dataloader(), "test")
        self._validated = False
        rounded = {k: round(v, 6) for k, v in found.items()}
        self.epochs.append({"epoch": trainer.current_epoch, "step": trainer.global_step, **rounded})


class Snapshots(pl.Callback):
    """The model's weights before chosen epochs, in ``epoch-<n>.ckpt`` of the run's folder: what rewinding goes back to.

    Args:
        folder: The run's folder.
        epochs: 0 for the initialisation.
    """

    def __init__(self, folder: str | Path, epochs: Sequence[int]) -> None:
        self.folder, self.epochs = Path(folder), list(epochs)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the weights, if this is one of the epochs."""
        if trainer.current_epoch in self.epochs and trainer.is_global_zero:
            save({"state_dict": pl_module.state_dict()}, self.folder / f"epoch-{trainer.current_epoch}.ckpt")
