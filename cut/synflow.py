"""SynFlow: what of a network's flow passes through a weight, without data (Tanaka et al., arXiv 2006.05467)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cut.decomposition import Inputs, Loss, check_tasks, forward, prunable
from cut.scores import JOINT, Scores
from cut.trace import NORMS


def _linear(model: nn.Module) -> nn.Module:
    """A float64 copy in which every weight is positive and nothing clips, so that flow is multiplied and added only.

    Activations become the identity, which they are (up to a constant) for positive inputs; norms only scale.
    """
    plain = copy.deepcopy(model).double().eval()
    for module in list(plain.modules()):
        for name, child in module.named_children():
            kind = type(child)
            if kind.__module__.startswith(("torch.nn.modules.activation", "timm.layers.activations")):
                if not isinstance(child, nn.MultiheadAttention):
                    setattr(module, name, nn.Identity())
            elif isinstance(child, (NORMS, nn.LayerNorm, nn.GroupNorm)):
                child.forward = _scale(child)  # type: ignore[method-assign]
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.abs_()
    return plain


def _scale(norm: nn.Module) -> Any:
    """A norm's scale alone: no statistics, no shift, no activation."""
    # timm's layer norms of maps are torch's by class, but have their channels second.
    last = isinstance(norm, nn.LayerNorm) and "2d" not in type(norm).__name__

    def scaled(x: Tensor) -> Tensor:
        weight: Any = norm.weight
        if weight is None:
            return x
        return x * (weight if last else weight.view(1, -1, *[1] * (x.dim() - 2)))

    return scaled


class SynFlow:
    """Synaptic flow: ``|w x dR/dw|``, R the sum of the kept outputs for a picture of ones through positive weights.

    The published method cuts in many small rounds, scoring again after each. Here the rounds happen on a copy, and the
    ranking that comes out is: later cut = worth more, and within a round by score. One cut at sparsity ``final`` gives
    the published mask.

    Made for networks of convolutions, linear layers, batch norm and pointwise activations; for others (attention) the
    scores are a heuristic.

    Args:
        final: The sparsity that the rounds lead to.
        rounds: Number of rounds.
    """

    def __init__(self, final: float = 0.9, rounds: int = 100) -> None:
        if not 0 < final < 1:
            raise ValueError(f"final sparsity {final}; allowed: between 0 and 1")
        if rounds < 1:
            raise ValueError(f"rounds {rounds}; allowed: at least 1")
        self.final, self.rounds = final, rounds

    def __call__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        losses: Mapping[str, Loss],
        tasks: Sequence[str],
        inputs: Inputs | None = None,
    ) -> dict[str, Scores]:
        """Scores in (0, 1] under the key ``"all"``; a picture's shape is all that is taken from the batches.

        Raises:
            ValueError: If there is no batch, or the flow is not finite.
        """
        tasks = check_tasks(tasks, losses)
        first = next(iter(batches), None)
        if first is None:
            raise ValueError("no scoring batches were given; one is needed for the pictures' shape")
        plain = _linear(model)
        ones = _ones(first)
        weights = prunable(plain)
        used: list[str] = []
        late, alive = torch.zeros(0), torch.zeros(0, dtype=torch.bool)
        for i in range(1, self.rounds + 1):
            found = _flow(plain, ones, tasks, weights, used, inputs)
            if not used:
                used = list(found)
            flow = torch.cat([found[n].flatten() for n in used])
            if i == 1:
                late, alive = torch.zeros_like(flow), torch.ones_like(flow, dtype=torch.bool)
            order = flow.masked_fill(~alive, -1).argsort(descending=True, stable=True)
            keep = max(1, round(len(flow) * (1 - self.final) ** (i / self.rounds)))
            place = torch.empty_like(flow)
            place[order] = torch.linspace(1, 0, len(flow), dtype=flow.dtype, device=flow.device)
            late[alive] = i + place[alive]  # the last round that a weight lived to see, and how well it did there
            alive = torch.zeros_like(alive)
            alive[order[:keep]] = True
            with torch.no_grad():
                for n, part in zip(used, alive.split([found[n].numel() for n in used]), strict=True):
                    weights[n].mul_(part.view_as(weights[n]))
        late[alive] += 1
        rank = torch.empty_like(late)
        rank[late.argsort(stable=True)] = torch.arange(1, len(late) + 1, dtype=late.dtype, device=late.device)
        parts = (rank / len(rank)).float().split([weights[n].numel() for n in used])
        return {JOINT: {n: part.view(weights[n].shape) for n, part in zip(used, parts, strict=True)}}


def _ones(batch: Any) -> Any:
    """One picture of ones of the batch's shape, in the batch's place."""
    if isinstance(batch, Mapping):
        image = batch["image"]
        return {**batch, "image": torch.ones_like(image[:1], dtype=torch.float64)}
    if isinstance(batch, (list, tuple)):
        return type(batch)([torch.ones_like(batch[0][:1], dtype=torch.float64), *batch[1:]])
    return torch.ones_like(batch[:1], dtype=torch.float64)


def _flow(
    plain: nn.Module,
    ones: Any,
    tasks: Sequence[str],
    weights: Mapping[str, nn.Parameter],
    used: Sequence[str],
    inputs: Inputs | None,
) -> Scores:
    """``|w x dR/dw|`` of one round."""
    for weight in weights.values():
        weight.requires_grad_(True)
    outputs = forward(plain, ones, inputs)
    total = torch.stack([outputs[t].sum() for t in tasks]).sum()
    if not torch.isfinite(total):
        raise ValueError("the flow through the network is not finite: SynFlow does not fit it")
    names = list(used) or list(weights)
    grads = torch.autograd.grad(total, [weights[n] for n in names], allow_unused=True)
    return {n: (g * weights[n].detach()).abs() for n, g in zip(names, grads, strict=True) if g is not None}
