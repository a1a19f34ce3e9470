"""Modulators: a frozen filter bank for all tasks, followed by a small map of each task's own (arXiv 2007.12540).

A convolution ``y = W x + b`` becomes a bank ``W_s`` (frozen, shared) and a modulator ``W_t`` (a 1x1 convolution, one
per task): ``y = W_t (W_s x) + b_t``. With the response initialisation ``W_s = U' W`` and ``W_t = U`` (``U'`` the
transpose), where the columns of ``U`` are the principal directions of the convolution's outputs; ``U`` is square and
orthogonal, so the network's function is unchanged at the start. Rows of ``W_t`` are weight-normalised; norms are each
task's own.

For a device with a single task :meth:`cut.variants.VariantNet.plain` multiplies ``W_t`` into the bank: then it costs
nothing.

**Which convolutions.** Those whose modulator is no larger than their bank: not grouped, and ``C_out <= C_in x k x k``.
So all 3x3 ones of a ResNet and the projections of a MobileNet have one; 1x1 shortcuts that double the channels,
expansions and a stem with more outputs than its inputs can fill have none. Depthwise ones have none either: a dense 1x1
map would be C/9 times their size, and what is left of it within a group, a factor per channel, is the task's norm.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from cut.decomposition import forward
from cut.network import MultiTaskNet
from cut.scorebatches import ScoringBatches
from cut.variants import Variant, VariantNet, key_of, name_of

TOLERANCE = 1e-3  # of the outputs' largest value: rounding of some fifty layers stays far below


def modulated_convolutions(backbone: nn.Module) -> dict[str, nn.Conv2d]:
    """The convolutions that get a modulator, by name: not grouped, and the modulator no larger than the bank.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 1))
        >>> list(modulated_convolutions(net))
        ['0']
    """
    convolutions = {n: m for n, m in backbone.named_modules() if isinstance(m, nn.Conv2d)}
    return {n: m for n, m in convolutions.items() if m.groups == 1 and len(m.weight) <= m.weight[0].numel()}


class Modulator(nn.Module):
    """A task's square map over the outputs of a bank, and its bias.

    Args:
        directions: [C, C], its first value.
        bias: [C], or None for a convolution without.
        normalised: Whether rows are kept as direction and length (weight normalisation), the length learnt apart.
    """

    def __init__(self, directions: Tensor, bias: Tensor | None, normalised: bool) -> None:
        super().__init__()
        self.directions = nn.Parameter(directions.clone(memory_format=torch.contiguous_format))
        self.lengths = nn.Parameter(self.directions.detach().norm(dim=1)) if normalised else None
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    @property
    def matrix(self) -> Tensor:
        """[C, C]: what the bank's outputs are multiplied with."""
        if self.lengths is None:
            return self.directions
        return self.lengths[:, None] * self.directions / self.directions.norm(dim=1, keepdim=True)

    def forward(self, response: Tensor) -> Tensor:
        """The convolution's output [B, C, H, W] from the bank's."""
        return F.conv2d(response, self.matrix[:, :, None, None], self.bias)

    def settle(self) -> None:
        """Multiply the lengths in, for good; the outputs keep every bit."""
        matrix = self.matrix.detach()
        self.lengths = None
        self.directions = nn.Parameter(matrix)


