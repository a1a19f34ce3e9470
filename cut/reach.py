"""Reach: which channels can matter to a network's outputs, read from the zero pattern of its weights.

The network is run with random values in the place of its non-zero parameters. What is exactly zero under
every draw has no path from the input, and what has a gradient of exactly zero has no path to an output. So
any operation in between is covered (padding, additions, gates, concatenations), and a constant that a norm
leaves behind is never mistaken for zero. A unit that merely stays silent on some data counts as alive.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cut.decomposition import no_trace
from cut.trace import LAYERS

_DRAWS = (("positive", "positive"), ("positive", "signed"), ("signed", "signed"), ("signed", "signed"))


@dataclass
class _Flags:
    """What was seen of a layer's input channels: any non-zero value, any non-zero gradient."""

    layer: nn.Module
    nonzero: Tensor
    wanted: Tensor

    def watch(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Forward pre-hook; without a gradient to judge by (a detached branch) all counts as wanted."""
        if args:
            self.nonzero |= self._any_nonzero(args[0].detach())
        else:
            self.nonzero.fill_(True)
        if args and args[0].requires_grad:
            args[0].register_hook(self._watch_gradient)
        else:
            self.wanted.fill_(True)

    def _watch_gradient(self, gradient: Tensor) -> None:
        self.wanted |= self._any_nonzero(gradient)

    def _any_nonzero(self, x: Tensor) -> Tensor:
        dim = -1 if isinstance(self.layer, nn.Linear) else -1 - len(self.layer.kernel_size)  # type: ignore[arg-type]
        return (x != 0).movedim(dim, 0).flatten(1).any(1)


def alive_inputs(model: nn.Module, example: Tensor) -> dict[str, Tensor]:
    """Which input channels of each convolution and linear layer can matter to the outputs.

    Args:
        model: Any module that returns ``{task: Tensor}``.
        example: An input batch.

    Returns:
        Module name to a bool tensor with one entry per input channel; False only if the channel is always
        zero there or its value never reaches an output.
    """
    generator = torch.Generator().manual_seed(0)
    flags: dict[str, _Flags] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LAYERS):
            size = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
            none = torch.zeros(size, dtype=torch.bool, device=example.device)
            flags[name] = _Flags(layer, none, none.clone())
    _run(copy.deepcopy(model), example, flags, generator)
    for weights, inputs in _DRAWS:
        if all(bool((f.nonzero & f.wanted).all()) for f in flags.values()):
            break
        drawn = copy.deepcopy(model).float()
        _draw_parameters(drawn, weights == "signed", generator)
        x = example
        if example.is_floating_point():
            x = torch.rand(example.shape, generator=generator).to(example.device)
            x = 2 * x - 1 if inputs == "signed" else x
        _run(drawn, x, flags, generator)
    return {name: f.nonzero & f.wanted for name, f in flags.items()}


def _draw_parameters(model: nn.Module, signed: bool, generator: torch.Generator) -> None:
    """Replace what is not zero by random values, so small that no activation saturates; zeros stay zeros."""

    def draw(like: Tensor, low: float, high: float) -> Tensor:
        values = torch.rand(like.shape, generator=generator) * (high - low) + low
        if signed:
            values = values * (torch.randint(0, 2, like.shape, generator=generator) * 2 - 1)
        return values.to(like.device, like.dtype).masked_fill_(like == 0, 0)

    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim >= 2:
                rows = draw(p, 0.1, 1.0).flatten(1)
                p.copy_((0.5 * rows / rows.abs().sum(1, keepdim=True).clamp_min(1e-12)).view_as(p))
            else:
                p.copy_(draw(p, 0.05, 0.15) if name.endswith("bias") else draw(p, 0.5, 1.0))
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(-draw(b, 0.01, 0.1))
            elif name.endswith("running_var"):
                b.copy_((b != 0).to(b.dtype))


def _run(model: nn.Module, x: Tensor, flags: dict[str, _Flags], generator: torch.Generator) -> None:
    """One forward and backward pass that adds to the flags."""
    modules = dict(model.named_modules())
    hooks = [modules[name].register_forward_pre_hook(f.watch) for name, f in flags.items()]
    with no_trace(model):
        outputs = list(model(x).values())
        with_gradient = [o for o in outputs if o.requires_grad]
        if len(with_gradient) < len(outputs):
            for f in flags.values():
                f.wanted.fill_(True)
        # Random factors: a plain sum may have no gradient (the sum of a softmax is one).
        losses = [(o * torch.randn(o.shape, generator=generator).to(o)).sum().double() for o in with_gradient]
        if losses:
            parameters = [p for p in model.parameters() if p.requires_grad]
            torch.autograd.grad(losses, parameters, allow_unused=True)
    for hook in hooks:
        hook.remove()
