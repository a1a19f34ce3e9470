"""Sharing decided layer by layer: a task adds a change of its own to a frozen layer, or shares it (arXiv 2203.16708).

For each task and layer the weight is ``w0 + 1[s >= threshold] x delta``: ``w0`` is frozen, ``delta`` starts at zero and
the score ``s`` above the threshold, so that all layers start open. The gate passes its gradient straight to ``s``. A
penalty on ``|s|`` closes layers whose change is not worth its size; a closed layer is the shared one. Norms stay each
task's own. This is task adaptive parameter sharing (TAPS), for several tasks trained together.

What counts is the sum of all *deployed* parameters, :func:`cut.variants.deployed`: the backbone is not made smaller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from cut.decomposition import check_tasks, prunable
from cut.network import MultiTaskNet
from cut.variants import Variant, VariantNet, key_of, name_of


class _Gate(torch.autograd.Function):
    """1 where a score reaches the threshold, else 0; the gradient passes as if it were the score itself."""

    @staticmethod
    def forward(score: Tensor, threshold: float) -> Tensor:
        return (score >= threshold).to(score.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


def gate(score: Tensor, threshold: float) -> Tensor:
    """``1[score >= threshold]`` with a straight-through gradient (that of the identity).

    Example:
        >>> gate(torch.tensor([0.15, 0.05]), 0.1).tolist()
        [1.0, 0.0]
    """
    return cast(Tensor, _Gate.apply(score, threshold))


class Delta(nn.Module):
    """A task's change to one weight, and the score that opens it.

    Args:
        weight: The shared weight, for its shape.
        start: The score's first value.
        threshold: The gate is open from here on.
    """

    def __init__(self, weight: Tensor, start: float, threshold: float) -> None:
        super().__init__()
        self.change = nn.Parameter(torch.zeros_like(weight))
        self.score: nn.Parameter | None = nn.Parameter(weight.new_tensor(start))
        self.threshold = threshold

    @property
    def open(self) -> bool:
        """Whether the task has a weight of its own here."""
        return self.score is None or bool(self.score >= self.threshold)

    def forward(self, weight: Tensor) -> Tensor:
        """The task's weight."""
        return weight + (self.change if self.score is None else gate(self.score, self.threshold) * self.change)