class Modulators(Variant):
    """A task's modulators and norms.

    Args:
        backbone: The backbone; its weights become banks with :func:`modulated`.
        directions: Convolution to the first value of its modulator.
        normalised: See :class:`Modulator`.
    """

    def __init__(self, backbone: nn.Module, directions: Mapping[str, Tensor], normalised: bool) -> None:
        super().__init__(backbone)
        convolutions = modulated_convolutions(backbone)
        self.modulators = nn.ModuleDict(
            {key_of(n): Modulator(d, convolutions[n].bias, normalised) for n, d in directions.items()}
        )

    def responses(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """Convolution to the task's modulator."""
        return dict(self.each())

    def folded(self, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The task's tensors by name: norms, and the products of modulators and banks with their biases."""
        found = self.tensors(base)
        for name, modulator in self.each().items():
            bank = base[f"{name}.weight"]
            found[f"{name}.weight"] = (modulator.matrix @ bank.flatten(1)).view_as(bank)
            if modulator.bias is not None:
                found[f"{name}.bias"] = modulator.bias
        return found

    def each(self) -> dict[str, Modulator]:
        """Convolution to the task's modulator."""
        return {name_of(k): m for k, m in self.modulators.items() if isinstance(m, Modulator)}

    def size(self) -> int:
        """Parameters of norms, modulators (lengths multiplied in) and biases."""
        own = (m.directions.numel() + (0 if m.bias is None else m.bias.numel()) for m in self.each().values())
        return super().size() + sum(own)


def modulator_share(network: VariantNet) -> dict[str, float]:
    """Convolution to the size of one task's modulator, as a share of its bank; 1/9 for 3x3 with C_in = C_out.

    Raises:
        ValueError: If the network has no modulators.
    """
    first = next(iter(network.variants.values())) if isinstance(network, VariantNet) else None
    if not isinstance(first, Modulators):
        raise ValueError(f"{type(network).__name__} has no modulators; allowed: what cut.modulators.modulated returns")
    banks = dict(network.backbone.named_parameters())
    return {n: m.directions.numel() / banks[f"{n}.weight"].numel() for n, m in first.each().items()}


def settle(network: VariantNet) -> None:
    """Multiply the lengths of weight-normalised rows in, in place; the outputs keep every bit.

    Then all that the network holds is deployed: its parameters are :func:`cut.variants.deployed`.
    """
    for variant in network.variants.values():
        for modulator in variant.each().values() if isinstance(variant, Modulators) else ():
            modulator.settle()


def modulated(
    network: MultiTaskNet,
    batches: Iterable[Any] | None,
    tasks: Sequence[str] | None = None,
    *,
    normalised: bool = True,
) -> VariantNet:
    """A copy of a network with a frozen bank and a modulator per task in its convolutions; the function is unchanged.

    Args:
        network: Left as it is.
        batches: Some batches, on the network's device, for the principal directions of the convolutions' outputs; None
            starts every modulator at the identity (to fill in a saved state, or to compare).
        tasks: The tasks that it has; default all. The other heads are left out.
        normalised: Whether the modulators' rows are weight-normalised.

    Raises:
        ValueError: If no convolution can have a modulator, the batches are none or give outputs that are not finite, a
            task is unknown, the network has variants already, or its convolutions change their weights before use, so
            that a modulator cannot stand in for them.
    """
    tasks = list(network.heads) if tasks is None else tasks
    if isinstance(network, VariantNet):
        raise ValueError("the network's tasks have variants already; allowed: a plain MultiTaskNet")
    convolutions = modulated_convolutions(network.backbone)
    if not convolutions:
        raise ValueError(f"{network.config.backbone} has no convolution that a modulator can follow")
    given = None if batches is None else list(batches)
    if given is None:
        directions = {n: torch.eye(len(m.weight)).to(m.weight) for n, m in convolutions.items()}
    else:
        directions = principal_directions(network, given)
    result = VariantNet(network, lambda backbone: Modulators(backbone, directions, normalised), tasks)
    with torch.no_grad():
        for name, bank in modulated_convolutions(result.backbone).items():
            turned = directions[name].double().T @ bank.weight.double().flatten(1)
            bank.weight.copy_(turned.view_as(bank.weight))
            if bank.bias is not None:  # each task has its own, behind its modulator
                bank.bias.zero_()
    if given is not None:
        _check_unchanged(network, result, given[0])
    return result


def principal_directions(network: MultiTaskNet, batches: Sequence[Any]) -> dict[str, Tensor]:
    """The principal directions of the outputs of the convolutions that get a modulator.

    Args:
        network: In eval mode for the measurement; put back afterwards.
        batches: At least one, on the network's device.

    Returns:
        Convolution to U [C, C], orthogonal; column i is the direction of the i-th largest variance.

    Raises:
        ValueError: If there are no batches, or an output is not finite.
    """
    if not batches:
        raise ValueError("no batches to measure the convolutions' outputs on; allowed: at least one")
    sums: dict[str, list[Tensor]] = {}
    count: dict[str, int] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            rows = output.detach().transpose(0, 1).flatten(1).double()
            mine = [rows.sum(1), rows @ rows.T]
            sums[name] = [a + b for a, b in zip(sums[name], mine, strict=True)] if name in sums else mine
            count[name] = count.get(name, 0) + rows.shape[1]

        return hook

    modes = [(m, m.training) for m in network.modules()]
    handles = [m.register_forward_hook(watch(n)) for n, m in modulated_convolutions(network.backbone).items()]
    network.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                forward(network, batch)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    weights = modulated_convolutions(network.backbone)
    found = {}
    for name, (total, products) in sums.items():
        mean = total / count[name]
        covariance = products / count[name] - mean[:, None] * mean
        if not torch.isfinite(covariance).all():
            raise ValueError(f"the outputs of {name} are not finite; response initialisation needs finite ones")
        found[name] = torch.linalg.eigh(covariance).eigenvectors.flip(1).to(weights[name].weight)
    return found


def _check_unchanged(before: MultiTaskNet, after: VariantNet, batch: Any) -> None:
    """ValueError if the outputs are not those of the plain network."""
    plain, mine = copy.deepcopy(before).eval(), copy.deepcopy(after).eval()
    plain.select(list(mine.heads))
    mine.select(list(mine.heads))
    with torch.no_grad():
        wanted, found = forward(plain, batch), forward(mine, batch)
    for task, value in wanted.items():
        scale = float(value.abs().max().clamp_min(1))
        worst = float((found[task] - value).abs().max())
        if not worst <= TOLERANCE * scale:
            raise ValueError(
                f"the modulated network's output {task!r} differs by {worst:.2g}: {before.config.backbone} changes its "
                "convolutions' weights before use, so they cannot have modulators"
            )


class ResponseModulators(Callback):
    """Train with :func:`modulated` convolutions instead of a common backbone; bank and shared layers are frozen.

    The plain network of a :class:`cut.model.MultiTaskModel` is replaced when fitting is set up, from the weights that
    it has then. It needs no budget.

    Args:
        batches: Scoring batches for the response initialisation.
        normalised: Whether the modulators' rows are weight-normalised.
    """

    def __init__(self, batches: int = 4, normalised: bool = True) -> None:
        if batches < 1:
            raise ValueError(f"batches {batches}; allowed: at least 1")
        self.batches, self.normalised = batches, normalised

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Replace the network, before the optimiser is made and a checkpoint is loaded."""
        module: Any = pl_module
        if stage != "fit" or isinstance(module.network, VariantNet):
            return
        data: Any = getattr(trainer, "datamodule", None)
        if not hasattr(data, "score_batches"):
            raise ValueError("the data module has no score_batches(n) (see cut.data.base.MultiTaskData)")
        given = ScoringBatches(data.score_batches(self.batches), pl_module.device, "principal directions")
        module.network = modulated(module.network, given, normalised=self.normalised)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Multiply the lengths in, unless the training was stopped before its end."""
        module: Any = pl_module
        if not trainer.interrupted:
            settle(module.network)
