"""The LightningModule: a multi-task network with its tasks' losses, metrics, optimiser and schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import move_data_to_device
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from cut.decomposition import check_tasks
from cut.network import MultiTaskNet, NetworkConfig, picture_size
from cut.tasks import Task
from cut.widths import MULTIPLE, check_width, narrowed

Schedule = Literal["constant", "cosine", "onecycle"]
Interval = Literal["step", "epoch"]


def factor(schedule: Schedule, progress: float, warmup: float) -> float:
    """The learning rate at ``progress`` in [0, 1] of the training, as a factor of the highest.

    ``cosine`` rises linearly for the share ``warmup`` of the training and falls to 0 along a cosine; ``onecycle``
    does the same with a cosine rise from 1/25; ``constant`` rises linearly and stays.

    Example:
        >>> [round(factor("cosine", p, 0.1), 3) for p in (0.05, 0.1, 0.55, 1.0)]
        [0.5, 1.0, 0.5, 0.0]
    """
    if progress < warmup:
        rise = progress / warmup
        return 1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * rise)) / 2 if schedule == "onecycle" else rise
    if schedule == "constant":
        return 1.0
    return (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup)))) / 2


def _check(
    schedule: Schedule, interval: Interval, warmup: float, families: tuple[str, ...], backbone_rate: float
) -> None:
    """Refuse choices that :class:`MultiTaskModel` does not have."""
    for entry, value, allowed in (
        ("schedule", schedule, get_args(Schedule)),
        ("interval", interval, get_args(Interval)),
    ):
        if value not in allowed:
            raise ValueError(f"{entry} {value!r}; allowed: {', '.join(map(repr, allowed))}")
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup {warmup}; allowed: 0 <= warmup < 1 (a share of the training)")
    if not 0 < backbone_rate < math.inf:
        raise ValueError(f"backbone_rate {backbone_rate}; allowed: above 0 (a share of the heads' learning rate)")
    unknown = sorted(set(families) - {"corrected", "legacy"})
    if unknown or not families:
        raise ValueError(f"metric families {families}; allowed: 'corrected', 'legacy'")


class MultiTaskModel(pl.LightningModule):
    """Train, validate and test a multi-task network.

    Logs ``train/<task>/loss`` and, for validation and test, ``<split>/<task>/<metric>`` (corrected family) or
    ``<split>/<task>/legacy/<metric>``.

    A checkpoint carries the network's config, without its ``weights`` entry, so that
    ``load_from_checkpoint(path, tasks=..., weights_only=True)`` builds the same network and reads no other file.

    Args:
        tasks: The tasks; with LightningCLI they come from the data module.
        network: What the network is built from.
        optimizer: Parameters to optimiser.
        schedule: The learning rate over the whole training, set at every step.
        warmup: Share of the training in which the learning rate rises.
        scheduler: A scheduler of one's own instead, stepped every ``interval``.
        interval: ``"step"`` or ``"epoch"``.
        families: Metric families: ``"corrected"``, ``"legacy"`` or both.
        channels_last: Give the network its pictures in channels-last memory order, which is faster on most processors;
            weights, and with them scores, masks and files, keep their own order.
        width: Share of every layer's channels, heads and neurons that the network is built with (:mod:`cut.widths`),
            in (0, 1], channels rounded to multiples of 8 as timm's own width multipliers do; below 1 the network's
            ``weights`` must be None.
        backbone_rate: The backbone's learning rate as a share of the heads', above 0; below 1 where pre-trained
            features are to be kept (a ViT) while heads start from nothing.
    """

    def __init__(
        self,
        tasks: list[Task],
        network: NetworkConfig | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        schedule: Schedule = "onecycle",
        warmup: float = 0.1,
        scheduler: LRSchedulerCallable | None = None,
        interval: Interval = "step",
        families: tuple[str, ...] = ("corrected",),
        channels_last: bool = False,
        width: float = 1.0,
        backbone_rate: float = 1.0,
    ) -> None:
        super().__init__()
        _check(schedule, interval, warmup, families, backbone_rate)
        self.tasks: dict[str, Task] = {t.name: t for t in tasks}
        if len(self.tasks) != len(tasks):
            raise ValueError(f"two tasks have the same name: {[t.name for t in tasks]}")
        image_level = [t.name for t in tasks if not t.dense]
        if isinstance(network, Mapping):  # a checkpoint's
            network = NetworkConfig(**network)
        check_width(width, network.weights if network is not None else None)
        self.network = MultiTaskNet({t.name: t.channels for t in tasks}, image_level, network)
        if width < 1:
            self.network = narrowed(self.network, width, picture_size(self.network), multiple=MULTIPLE)
        plain = dict(asdict(self.network.config), weights=None)  # they are in the checkpoint
        self.save_hyperparameters(
            {
                "network": plain,
                "schedule": schedule,
                "warmup": warmup,
                "interval": interval,
                "families": list(families),
                "channels_last": channels_last,
                "width": width,
                "backbone_rate": backbone_rate,
            }
        )
        self.optimizer, self.schedule, self.warmup = optimizer, schedule, warmup
        self.scheduler, self.interval, self.backbone_rate = scheduler, interval, backbone_rate
        self.order = torch.channels_last if channels_last else torch.contiguous_format
        # What callbacks add to the training loss, of (batch, outputs), and factors on the tasks' loss weights.
        self.extras: list[Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]] = []
        self.factors: dict[str, float] = {}
        self.latest: dict[str, Tensor] = {}  # the tasks' losses of the last training batch
        self._metrics = {split: {t.name: self._collection(t, families) for t in tasks} for split in ("val", "test")}
        for split, collections in self._metrics.items():
            for name, collection in collections.items():
                self.add_module(f"_{split}_{name}", collection)  # so that metrics move with the module

    @staticmethod
    def _collection(task: Task, families: Sequence[str]) -> MetricCollection:
        """All metrics of one task, the legacy ones under ``legacy/``."""
        found: dict[str, Metric | MetricCollection] = {}
        for family in families:
            prefix = "legacy/" if family == "legacy" else ""
            found.update({prefix + k: m for k, m in task.metrics(family).items(keep_base=True)})
        return MetricCollection(found, compute_groups=False)

    @property
    def active(self) -> list[str]:
        """The selected tasks."""
        return self.network.active

    @property
    def losses(self) -> dict[str, Callable[[Tensor, Any], Tensor]]:
        """Task to its loss without loss weight, for the functional core."""
        return {name: task.loss for name, task in self.tasks.items()}

    @property
    def higher_is_better(self) -> dict[str, bool]:
        """``"seg/miou"`` to whether more is better, over all tasks and metrics."""
        return {
            f"{task}/{key}": bool(metric.higher_is_better)
            for task, collection in self._metrics["test"].items()
            for key, metric in collection.items(keep_base=True)
        }

    def select(self, tasks: Sequence[str]) -> None:
        """Keep to these tasks: the other heads are frozen and not run."""
        tasks = check_tasks(tasks, set(self.tasks))
        self.network.select(tasks)
        for name, head in self.network.heads.items():
            head.requires_grad_(name in tasks)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Outputs of the selected tasks."""
        return self.network(image.contiguous(memory_format=self.order))

    def _task_losses(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        missing = [t for t in outputs if t not in batch]
        if missing:
            raise ValueError(f"the batch has no label {missing[0]!r}; its entries are {sorted(batch)}")
        return {t: self.tasks[t].loss(out, batch) for t, out in outputs.items()}

    def _total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of the tasks' losses."""
        return torch.stack([self.tasks[t].weight * loss.float() for t, loss in losses.items()]).sum()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The weighted sum of the selected tasks' losses."""
        outputs = self(batch["image"])
        losses = self._task_losses(outputs, batch)
        self.latest = {t: loss.detach() for t, loss in losses.items()}
        total = self._total({t: self.factors.get(t, 1.0) * loss for t, loss in losses.items()})
        for extra in self.extras:
            total = total + extra(batch, outputs)
        size = len(batch["image"])
        logged = {f"train/{t}/loss": loss for t, loss in self.latest.items()}
        self.log_dict(logged, on_step=False, on_epoch=True, sync_dist=True, batch_size=size)
        self.log(
            "train/loss",
            total.detach(),
            prog_bar=True,
            on_step=False,
            on_epoch=True,
            sync_dist=True,
            batch_size=size,
        )
        return total

    def on_train_epoch_start(self) -> None:
        """Seed by epoch, so that dropout is the same whether or not the training was interrupted before."""
        torch.manual_seed(torch.initial_seed() % 100_003 + 100_003 * self.current_epoch)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed again before an epoch's first batch.

        Lightning starts the loader before or after the hook above, depending on whether the epoch is the fit's first,
        and a plain DataLoader draws a number when it starts.
        """
        if batch_idx == 0:
            self.on_train_epoch_start()

    def _update(self, split: str, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Update a split's metrics; returns the batch's losses by task, and their weighted sum as ``""``."""
        outputs = self(batch["image"])
        losses = self._task_losses(outputs, batch)
        for task, out in outputs.items():
            target = batch[task]
            if self.tasks[task].dense and out.shape[-2:] != target.shape[-2:]:
                out = torch.nn.functional.interpolate(out, target.shape[-2:], mode="bilinear", align_corners=False)
            self._metrics[split][task].update(out.float(), target)
        return {**losses, "": self._total(losses)}

    def _evaluate(self, split: str, batch: dict[str, Tensor]) -> None:
        losses = self._update(split, batch)
        # A float: Lightning divides the sum over processes by their number, which an int loses the half of.
        size: Any = float(len(batch["image"]))
        named = {f"{split}/{t}/loss" if t else f"{split}/loss": v for t, v in losses.items()}
        self.log_dict(named, sync_dist=True, batch_size=size)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Mapping[str, Tensor]], split: Literal["val", "test"]) -> dict[str, float]:
        """Metrics and losses over batches, at any time, without the trainer's loops.

        In a process group every rank gives its own part of the set; metrics are those of the whole set, losses those
        of the rank's part.

        Args:
            batches: On any device.
            split: Whose metrics to use, and the start of the result's keys.

        Returns:
            ``"<split>/<task>/<metric>"``, ``"<split>/<task>/loss"`` and ``"<split>/loss"`` to values.
        """
        was, total, count = self.training, dict.fromkeys(["", *self.active], 0.0), 0
        self.eval()
        for batch in batches:
            moved = move_data_to_device(dict(batch), self.device)
            size = len(moved["image"])
            for task, loss in self._update(split, moved).items():
                total[task] += float(loss) * size
            count += size
        self.train(was)
        found = {f"{split}/{t}/loss" if t else f"{split}/loss": v / max(1, count) for t, v in total.items()}
        for task in self.active:
            collection = self._metrics[split][task]
            found |= {f"{split}/{task}/{k}": float(v) for k, v in collection.compute().items()}
            collection.reset()
        return found

    def _report(self, split: str) -> None:
        for task in self.active:
            collection = self._metrics[split][task]
            self.log_dict({f"{split}/{task}/{k}": v.float() for k, v in collection.compute().items()})
            collection.reset()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Losses and metrics of one validation batch."""
        self._evaluate("val", batch)

    def on_validation_epoch_end(self) -> None:
        """Metrics over the whole validation set."""
        self._report("val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Losses and metrics of one test batch."""
        self._evaluate("test", batch)

    def on_test_epoch_end(self) -> None:
        """Metrics over the whole test set."""
        self._report("test")

    def _optimizer(self) -> torch.optim.Optimizer:
        """The optimiser; of two groups, the heads' and the backbone's, if they learn at different rates."""
        trained = [p for p in self.parameters() if p.requires_grad]
        slow = {id(p) for p in self.network.backbone.parameters()} if self.backbone_rate != 1 else set()
        groups = [[p for p in trained if id(p) not in slow], [p for p in trained if id(p) in slow]]
        if not all(groups):
            return self.optimizer(trained)
        optimizer = self.optimizer([{"params": group} for group in groups])
        optimizer.param_groups[1]["lr"] *= self.backbone_rate
        return optimizer

    def configure_optimizers(self) -> Any:
        """The optimiser over what is not frozen, and the schedule."""
        optimizer = self._optimizer()
        if self.scheduler is not None:
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": self.scheduler(optimizer), "interval": self.interval},
            }
        expected = float(self.trainer.estimated_stepping_batches)
        if math.isinf(expected):
            raise ValueError(f"schedule {self.schedule!r} needs an end: set the trainer's max_epochs or max_steps")
        steps = max(1, int(expected))
        rate = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: factor(self.schedule, (step + 1) / (steps + 1), self.warmup)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rate, "interval": "step"}}
