"""Experts: a library of task masks over one dense model, made at the end of its training.

:class:`FillLibrary` cuts the model for each of its tasks; :class:`GroupLibrary` first fits a classifier for each of
many label groups on the frozen backbone, which has been trained on all their classes at once. Both leave the library
in the run's folder, where runs that start from it find it.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cut import checkpoint
from cut.budget import Sparsity
from cut.data.labelgroups import LabelGroups, groups
from cut.library import Library, base_hash, shared_weights
from cut.limits import Bytes
from cut.masks import make_mask
from cut.network import MultiTaskNet
from cut.newcomer import Newcomer
from cut.scores import Scores, sensitivity
from cut.selection import Mask
from cut.similarity import Similarity
from cut.structured import make_unit_mask
from experiments.probe import fit_head

LIBRARY, EXPERTS = "library", "experts"
SOURCES = {"fashion": "fashion-mnist", "cifar": "cifar100"}  # by the name that their groups begin with
Loss = Callable[[Tensor, Any], Tensor]


def any_loss(output: Tensor, batch: Any) -> Tensor:
    """A loss for a head that is not trained here: it depends on its output."""
    return output.float().square().mean()


def own_label(output: Tensor, batch: Any) -> Tensor:
    """A classifier's loss where its labels are unknown: its own most likely class stands in."""
    return F.cross_entropy(output, output.detach().argmax(1))


class FillLibrary(pl.Callback):
    """At the end of a dense training, keep a mask of each task over single weights and one over channels.

    Args:
        sparsity: Of the masks over weights.
        share: Of the file's bytes that masks over channels leave; None makes none.
        batches: Scoring batches of each task.
        floor: Share of every layer that stays.
        ranks: Keep the ranks of the scores too, for soft votes.
    """

    def __init__(
        self,
        sparsity: float = 0.8,
        share: float | None = 0.4,
        batches: int = 16,
        floor: float = 0.02,
        ranks: bool = True,
    ) -> None:
        self.sparsity, self.share, self.batches = sparsity, share, batches
        self.floor, self.ranks = floor, ranks
        self.folder = Path()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fill the libraries; a training that was stopped leaves none."""
        if trainer.interrupted:
            return
        module: Any = pl_module
        data: Any = trainer
        batches = [_on(b, module.device) for b in data.datamodule.score_batches(self.batches)]
        scores = sensitivity(module.network, batches, module.losses, list(module.losses))
        self._fill(module.network, batches[0], scores)

    def _fill(self, network: MultiTaskNet, batch: Any, scores: Mapping[str, Scores]) -> None:
        """Cut for each task alone, from its scores, and keep the masks."""
        losses: dict[str, Loss] = dict.fromkeys(network.heads, any_loss)  # which weight is whose needs no labels
        batch = {k: v[:2] if v.dim() else v for k, v in batch.items()}  # nor many pictures
        shared = shared_weights(network, batch, losses)
        base = base_hash(network, shared)
        for units in ("weights", "channels") if self.share else ("weights",):
            folder = self.folder / LIBRARY / units
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed here
            for task in losses:
                mask = self._mask(network, batch, losses, {task: scores[task]}, units)
                told = {"task": task, "units": units, "score": "sensitivity", "base": base}
                told["budget"] = f"sparsity={self.sparsity:g}" if units == "weights" else f"bytes={self.share:g}"
                kept = {n: m for n, m in mask.items() if n in shared and n in scores[task]}
                Library(folder).add(kept, told, scores[task] if self.ranks else None, shared)

    def _mask(
        self, network: MultiTaskNet, batch: Any, losses: Mapping[str, Loss], scores: dict[str, Scores], units: str
    ) -> Mask:
        """One task's mask."""
        options: dict[str, Any] = {"floor_share": self.floor, "silent": False}
        if units == "weights" or self.share is None:
            return make_mask(network, scores, batch, losses, list(scores), budget=Sparsity(self.sparsity), **options)
        return make_unit_mask(network, scores, batch, losses, list(scores), budget=Bytes(self.share), **options)


class GroupLibrary(FillLibrary):
    """A library of label groups: a classifier for each on the frozen backbone, and masks of it.

    Args:
        sparsity: See :class:`FillLibrary`; there are no masks over channels and no ranks.
        batches: Scoring batches of each group.
        floor: See :class:`FillLibrary`.
        steps: Steps of each classifier.
        rate: Their learning rate.
        batch_size: Of classifiers and scores.
    """

    def __init__(
        self,
        sparsity: float = 0.8,
        batches: int = 16,
        floor: float = 0.02,
        steps: int = 100,
        rate: float = 3e-3,
        batch_size: int = 32,
    ) -> None:
        super().__init__(sparsity, None, batches, floor, False)
        self.steps, self.rate, self.batch_size = steps, rate, batch_size

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fit the classifiers, keep them, and fill the library."""
        if trainer.interrupted:
            return
        module: Any = pl_module
        data: Any = trainer
        base: LabelGroups = data.datamodule
        source = base.group.name.removesuffix("-base")
        found = groups(SOURCES.get(source, source), base.groups_seed).library
        named = {g.name: len(g.classes) for g in found}
        experts = MultiTaskNet(named, list(named), replace(module.network.config, weights=None)).to(module.device)
        experts.backbone.load_state_dict(module.network.backbone.state_dict())
        scores: dict[str, Scores] = {}
        for task in named:
            options: dict[str, Any] = {k: getattr(base, k) for k in ("root", "groups_seed", "side", "seed")}
            group = LabelGroups(task, batch_size=self.batch_size, **options)
            batches = [_on(b, module.device) for b in group.score_batches(self.batches)]
            losses = {task: group.tasks[0].loss}
            experts.select([task])
            fit_head(experts, task, batches, losses[task], self.steps, self.rate)
            scores |= sensitivity(experts, batches, losses, [task])
        experts.select(list(named))
        checkpoint.save(experts, self.folder / EXPERTS)
        self._fill(experts, batches[0], scores)


def _on(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {k: v.to(device) for k, v in batch.items()}


class WithExperts:
    """A similarity that needs the library tasks' classifiers, where the model has only the new task's head.

    The model gets their heads; as labels that the new pictures do not have, each classifier's own most likely classes
    stand in.

    Args:
        similarity: :class:`cut.similarity.LEEP` or :class:`cut.similarity.GradientCosine`.
        folder: Of the classifiers' network, as :class:`GroupLibrary` leaves it.
    """

    def __init__(self, similarity: Similarity, folder: str = EXPERTS) -> None:
        self.similarity, self.folder = similarity, Path(folder)

    def __call__(self, newcomer: Newcomer) -> dict[str, float]:
        """The similarity on a network with all heads.

        Raises:
            ValueError: If the classifiers' network cannot be read.
        """
        experts: Any = checkpoint.load(self.folder)
        known = list(experts.heads)
        theirs: Any = newcomer.model
        device = next(theirs.parameters()).device
        experts = experts.to(device)
        experts.backbone = theirs.backbone
        heads = nn.ModuleDict(
            {**dict(experts.heads.items()), newcomer.task: copy.deepcopy(theirs.heads[newcomer.task])}
        )
        experts.heads, experts.image_level = heads, (*experts.image_level, newcomer.task)
        losses = {**dict.fromkeys(known, own_label), newcomer.task: newcomer.losses[newcomer.task]}
        return self.similarity(replace(newcomer, model=experts, losses=losses))
