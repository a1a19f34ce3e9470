"""Reconstruction: the weights that stay are fitted so that every layer gives what it gave before the cut.

Least squares on a little data, layer by layer in the order of the forward pass, as in AdaPrune (arXiv 2102.08124) and
Optimal Brain Compression (arXiv 2208.11580): the input is that of the cut network, whose earlier layers are fitted
already, the target is the dense layer's output. Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from timm.layers.padding import pad_same
from torch import Tensor, nn

from cut.decomposition import Inputs, network_input, prunable
from cut.selection import Mask
from cut.trace import NORMS

CHUNK = 16  # pictures whose patches are in memory at a time
DIRECT = 1024  # inputs of a row up to which its equations are solved directly
FEW = 4  # sets of kept inputs that rows share, up to which larger ones are too: a cut of units has two
STEPS, TOLERANCE = 60, 1e-4  # of conjugate gradients above that
POSITIONS = 4096  # of a chunk, evenly spaced: neighbours say nearly the same
# What a layer may do: multiply its padded input by its weight. Others transform the weight or the output on the way.
LINEAR = (nn.Conv2d.forward, Conv2dSame.forward, nn.Linear.forward)


def unfittable(network: nn.Module, names: Collection[str] | None = None) -> str | None:
    """Name and kind of the first layer whose output is not its input times its weight; None if there is none.

    Args:
        network: The network.
        names: Parameters, of which the weights are to be fitted; None = all. Those of a dropped head are not.
    """
    fitted = {id(p) for n, p in prunable(network).items() if names is None or n in names}
    for path, module in network.named_modules():
        wanted = isinstance(module, (nn.Conv2d, nn.Linear)) and id(module.weight) in fitted
        if wanted and type(module).forward not in LINEAR:
            return f"{path!r}, a {type(module).__name__}"
    return None


def check_fittable(network: nn.Module, names: Collection[str] | None = None) -> None:
    """Refuse a network with layers whose output is not their input times their weight.

    Args:
        network: The network.
        names: As for :func:`unfittable`.

    Raises:
        ValueError: If there is such a layer, as a weight-standardised convolution is.
    """
    stop = unfittable(network, names)
    if stop is not None:
        raise ValueError(
            f"the weights of {stop}, cannot be fitted (reconstruct); allowed: Conv2d, Conv2dSame and Linear layers"
        )


def _padded(layer: Any, x: Tensor) -> Tensor:
    """A convolution's input with what it adds at the edges."""
    if isinstance(layer, Conv2dSame):
        return pad_same(x, list(layer.kernel_size), list(layer.stride), list(layer.dilation))
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        return F.pad(x, layer._reversed_padding_repeated_twice, mode)
    high, wide = layer.padding
    return F.pad(x, (wide, wide, high, high))