class Sharing(Variant):
    """A task's changes to the weights of a backbone's convolutions and linear layers, and its norms."""

    def __init__(self, backbone: nn.Module, start: float, threshold: float, norms: bool) -> None:
        super().__init__(backbone, norms)
        self.deltas = nn.ModuleDict({key_of(n): Delta(w, start, threshold) for n, w in prunable(backbone).items()})

    def tensors(self, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The task's tensors by name; a layer without a change is the shared one itself."""
        return {**super().tensors(base), **{name_of(k): d(base[name_of(k)]) for k, d in self.deltas.items()}}

    def size(self) -> int:
        """Parameters of the norms and of the changes in open layers; a score is not deployed."""
        return super().size() + sum(d.change.numel() for d in self.each() if d.open)

    def each(self) -> list[Delta]:
        """The changes, in the order of the layers."""
        return [d for d in self.deltas.values() if isinstance(d, Delta)]


def shared(
    network: MultiTaskNet,
    tasks: Sequence[str] | None = None,
    *,
    start: float = 0.15,
    threshold: float = 0.1,
    norms: bool = True,
) -> VariantNet:
    """A copy of a network in which each task may change each layer of the frozen backbone; the function is unchanged.

    Args:
        network: Left as it is.
        tasks: The tasks that it has; default all. The other heads are left out.
        start: First value of the scores.
        threshold: A layer is open from this score on.
        norms: Whether each task has norms of its own; without, a task whose layers are all closed has the backbone's
            outputs to the bit, trained or not.

    Raises:
        ValueError: For an unknown task, a network with variants already, or a start that leaves all layers closed.
    """
    if not 0 < threshold <= start:
        raise ValueError(f"start={start}, threshold={threshold}; allowed: 0 < threshold <= start (all layers open)")
    tasks = list(network.heads) if tasks is None else tasks
    return VariantNet(network, lambda backbone: Sharing(backbone, start, threshold, norms), tasks)


def _sharings(network: nn.Module, tasks: Sequence[str] | None = None) -> dict[str, Sharing]:
    """Task to its changes; ValueError for any other network."""
    found: dict[str, nn.Module] = dict(network.variants.items()) if isinstance(network, VariantNet) else {}
    result = {t: v for t, v in found.items() if isinstance(v, Sharing)}
    if not result:
        raise ValueError(f"{type(network).__name__} shares no layers; allowed: what cut.sharing.shared returns")
    return {t: result[t] for t in check_tasks(list(result) if tasks is None else tasks, set(result))}


def open_layers(network: VariantNet) -> dict[str, list[str]]:
    """Task to the names of the weights that it has of its own, in the order of the layers."""
    return {
        t: [name_of(k) for k, d in s.deltas.items() if isinstance(d, Delta) and d.open]
        for t, s in _sharings(network).items()
    }


def penalty(network: VariantNet, tasks: Sequence[str] | None = None) -> Tensor:
    """The mean over layers of ``|s|``, summed over tasks: each task pays for itself, whatever the others do.

    Args:
        network: What :func:`shared` returned.
        tasks: Default: all.
    """
    scores = [[d.score for d in s.each() if d.score is not None] for s in _sharings(network, tasks).values()]
    means = [torch.stack(list(of_task)).abs().mean() for of_task in scores if of_task]
    return torch.stack(means).sum() if means else next(network.parameters()).new_zeros(())


def settle(network: VariantNet) -> None:
    """Make the gates final, in place: closed changes are deleted, scores too. The outputs keep every bit.

    Then all that the network holds is deployed: its parameters are :func:`cut.variants.deployed`.
    """
    for sharing in _sharings(network).values():
        for key in [k for k, d in sharing.deltas.items() if isinstance(d, Delta) and not d.open]:
            del sharing.deltas[key]
        for delta in sharing.each():
            delta.score = None


class TaskSharing(Callback):
    """Train with :func:`shared` layers instead of a common backbone; at the end of the training the gates are final.

    The plain network of a :class:`cut.model.MultiTaskModel` is replaced when fitting is set up, from the weights that
    it has then. It needs no budget: how many layers stay open follows from the penalty.

    Args:
        penalty: Weight of :func:`penalty` in the loss.
        warmup: Epochs before the penalty is added.
        start: First value of the scores.
        threshold: A layer is open from this score on.
        norms: Whether each task has norms of its own.
        speed: The scores move so many times as far as the optimiser's step: at a fine-tuning's learning rate an
            adaptive optimiser would need more steps than a short recovery has to bring a score from start to threshold.
    """

    def __init__(
        self,
        penalty: float = 0.01,
        warmup: int = 2,
        start: float = 0.15,
        threshold: float = 0.1,
        norms: bool = True,
        speed: float = 3.0,
    ) -> None:
        if penalty < 0 or warmup < 0 or speed <= 0:
            raise ValueError(
                f"penalty={penalty}, warmup={warmup}, speed={speed}; allowed: penalty and warmup of at least 0, "
                "a speed above 0"
            )
        if not 0 < threshold <= start:
            raise ValueError(f"start={start}, threshold={threshold}; allowed: 0 < threshold <= start (all layers open)")
        self.penalty, self.warmup, self.norms = penalty, warmup, norms
        self.start, self.threshold = start, threshold
        self.speed = speed
        self._before: list[tuple[nn.Parameter, Tensor]] = []
        self._module: Any = None
        self._trainer: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Replace the network, before the optimiser is made and a checkpoint is loaded."""
        self._module = pl_module
        if stage != "fit":
            return
        if not hasattr(pl_module, "extras"):
            raise ValueError(f"{type(pl_module).__name__} has no 'extras' to add a loss to (cut.model.MultiTaskModel)")
        if not isinstance(self._module.network, VariantNet):
            options: dict[str, Any] = {"start": self.start, "threshold": self.threshold, "norms": self.norms}
            self._module.network = shared(self._module.network, **options)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to add the penalty."""
        self._trainer = trainer
        self._module.extras.append(self.loss)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember where the scores are."""
        scores = [d.score for s in _sharings(self._module.network).values() for d in s.each() if d.score is not None]
        self._before = [(s, s.detach().clone()) for s in scores]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Lengthen the optimiser's step on the scores."""
        with torch.no_grad():
            for score, before in self._before:
                score.copy_(before + self.speed * (score - before))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the gates final, unless the training was stopped before its end."""
        self._module.extras.remove(self.loss)
        if not trainer.interrupted:
            settle(self._module.network)

    def loss(self, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Tensor:
        """The weighted penalty of the tasks that ran; 0 during the warm-up."""
        weight = self.penalty if self._trainer.current_epoch >= self.warmup else 0.0
        return weight * penalty(self._module.network, list(outputs))
