"""Merged start: single-task trainings from one start, merged into the network that is then cut."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from cut.masks import apply_mask, make_mask
from cut.merging import SCALES, Rule, State, Ties, choose_scale, cut_then_merge, merge
from cut.pruning import Pruning
from cut.scorebatches import ScoringBatches
from cut.selection import Mask


class MergedStart(Callback):
    """Train the selected tasks one after the other, each from the start of the fit, and merge what they became.

    The first ``each`` epochs train the first task alone (its head and the backbone), the next ones the second, from the
    same start, and so on. Then the backbones are merged (:mod:`cut.merging`) at the scale that has the smallest
    validation loss over all tasks, and each head is the one of its own training. A :class:`cut.pruning.Pruning` whose
    first cut comes after that cuts the merged network; the rest of the epochs trains all tasks together. Running
    statistics of norms are averaged.

    The common start is the model that the fit starts with. In the common recipe that is the dense multi-task model, not
    a model that has seen none of the tasks.

    Args:
        rule: How the changes become one; default :class:`cut.merging.Ties`.
        each: Epochs per task.
        scales: The scales to choose from; one leaves no choice and needs no validation.
    """

    def __init__(self, rule: Rule | None = None, each: int = 1, scales: Sequence[float] = SCALES) -> None:
        if each < 1:
            raise ValueError(f"each {each}; allowed: at least 1 epoch per task")
        if not scales or not all(s >= 0 for s in scales):
            raise ValueError(f"scales {list(scales)}; allowed: at least one number, none below 0")
        self.rule, self.each, self.scales = rule or Ties(), each, tuple(scales)
        self.start: dict[str, Tensor] = {}
        self.models: dict[str, dict[str, Tensor]] = {}
        self.scale: float | None = None
        self._tasks: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        """The start, the models so far and the chosen scale; plain tensors and numbers."""
        return {"start": self.start, "models": self.models, "scale": self.scale}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what a checkpoint holds."""
        self.start, self.models = dict(state_dict["start"]), dict(state_dict["models"])
        self.scale = state_dict["scale"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the plan.

        Raises:
            ValueError: If the training ends, or a cut comes, before the models are merged.
        """
        module: Any = pl_module
        self._tasks = list(module.active)
        end = self.each * len(self._tasks)
        plan = f"{len(self._tasks)} tasks of {self.each} epochs each are merged after epoch {end - 1}"
        if trainer.max_epochs is not None and -1 < trainer.max_epochs < end:
            raise ValueError(f"{plan}, but training ends after {trainer.max_epochs} epochs")
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Pruning) and callback.budget is not None:
                first = min(callback.schedule.steps())
                if first < end:
                    raise ValueError(f"{plan}, but the first cut is at epoch {first}; allowed: {end} or later")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin or go on with a task's own training."""
        module: Any = pl_module
        task = self._task(trainer.current_epoch)
        if task is None:
            return
        if not self.start:
            self.start = _copy(module.network)
        if trainer.current_epoch % self.each == 0:
            module.network.load_state_dict(self.start)
            for optimizer in trainer.optimizers:
                optimizer.state.clear()
            self._begin(trainer, module, task)
        module.select([task])

    def _begin(self, trainer: Trainer, module: Any, task: str) -> None:
        """What happens to the start before a task's own training: nothing."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep a task's model after its last epoch; after the last task merge them."""
        module: Any = pl_module
        task = self._task(trainer.current_epoch)
        if task is None or (trainer.current_epoch + 1) % self.each:
            return
        self.models[task] = _copy(module.network)
        if task == self._tasks[-1]:
            module.select(self._tasks)
            self._merge(trainer, module)
            for optimizer in trainer.optimizers:
                optimizer.state.clear()

    def _task(self, epoch: int) -> str | None:
        """The task whose own training an epoch belongs to, None after the merging."""
        index = epoch // self.each
        return self._tasks[index] if index < len(self._tasks) else None

    def _merge(self, trainer: Trainer, module: Any) -> None:
        """Put the merged backbone and the tasks' own heads in; what was kept for that goes."""
        backbone = "backbone."
        start = {n: v for n, v in self.start.items() if n.startswith(backbone)}
        models = {t: {n: m[n] for n in start} for t, m in self.models.items()}
        statistics = [backbone + n for n, b in module.network.backbone.named_buffers() if b.is_floating_point()]
        statistics = [n for n in statistics if n in start]
        heads = {
            n: v for t, m in self.models.items() for n, v in m.items() if n.startswith(f"heads.{t}.")
        }  # of tasks that were not selected the start's own
        others = {**self.start, **heads}

        def merged(scale: float) -> dict[str, Tensor]:
            return {**others, **self._merged(start, models, scale, statistics)}

        def quality(state: State) -> float:
            module.network.load_state_dict(state)
            data: Any = trainer
            found = module.evaluate(data.datamodule.val_dataloader(), "val")["val/loss"]
            return -float(trainer.strategy.reduce(torch.tensor(found, device=module.device), reduce_op="mean"))

        if len(self.scales) == 1:
            self.scale = self.scales[0]
            state: State = merged(self.scale)
        else:
            self.scale, state = choose_scale(merged, quality, self.scales)
        module.network.load_state_dict(state)
        self.start, self.models = {}, {}  # a checkpoint need not carry them any more

    def _merged(
        self, start: State, models: Mapping[str, State], scale: float, averaged: Collection[str]
    ) -> dict[str, Tensor]:
        """The merged backbone at a scale."""
        return merge(start, models, self.rule, scale, averaged)


class CutThenMerge(MergedStart):
    """Like :class:`MergedStart`, but each task's model is cut before its own training, by its own score alone.

    The start is cut for the task as the :class:`cut.pruning.Pruning` beside it says (scorer, sparsity, floor, batches),
    and trained under that mask. The merged backbone keeps what any task kept (:func:`cut.merging.cut_then_merge`),
    which is more than the budget allows; the pruning callback then cuts what is left of it to the budget.

    Args:
        rule: See :class:`MergedStart`.
        each: Likewise.
        scales: Likewise.
    """

    def __init__(self, rule: Rule | None = None, each: int = 1, scales: Sequence[float] = SCALES) -> None:
        super().__init__(rule, each, scales)
        self.masks: dict[str, Mask] = {}
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def state_dict(self) -> dict[str, Any]:
        """The masks too."""
        return {**super().state_dict(), "masks": self.masks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what a checkpoint holds."""
        super().load_state_dict(state_dict)
        self.masks = {t: dict(m) for t, m in state_dict["masks"].items()}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin or go on with a task's own training, under its mask."""
        super().on_train_epoch_start(trainer, pl_module)
        module: Any = pl_module
        task = self._task(trainer.current_epoch)
        mask = {} if task is None else self.masks[task]
        apply_mask(module.network, mask)
        weights = dict(module.network.named_parameters())
        self._pairs = [(weights[n], m.to(weights[n])) for n, m in mask.items()]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep what is cut at zero."""
        with torch.no_grad():
            for weight, kept in self._pairs:
                weight.mul_(kept)

    def _begin(self, trainer: Trainer, module: Any, task: str) -> None:
        """Cut the start for one task."""
        callbacks: Any = trainer
        pruning = next((c for c in callbacks.callbacks if isinstance(c, Pruning) and c.budget is not None), None)
        if pruning is None or pruning.units is not None:
            raise ValueError("cut-then-merge needs a pruning callback beside it that cuts single weights to a budget")
        found = callbacks.datamodule.score_batches(pruning.batches)
        batches = ScoringBatches(found, module.device, type(pruning.scorer).__name__)
        module.select([task])
        scores = pruning.scorer(module.network, batches, module.losses, [task])
        module.network.select(list(module.losses))
        options: dict[str, Any] = {"fusion": pruning.fusion, "budget": pruning.budget, "floor_share": pruning.floor}
        mask = make_mask(module.network, scores, batches.first(), module.losses, [task], silent=False, **options)
        module.network.select([task])
        self.masks[task] = {n: m.cpu() for n, m in mask.items()}

    def _merged(
        self, start: State, models: Mapping[str, State], scale: float, averaged: Collection[str]
    ) -> dict[str, Tensor]:
        """The merged backbone at a scale, under the union of the tasks' masks of it."""
        masks = {t: {n: m for n, m in self.masks[t].items() if n in start} for t in models}
        return cut_then_merge(start, models, masks, self.rule, scale, averaged=averaged)[0]


def _copy(network: torch.nn.Module) -> dict[str, Tensor]:
    """The network's state on the CPU, as tensors of its own."""
    return {n: v.detach().cpu().clone() for n, v in network.state_dict().items()}
