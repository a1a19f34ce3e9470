"""SynFlow: what of a network's flow passes through a weight, without data (Tanaka et al., arXiv 2006.05467)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from cut.decomposition import Inputs, Loss, check_tasks, forward, prunable
from cut.scores import JOINT, Scores
from cut.trace import NORMS


def _linear(model: nn.Module) -> nn.Module:
    """A float64 copy in which every weight is positive and nothing clips, so that flow is multiplied and added only.

    Activations become the identity, which they are (up to a constant) for positive inputs; norms only scale. Biases are
    zero, as norms' shifts are: what they add has come through no layer before them.
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
        for name, parameter in plain.named_parameters():
            parameter.zero_() if name.rpartition(".")[2] == "bias" else parameter.abs_()
    return plain


def _scale(norm: nn.Module) -> Any:
    """A norm's scale alone, as in inference: no shift, no activation.

    A batch norm's scale is its weight over the running standard deviation. Without the latter the flow of a trained
    network would tell how wide its channels' inputs are, which the norm takes out again.
    """
    # timm's layer norms of maps are torch's by class, but have their channels second.
    last = isinstance(norm, nn.LayerNorm) and "2d" not in type(norm).__name__

    def scaled(x: Tensor) -> Tensor:
        weight, variance = cast(Any, norm.weight), getattr(norm, "running_var", None)
        shape = (-1,) if last else (1, -1, *[1] * (x.dim() - 2))
        if variance is not None:
            x = x / (variance + norm.eps).sqrt().view(shape)
        return x if weight is None else x * (weight if last else weight.view(shape))

    return scaled


class SynFlow:
    """Synaptic flow: ``|w x dR/dw|``, R the sum of a network's outputs for a picture of ones through positive weights.

    The method is published for one output. Of several tasks each has a flow R_t of its own, and they differ by orders
    of magnitude (a head with more layers or channels multiplies it), so a sum of the R_t would be the largest task's
    flow alone. With ``equal`` the score is therefore that of the sum of log R_t, ``sum_t |w x dR_t/dw| / R_t``: what
    share of each task's flow passes through the weight. The law of conservation holds for each task: the shares of a
    layer that all of its flow passes sum to 1.

    The published method cuts in many small rounds, scoring again after each. Here the rounds happen on a copy, and the
    ranking that comes out is: later cut = worth more, and within a round by score. One cut at sparsity ``final`` gives
    the published mask.

    Made for networks of convolutions, linear layers, batch norm and pointwise activations; for others (attention) the
    scores are a heuristic.

    Args:
        final: The sparsity that the rounds lead to.
        rounds: Number of rounds.
        equal: Whether every task's flow counts the same; else the flows are added as they are.
    """

    def __init__(self, final: float = 0.9, rounds: int = 100, equal: bool = True) -> None:
        if not 0 < final < 1:
            raise ValueError(f"final sparsity {final}; allowed: between 0 and 1")
        if rounds < 1:
            raise ValueError(f"rounds {rounds}; allowed: at least 1")
        self.final, self.rounds, self.equal = final, rounds, equal

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
            found = _flow(plain, ones, tasks, weights, used, inputs, self.equal)
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
    equal: bool = True,
) -> Scores:
    """``|w x dR/dw|`` of one round, each task's divided by its R if they count the same."""
    for weight in weights.values():
        weight.requires_grad_(True)
    outputs = forward(plain, ones, inputs)
    flows = torch.stack([outputs[t].sum() for t in tasks])
    if not torch.isfinite(flows).all():
        raise ValueError("the flow through the network is not finite: SynFlow does not fit it")
    if equal:  # a task that nothing flows to any more has no share to give
        flows = torch.where(flows > 0, flows / flows.detach().where(flows > 0, 1.0), 0.0)
    names = list(used) or list(weights)
    grads = torch.autograd.grad(flows.sum(), [weights[n] for n in names], allow_unused=True)
    return {n: (g * weights[n].detach()).abs() for n, g in zip(names, grads, strict=True) if g is not None}