def _patches(layer: nn.Conv2d | nn.Linear, x: Tensor, step: int = 1) -> Tensor:
    """A layer's inputs at every ``step``-th position as [groups, inputs of a weight's row, positions]."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])[::step].T[None]
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    x = _padded(layer, x)
    count, channels, height, width = x.shape
    high, wide = (height - dh * (kh - 1) - 1) // sh + 1, (width - dw * (kw - 1) - 1) // sw + 1
    # Gathered at the wanted positions only: unfold would write all of them first.
    at = torch.arange(0, count * high * wide, step, device=x.device)
    picture, row, column = at // (high * wide), at // wide % high * sh, at % wide * sw
    down = torch.arange(kh, device=x.device).repeat_interleave(kw) * dh
    along = torch.arange(kw, device=x.device).repeat(kh) * dw
    found = x.permute(0, 2, 3, 1)[picture[:, None], row[:, None] + down, column[:, None] + along]
    return found.view(len(at), kh * kw, layer.groups, channels // layer.groups).permute(2, 3, 1, 0).flatten(1, 2)


def _targets(layer: nn.Conv2d | nn.Linear, y: Tensor, step: int = 1) -> Tensor:
    """A layer's outputs at every ``step``-th position as [groups, outputs of a group, positions]."""
    if isinstance(layer, nn.Linear):
        return y.reshape(-1, y.shape[-1])[::step].T[None]
    rows = y.permute(0, 2, 3, 1).reshape(-1, y.shape[1])[::step]
    return rows.T.reshape(layer.groups, y.shape[1] // layer.groups, -1)


def _squares(columns: Tensor, used: Tensor) -> Tensor:
    """Inputs times inputs as [groups, d, d]; of inputs that no row uses, only with themselves.

    Args:
        columns: Inputs [groups, d, positions].
        used: Bool [groups, d].
    """
    if len(columns) > 1 or bool(used.all()):
        return columns @ columns.transpose(1, 2)
    # Half of a layer's channels gone: a quarter of the products. The unused count only in the strength of the pull.
    index = used[0].nonzero().flatten()
    some = columns[0, index]
    whole = columns[0].square().sum(1).diag()
    whole[index[:, None], index] = some @ some.T
    return whole[None]


def fit(gram: np.ndarray, moment: np.ndarray, kept: np.ndarray, start: np.ndarray, ridge: float) -> np.ndarray:
    """The least-squares weights of one layer's group under a mask, pulled a little towards where they were.

    Minimises, for every output row, ``w G w - 2 w m + ridge x mean(diag G) x |w - start|^2`` over the kept weights.
    Rows that keep the same inputs, as all do after a cut of whole units, are solved together.

    Args:
        gram: Inputs times inputs, [d, d].
        moment: Outputs times inputs, [rows, d].
        kept: Bool [rows, d].
        start: The weights as they are, [rows, d].
        ridge: Strength of the pull, relative to the inputs' mean square.

    Returns:
        [rows, d], zero where not kept.
    """
    pull = ridge * max(float(np.trace(gram)) / len(gram), 1e-12)
    result = np.zeros_like(moment)
    sets, set_of = np.unique(kept, axis=0, return_inverse=True)
    for number, chosen in enumerate(sets):
        index, rows = np.flatnonzero(chosen), np.flatnonzero(set_of.ravel() == number)
        if len(index):
            matrix = gram[np.ix_(index, index)] + pull * np.eye(len(index))
            here = np.ix_(rows, index)
            result[here] = np.linalg.solve(matrix, (moment[here] + pull * start[here]).T).T
    return result


def fit_large(gram: Tensor, moment: Tensor, kept: Tensor, start: Tensor, ridge: float) -> Tensor:
    """What :func:`fit` finds, by conjugate gradients on all rows at once: a product with the matrix per step.

    A row of a 3x3 layer with 512 inputs has 4608 unknowns; solving the equations of each row alone would take hours.

    Args:
        gram: Inputs times inputs, [d, d].
        moment: Outputs times inputs, [rows, d].
        kept: Bool [rows, d].
        start: The weights as they are, [rows, d].
        ridge: Strength of the pull, relative to the inputs' mean square.

    Returns:
        Float32 [rows, d] on the inputs' device, zero where not kept; as good a fit to about 1e-4.
    """
    pull = ridge * gram.diagonal().mean().clamp_min(1e-12)
    scale = (gram.diagonal() + pull).rsqrt() * kept  # Jacobi's preconditioner, on both sides, within the mask
    whole = (gram.diagonal() + pull).rsqrt()

    def times(x: Tensor) -> Tensor:
        return (x * scale) @ gram * scale + pull * scale * scale * x

    found = start * kept / whole
    residual = (moment + pull * start) * scale - times(found)
    step, size = residual.clone(), residual.square().sum(1, keepdim=True)
    least = size * TOLERANCE**2
    for _ in range(STEPS):
        product = times(step)
        along = size / (step * product).sum(1, keepdim=True).clamp_min(1e-30)
        found, residual = found + along * step, residual - along * product
        size, before = residual.square().sum(1, keepdim=True), size
        if bool((size <= least).all()):
            break
        step = residual + size / before.clamp_min(1e-30) * step
    return found * scale


class _Fitter:
    """Hooks that fit each layer when its input has arrived, before it runs."""

    def __init__(self, mask: Mapping[str, Tensor], ridge: float) -> None:
        self.mask, self.ridge = mask, ridge
        self.wanted: dict[nn.Module, Tensor] = {}
        self.twins: dict[nn.Module, nn.Module] = {}
        self.moments: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def remember(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        """A dense layer has run: keep the output of its first call."""
        self.wanted.setdefault(module, output.detach())

    def observe(self, norm: nn.Module, args: Any) -> None:
        """A dense batch norm is about to run: keep what it receives."""
        self.moments.setdefault(norm, _moments(args[0]))

    def match(self, norm: nn.Module, args: Any) -> None:
        """Set the statistics of a batch norm that is about to run."""
        before = self.moments.pop(self.twins[norm], None)
        if before is not None:
            _match(norm, self.twins[norm], _moments(args[0]), before)

    def fit(self, name: str, layer: Any, x: Tensor) -> None:
        """Fit one layer, in place."""
        y = self.wanted.pop(self.twins[layer], None)
        if y is None:  # a second call of a layer that is used twice
            return
        if layer.bias is not None:
            shape = (-1,) if isinstance(layer, nn.Linear) else (1, -1, 1, 1)
            y = y - layer.bias.view(shape)
        weight = layer.weight.detach()
        groups = getattr(layer, "groups", 1)
        rows = len(weight) // groups
        kept = self.mask[name].reshape(groups, rows, -1)
        old = weight.reshape(groups, rows, -1)
        used = kept.any(1)
        gram: Any = 0.0
        moment: Any = 0.0
        for start in range(0, len(x), CHUNK):
            part = y[start : start + CHUNK]
            step = max(1, part.numel() // layer.weight.shape[0] // POSITIONS)
            columns = _patches(layer, x[start : start + CHUNK].float(), step).contiguous()
            outputs = _targets(layer, part.float(), step).contiguous()
            gram = gram + _squares(columns, used.to(columns.device))
            moment = moment + outputs @ columns.transpose(1, 2)
        if gram.shape[-1] > DIRECT and max(len(of_group.unique(dim=0)) for of_group in kept) > FEW:
            parts = (gram, moment, kept.to(gram.device), old.float())
            new = torch.stack([fit_large(*group, self.ridge) for group in zip(*parts, strict=True)])
        else:
            grams, moments, starts = (t.double().cpu().numpy() for t in (gram, moment, old))
            groups_of = zip(grams, moments, kept.cpu().numpy(), starts, strict=True)
            new = torch.from_numpy(np.stack([fit(*group, self.ridge) for group in groups_of]))
        layer.weight.copy_(new.view(weight.shape).to(weight))


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of every channel."""
    sides = [d for d in range(x.dim()) if d != 1]
    mean = x.float().mean(sides, keepdim=True)
    return mean.flatten(), (x - mean).square_().mean(sides)  # much faster than var


def _match(norm: Any, dense: Any, now: tuple[Tensor, Tensor], before: tuple[Tensor, Tensor]) -> None:
    """Running statistics with which a batch norm's output has the mean and variance that the dense one's has."""
    if norm.running_mean is None:
        return
    (mean, var), (old_mean, old_var) = now, before
    scale = (dense.running_var + dense.eps).sqrt()
    norm.running_var.copy_((var * dense.running_var / old_var.clamp_min(1e-12)).clamp_min(1e-12))
    norm.running_mean.copy_(mean - (norm.running_var + norm.eps).sqrt() * (old_mean - dense.running_mean) / scale)


@torch.no_grad()
def reconstruct(
    network: nn.Module,
    dense: nn.Module,
    mask: Mask,
    batches: Iterable[Any],
    inputs: Inputs | None = None,
    ridge: float = 1e-2,
) -> None:
    """Fit the kept weights of every Conv2d and Linear, and batch norm's statistics, in place.

    All pictures go through the network at once, so keep them few: some tens.

    Args:
        network: The network under the mask.
        dense: The network before the cut, of the same architecture.
        mask: Which weights may be fitted.
        batches: Pictures to fit on, on the network's device.
        inputs: How to get the network's input from a batch.
        ridge: Pull towards the weights as they are, relative to the inputs' mean square.

    Raises:
        ValueError: If there are no batches, ``ridge`` is negative, or a layer cannot be fitted.
    """
    check_fittable(network, mask)
    if ridge < 0:
        raise ValueError(f"ridge {ridge}; allowed: at least 0")
    pictures = [(inputs or network_input)(b) for b in batches]
    if not pictures:
        raise ValueError("no batches to fit the weights on")
    image = torch.cat(pictures)
    if image.dim() == 4:
        image = image.contiguous(memory_format=torch.channels_last)  # many pictures at once are several times faster
    fitter = _Fitter(mask, ridge)
    names = {id(p): n for n, p in prunable(network).items()}
    twins = dict(dense.named_modules())
    modes = {m: m.training for net in (network, dense) for m in net.modules()}
    handles: list[Any] = []

    def before(name: str) -> Any:
        return lambda module, args: fitter.fit(name, module, args[0])

    try:
        for path, module in network.named_modules():
            name = names.get(id(getattr(module, "weight", None)))
            if isinstance(module, (nn.Conv2d, nn.Linear)) and name in mask:
                fitter.twins[module] = twins[path]
                handles.append(twins[path].register_forward_hook(fitter.remember))
                handles.append(module.register_forward_pre_hook(before(name)))
            elif isinstance(module, NORMS):
                fitter.twins[module] = twins[path]
                handles.append(twins[path].register_forward_pre_hook(fitter.observe))
                handles.append(module.register_forward_pre_hook(fitter.match))
        network.eval()
        dense.eval()(image)
        network(image)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
