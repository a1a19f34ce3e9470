"""Soft thresholds learnt for each component, and task weights that follow pruning, after AdapMTL (arXiv 2408.03913).

Known of the method is its idea: a learnable soft threshold for the backbone and for each head, trained together with
the weights, and task losses re-weighted by how robust each task is to pruning. Its own thresholds need hand tuning to
meet a sparsity; here the thresholds are scaled by one common factor after every step, so that the sparsity follows a
schedule exactly and what is learnt is how components share it. These choices are ours.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from cut.allocation import LayerSparsity
from cut.budget import Sparsity
from cut.decomposition import components, owners, prunable
from cut.pruning import Pruning


class SoftThreshold(Callback):
    """Train with soft-thresholded weights ``sign(w) x max(|w| - threshold of w's component, 0)`` for some epochs.

    After these epochs the weights are set to their thresholded values, and a :class:`cut.pruning.Pruning` that ranks by
    magnitude cuts to the exact budget: what the thresholds removed is zero and goes first.

    Args:
        target: The sparsity at the end; None takes it from the trainer's :class:`cut.pruning.Pruning`.
        epochs: Epochs with thresholds; the sparsity rises along a cubic over the first half of them.
        rate: Learning rate of the logarithms of the thresholds.
        adapt: How strongly the tasks' loss weights follow the rise of their losses; 0 leaves them.
    """

    def __init__(self, target: float | None = None, epochs: int = 4, rate: float = 0.02, adapt: float = 1.0) -> None:
        if (target is not None and not 0 < target < 1) or epochs < 1 or rate < 0 or adapt < 0:
            raise ValueError(
                f"target={target}, epochs={epochs}, rate={rate}, adapt={adapt}; allowed: a target between 0 and 1, "
                "at least 1 epoch, rate and adapt of at least 0"
            )
        self.target, self.epochs, self.rate, self.adapt = target, epochs, rate, adapt
        self.thresholds: dict[str, float] = {}
        self.baseline: dict[str, float] = {}
        self.smoothed: dict[str, float] = {}
        self._of: dict[str, str] = {}
        self._weights: dict[str, torch.nn.Parameter] = {}
        self._true: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        """Thresholds and loss averages."""
        return {"thresholds": self.thresholds, "baseline": self.baseline, "smoothed": self.smoothed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with a checkpoint's thresholds."""
        self.thresholds = dict(state_dict["thresholds"])
        self.baseline, self.smoothed = dict(state_dict["baseline"]), dict(state_dict["smoothed"])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out which weight belongs to which component."""
        module: Any = pl_module
        if not hasattr(pl_module, "factors"):
            raise ValueError(f"{type(pl_module).__name__} has no 'factors' on task weights (cut.model.MultiTaskModel)")
        if self.target is None:
            budgets = [c.budget for c in trainer.callbacks if isinstance(c, Pruning)]  # type: ignore[attr-defined]
            self.target = next((float(b.target) for b in budgets if isinstance(b, (Sparsity, LayerSparsity))), None)
        if self.target is None:
            raise ValueError("soft thresholds need a target: their own, or a Pruning callback with a sparsity")
        data: Any = trainer
        tasks = list(module.network.active)
        batch = {k: v.to(pl_module.device) for k, v in data.datamodule.score_batches(1)[0].items()}
        self._of = {
            n: c
            for n, c in components(owners(module.network, batch, module.losses, tasks), tasks).items()
            if n in prunable(module.network)
        }
        self._weights = {n: w for n, w in prunable(module.network).items() if n in self._of}
        if not self.thresholds:
            self.thresholds = dict.fromkeys(self._of.values(), 1e-3)
        module.factors = self._factors()  # a checkpoint's, when training goes on

    def _running(self, trainer: Trainer) -> bool:
        return trainer.current_epoch < self.epochs

    def _wanted(self, trainer: Trainer) -> float:
        """The sparsity that the schedule asks for now."""
        batches: Any = trainer.num_training_batches
        steps = math.ceil(int(batches) / trainer.accumulate_grad_batches)
        progress = min(1.0, 2 * (trainer.global_step + 1) / max(1, steps * self.epochs))
        assert self.target is not None
        return self.target * (1 - (1 - progress) ** 3)

    def _scale(self, wanted: float) -> None:
        """Multiply all thresholds by the factor that gives the wanted sparsity over all components."""
        ratio = torch.cat([w.detach().abs().flatten() / self.thresholds[self._of[n]] for n, w in self._weights.items()])
        last = ratio.kthvalue(max(1, round(wanted * len(ratio)))).values
        above = ratio[ratio > last]
        # Half way to the next weight, so that rounding leaves the last one not just above zero.
        factor = float((last + above.min()) / 2 if len(above) else last)
        self.thresholds = {c: max(t * factor, 1e-12) for c, t in self.thresholds.items()}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Put thresholded weights in the place of the true ones for forward and backward."""
        if not self._running(trainer) or self._true:  # weights stay thresholded while gradients of batches add up
            return
        self._scale(self._wanted(trainer))
        with torch.no_grad():
            for name, weight in self._weights.items():
                self._true[name] = weight.detach().clone()
                weight.copy_(_soft(weight, self.thresholds[self._of[name]]))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """The chain rule: gradients of the thresholds from the weights' own, then the true weights are put back."""
        if not self._true:
            return
        slope = dict.fromkeys(self.thresholds, 0.0)
        scale = dict.fromkeys(self.thresholds, 1e-20)
        with torch.no_grad():
            for name, weight in self._weights.items():
                if weight.grad is not None:
                    component = self._of[name]
                    # d soft(w, t) / dt = -sign(w) where |w| > t; in the logarithm of t a factor t more.
                    product = weight.grad * weight.sign()
                    slope[component] -= float(product.sum()) * self.thresholds[component]
                    scale[component] += float(product.abs().sum()) * self.thresholds[component]
                    weight.grad.mul_(weight != 0)
                weight.copy_(self._true[name])
        self._true.clear()
        for component, value in slope.items():
            step = self.rate * max(-1.0, min(1.0, value / scale[component]))
            self.thresholds[component] *= float(torch.tensor(-step).exp())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Follow the tasks' losses, and leave the weights thresholded after the last step with thresholds."""
        module: Any = pl_module
        for task, loss in module.latest.items():
            self._follow(task, float(loss))
        module.factors = self._factors()
        steps: Any = trainer.num_training_batches
        if trainer.current_epoch == self.epochs - 1 and batch_idx + 1 == int(steps):
            with torch.no_grad():
                for name, weight in self._weights.items():
                    weight.copy_(_soft(weight, self.thresholds[self._of[name]]))

    def _factors(self) -> dict[str, float]:
        """Factors on the tasks' loss weights, of mean 1: larger where the loss has risen more."""
        if not self.adapt or not self.baseline:
            return {}
        rise = {t: (self.smoothed[t] / max(self.baseline[t], 1e-9)) ** self.adapt for t in self.baseline}
        mean = sum(rise.values()) / len(rise)
        return {t: r / mean for t, r in rise.items()}

    def _follow(self, task: str, loss: float) -> None:
        """Exponential average; the first loss, of the nearly unpruned model, is the baseline."""
        self.baseline.setdefault(task, loss)
        self.smoothed[task] = 0.9 * self.smoothed.get(task, loss) + 0.1 * loss

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the task weights back."""
        module: Any = pl_module
        module.factors = {}


def _soft(weight: Tensor, threshold: float) -> Tensor:
    """The soft-thresholded weight."""
    return weight.sign() * (weight.abs() - threshold).clamp_min(0)
