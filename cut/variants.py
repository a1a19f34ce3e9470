"""Variants: one backbone for all tasks, in which each task has some tensors of its own.

The backbone runs once for each selected task, with the task's tensors in the place of the shared ones. What the tensors
are is up to a :class:`Variant`: see :mod:`cut.sharing` and :mod:`cut.modulators`. As no task's output depends on
another task's tensors, dropping a task is exact: the outputs of the others keep every bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from cut import backbones
from cut.decomposition import check_tasks
from cut.network import MultiTaskNet

NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)


def key_of(name: str) -> str:
    """A parameter's or module's name as a key of a ModuleDict, which allows no dots.

    Example:
        >>> key_of("layer1.0.conv1"), name_of("layer1/0/conv1")
        ('layer1/0/conv1', 'layer1.0.conv1')
    """
    return name.replace(".", "/")


def name_of(key: str) -> str:
    """The name that :func:`key_of` made a key of."""
    return key.replace("/", ".")


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and buffers by name, without those of its children."""
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}


class Variant(nn.Module):
    """What one task has of its own in a shared backbone; here: its norms, which start as copies of the backbone's.

    Args:
        backbone: Whose norms are copied.
        norms: Whether the task has norms of its own; without, the shared ones are used as they are.
    """

    def __init__(self, backbone: nn.Module, norms: bool = True) -> None:
        super().__init__()
        found = {n: m for n, m in backbone.named_modules() if isinstance(m, NORMS) and norms}
        self.norms = nn.ModuleDict({key_of(n): copy.deepcopy(m).requires_grad_(True) for n, m in found.items()})

    def tensors(self, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The task's tensors, by the names of those of the backbone that they stand in for.

        Args:
            base: The backbone's parameters by name.
        """
        return {f"{name_of(k)}.{n}": t for k, norm in self.norms.items() for n, t in own_tensors(norm).items()}

    def responses(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """Modules of the backbone, by name, to a linear map of the task's own that their output goes through."""
        return {}

    def folded(self, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Like :meth:`tensors`, with the maps of :meth:`responses` multiplied into the weights in front of them."""
        return self.tensors(base)

    def size(self) -> int:
        """Parameters that must be deployed for this task beside the backbone and the head."""
        return sum(p.numel() for p in self.norms.parameters())


class VariantNet(MultiTaskNet):
    """A multi-task network whose backbone is frozen and runs once per task, with the task's own tensors.

    ``spec`` describes the plain network that it was made from; what made the variants has to be applied to that again
    before a state can be loaded.

    Args:
        network: The plain network; it is copied.
        make: The copy's backbone to a new task's variant; called once for each task.
        tasks: The tasks that it has, in the order of the network's heads; the other heads are left out.

    Raises:
        ValueError: If a task is unknown or named twice, none is named, or the network has variants already.
    """

    variants: nn.ModuleDict

    def __init__(self, network: MultiTaskNet, make: Callable[[nn.Module], Variant], tasks: Sequence[str]) -> None:
        if isinstance(network, VariantNet):
            raise ValueError("the network's tasks have variants already; allowed: a plain MultiTaskNet")
        tasks = check_tasks(tasks, set(network.heads))
        nn.Module.__init__(self)
        vars(self).update(vars(copy.deepcopy(network)))  # modules, sizes and selection of the plain network
        for task in set(self.heads) - set(tasks):
            del self.heads[task]
        self.active = [t for t in self.active if t in tasks] or list(self.heads)
        self.backbone.requires_grad_(False)
        self.variants = nn.ModuleDict({t: make(self.backbone) for t in self.heads})

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Outputs of the selected tasks, as :meth:`cut.network.MultiTaskNet.forward` gives them."""
        fitted, base = self._fitted(image), dict(self.backbone.named_parameters())
        outputs = {}
        for task, head in self.heads.items():
            if task not in self.active or task not in self.variants:
                continue
            variant = self._variant(task)
            with _through(self.backbone, variant.responses()):
                maps = functional_call(self.backbone, variant.tensors(base), (fitted,))
            out = head(backbones.nchw(maps, self.nhwc))
            if task not in self.image_level:
                out = F.interpolate(out, size=image.shape[-2:], mode="bilinear", align_corners=False)
            outputs[task] = out
        return outputs

    def train(self, mode: bool = True) -> VariantNet:
        """Set the mode; norms that tasks share stay in eval mode, as their statistics are part of what is frozen."""
        super().train(mode)
        if any(not len(self._variant(t).norms) for t in self.variants):
            for module in self.backbone.modules():
                if isinstance(module, NORMS):
                    module.eval()
        return self

    def _variant(self, task: str) -> Variant:
        found = self.variants[task]
        assert isinstance(found, Variant)
        return found

    def drop(self, task: str) -> None:
        """Delete a task's head and variant; the outputs of the others stay the same to the bit.

        Raises:
            ValueError: If there is no such task, or no other one.
        """
        check_tasks([task], set(self.heads))
        if len(self.heads) == 1:
            raise ValueError(f"task {task!r} is the only one; allowed: to drop one of several")
        del self.heads[task], self.variants[task]
        self.active = [t for t in self.active if t != task] or list(self.heads)

    def plain(self, task: str) -> MultiTaskNet:
        """One task's network without variants: its tensors have become the backbone's own.

        Raises:
            ValueError: If there is no such task.
        """
        check_tasks([task], set(self.heads))
        result = MultiTaskNet.__new__(MultiTaskNet)
        nn.Module.__init__(result)
        vars(result).update(vars(copy.deepcopy(self)))
        del result.variants
        for other in set(self.heads) - {task}:
            del result.heads[other]
        result.active = [task]
        with torch.no_grad():
            own = self._variant(task).folded(dict(self.backbone.named_parameters()))
            result.backbone.load_state_dict(own, strict=False)
        return result.requires_grad_(True)


@contextmanager
def _through(backbone: nn.Module, maps: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Send the outputs of some modules through maps for the block.

    The hooks live no longer than that: a copy of the network would go on using those of the original.
    """
    modules = dict(backbone.named_modules()) if maps else {}
    handles = [modules[n].register_forward_hook(_hook(m)) for n, m in maps.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(map_: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    return lambda module, inputs, output: map_(output)


def deployed(network: VariantNet, tasks: Sequence[str] | None = None) -> int:
    """All parameters on the device when these tasks are kept: backbone + each task's variant and head.

    The backbone is counted with its norms: it stays what further tasks start from.

    Args:
        network: The network.
        tasks: Default: all that it has.

    Raises:
        ValueError: If a task is unknown or named twice, or none is named.
    """
    tasks = check_tasks(list(network.heads) if tasks is None else tasks, set(network.heads))
    own = sum(network._variant(t).size() + sum(p.numel() for p in network.heads[t].parameters()) for t in tasks)
    return sum(p.numel() for p in network.backbone.parameters()) + own
