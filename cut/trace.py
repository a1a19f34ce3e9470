"""Trace: what one forward pass shows about a model's layers: their order, and what feeds what directly.

Two things cannot be read from parameters alone: which layer a task's output comes from last (its rows get a floor), and
which batch norm, and which layer after it, receives exactly one layer's channels (a dead channel is silenced through
them).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cut.decomposition import Inputs, Owners, forward, no_trace

LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
NORMS = nn.modules.batchnorm._BatchNorm
# Modules that map a channel of zeros to a channel of zeros and keep channels apart.
ZERO_PRESERVING = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.ELU,
    nn.SiLU,
    nn.GELU,
    nn.Hardswish,
    nn.Hardtanh,
    nn.Mish,
    nn.Tanh,
    nn.Identity,
    nn.modules.dropout._DropoutNd,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
)


def preserves_zero(module: nn.Module) -> bool:
    """Whether a module maps zero channels to zero channels; false when in doubt."""
    if isinstance(module, nn.Hardtanh):
        return module.min_val <= 0 <= module.max_val
    return isinstance(module, ZERO_PRESERVING)


@dataclass
class Trace:
    """The modules called in one forward pass.

    Attributes:
        calls: Names of the layers, norms and zero-preserving modules in the order of their calls.
        feeds: Module name to the name of the module whose output it received unchanged, or None if it received anything
            else (an input, a sum, a reshaped tensor). A module called more than once has one entry per call.
    """

    calls: list[str] = field(default_factory=list)
    feeds: dict[str, list[str | None]] = field(default_factory=dict)

    def last_layers(self, model: nn.Module, used: Owners) -> dict[str, str]:
        """Task to the weight name of the last layer that was called among those it uses."""
        names = {id(p): n for n, p in model.named_parameters()}
        modules = dict(model.named_modules())
        last: dict[str, str] = {}
        for call in self.calls:
            if isinstance(modules[call], LAYERS):
                weight = names[id(modules[call].weight)]
                last.update({task: weight for task, mine in used.items() if weight in mine})
        return last


def trace(model: nn.Module, batch: Any, inputs: Inputs | None = None) -> Trace:
    """Run the model once in eval mode and note which module's output went unchanged into which module.

    A tensor that was changed in place on the way (a residual sum) counts as changed.
    """
    found = Trace()
    produced: dict[int, tuple[str, int, Tensor]] = {}  # the tensor is kept, so that its id stays taken
    handles = []

    def watch(name: str, module: nn.Module) -> None:
        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            source = produced.get(id(args[0])) if args and isinstance(args[0], Tensor) else None
            known = source is not None and source[1] == source[2]._version
            found.calls.append(name)
            found.feeds.setdefault(name, []).append(source[0] if known and source else None)

        def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor):
                produced[id(output)] = (name, output._version, output)

        handles.append(module.register_forward_pre_hook(before))
        handles.append(module.register_forward_hook(after))

    for name, module in model.named_modules():
        if isinstance(module, (*LAYERS, NORMS)) or preserves_zero(module):
            watch(name, module)
    try:
        with no_trace(model), torch.no_grad():
            forward(model, batch, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found
