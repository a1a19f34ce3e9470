"""Distillation: a cut model recovers under the guidance of the model that it was cut from."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from cut.tasks import Task


def imitation(task: Task, student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    """How far a student's output is from the teacher's, for one task.

    Classes: the Kullback-Leibler divergence of the softened distributions, times temperature squared
    (arXiv 1503.02531), averaged over pixels; normals: 1 - cosine; all else: the mean absolute difference.

    Args:
        task: Whose kind decides.
        student: [B, C] or [B, C, H, W].
        teacher: Of the same shape.
        temperature: Of the softening.
    """
    if task.classes:
        log_student = F.log_softmax(student / temperature, 1)
        target = F.softmax(teacher / temperature, 1)
        # xlogy keeps a probability that rounds to zero from making the product undefined.
        divergence = (torch.xlogy(target, target) - target * log_student).sum(1)
        return divergence.mean() * temperature**2
    if task.kind == "normals":
        return (1 - F.cosine_similarity(student, teacher, dim=1, eps=1e-3)).mean()
    return (student - teacher).abs().mean()


class Distillation(Callback):
    """Add to the loss how far the outputs, and the backbone's deepest features, are from the dense model's.

    The teacher is a frozen copy of the network as it is when fitting is set up, that is, before any cut.

    Args:
        weight: Of the outputs' term; each task's own loss weight applies too.
        features: Weight of the features' term: the squared difference over the teacher's variance.
        temperature: For classes, see :func:`imitation`.
    """

    def __init__(self, weight: float = 1.0, features: float = 0.5, temperature: float = 2.0) -> None:
        if weight < 0 or features < 0 or temperature <= 0:
            raise ValueError(
                f"weight={weight}, features={features}, temperature={temperature}; allowed: weights of at least 0, "
                "a temperature above 0"
            )
        self.weight, self.features, self.temperature = weight, features, temperature
        self.teacher: nn.Module | None = None
        self._seen: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self._module: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep a copy of the network, before a checkpoint or a cut changes it."""
        if stage != "fit" or self.teacher is not None:
            return
        if not hasattr(pl_module, "extras"):
            raise ValueError(f"{type(pl_module).__name__} has no 'extras' to add a loss to (cut.model.MultiTaskModel)")
        self._module = pl_module
        self.teacher = copy.deepcopy(self._module.network).eval().requires_grad_(False)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to add the loss."""
        teacher = cast(Any, self.teacher)
        teacher.to(pl_module.device)
        teacher.select(self._module.active)
        for name, network in (("student", self._module.network), ("teacher", teacher)):
            self._handles.append(network.backbone.register_forward_hook(self._keeper(name)))
        self._module.extras.append(self.loss)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the module as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen.clear()
        if self.loss in self._module.extras:
            self._module.extras.remove(self.loss)

    def _keeper(self, name: str) -> Any:
        """A hook that remembers the deepest map of a backbone."""

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            self._seen[name] = output[-1] if isinstance(output, (list, tuple)) else output

        return keep

    def loss(self, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Tensor:
        """The term of one batch; the student's forward has just run."""
        assert self.teacher is not None
        with torch.no_grad():
            wanted = self.teacher(batch["image"].contiguous(memory_format=self._module.order))
        total = torch.zeros((), device=batch["image"].device)
        for name, output in outputs.items():
            task = self._module.tasks[name]
            term = imitation(task, output.float(), wanted[name].float(), self.temperature)
            total = total + self.weight * task.weight * term
        if self.features:
            mine, target = self._seen["student"].float(), self._seen["teacher"].float()
            total = total + self.features * F.mse_loss(mine, target) / target.var().clamp_min(1e-6)
        return total
