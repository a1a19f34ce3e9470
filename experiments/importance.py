"""Importance: Torch-Pruning's own values of coupled channels as scores, so that its methods meet our budgets.

Torch-Pruning (Fang et al., *DepGraph*, CVPR 2023) values all channels of a group of coupled layers at once. Its default
normaliser divides a group's values by their mean, which makes groups comparable (its ``global_pruning``). Here each
value is put on one entry that only its unit owns, so that the sum over a unit's weights is Torch-Pruning's value.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch_pruning.pruner.importance import (
    GroupHessianImportance,
    GroupTaylorImportance,
    Importance,
    OBDCImportance,
)

from cut.attention import is_plain
from cut.compact import keep_tasks
from cut.decomposition import (
    Inputs,
    Loss,
    check_tasks,
    forward,
    network_input,
    no_trace,
    owners,
    prunable,
    task_loss,
)
from cut.dependency import dependency_graph
from cut.scores import JOINT, Scores
from cut.slots import Group, Slot
from cut.structured import plan
from cut.stub import TaskSubset


class GroupImportance:
    """One of Torch-Pruning's importances as a scorer, for a cut by whole units with ``reduce: sum``.

    The scores mean nothing for single weights. Torch-Pruning removes channels between the steps of an iterative cut and
    takes means over those left; here cut ones count as zeros in the means, so that only a cut at once is exactly its.

    Args:
        importance: The class of any importance that needs weights, or weights and their gradients.
        joint: Loss weights by task, for the gradients of the weighted sum of the kept tasks' losses; a task without a
            weight counts with 1. None computes no gradients.
        options: Arguments of the importance; default its own. (Its defaults hold classes, which no YAML can.)

    Raises:
        ValueError: For an importance that needs more, gradients without ``joint``, or options that it does not have.
    """

    def __init__(
        self,
        importance: type[Importance],
        joint: dict[str, float] | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        kind = importance.__name__
        if issubclass(importance, (GroupHessianImportance, OBDCImportance)):
            raise ValueError(f"importance {kind} needs more than gradients; allowed: those of weights and gradients")
        if joint is None and issubclass(importance, GroupTaylorImportance):
            raise ValueError(f"importance {kind} needs gradients; allowed for joint: loss weights by task, not None")
        try:
            self.importance = importance(**(options or {}))
        except TypeError as error:
            known = ", ".join(inspect.signature(importance).parameters)
            raise ValueError(f"options {options} of importance {kind}; allowed: {known}") from error
        self.joint = joint

    def __call__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        losses: Mapping[str, Loss],
        tasks: Sequence[str],
        inputs: Inputs | None = None,
    ) -> dict[str, Scores]:
        """Scores under the key ``"all"``; the model is left as it is.

        Returns:
            Parameter name to float32 of its shape: each unit's value on one entry, zeros in all other prunable weights
            that the tasks use.

        Raises:
            ValueError: For a bad task selection, no batches, a loss or gradient that is not finite, a network without
                units, or a group that the importance does not value or that owns no entry alone.
        """
        tasks = check_tasks(tasks, losses)
        first = next(iter(batches), None)
        if first is None:
            raise ValueError("no scoring batches were given")
        chosen = {t: losses[t] for t in tasks}
        groups = plan(model, first, chosen, tasks, inputs).groups
        example = (inputs or network_input)(first)[:2].detach()
        kept = keep_tasks(model, tasks, example)
        if self.joint is not None:
            weights = {t: float(self.joint.get(t, 1.0)) for t in tasks}
            accumulate_gradients(kept, batches, chosen, weights, inputs)
        used = set().union(*owners(model, first, chosen, tasks, inputs).values())
        scores = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in prunable(model).items() if n in used}
        parameters = dict(model.named_parameters())
        places, found = own_entries(groups, parameters), self._values(kept, example, groups)
        for (slot, entries), values in zip(places, found, strict=True):
            like = parameters[slot.name]
            score = scores.setdefault(slot.name, torch.zeros_like(like, dtype=torch.float32))
            index: tuple[Any, ...] = (entries, *[0] * (like.ndim - 1))
            score.movedim(slot.dim, 0)[index] = values.to(score)
        return {JOINT: scores}

    def _values(self, kept: nn.Module, example: Tensor, groups: Sequence[Group]) -> list[Tensor]:
        """The importance of every group's units, larger = worth more."""
        network = kept.module if isinstance(kept, TaskSubset) else kept
        graph = dependency_graph(kept, example)
        return [unit_values(graph, network, group, self.importance) for group in groups]


def accumulate_gradients(
    network: nn.Module,
    batches: Iterable[Any],
    losses: Mapping[str, Loss],
    weights: Mapping[str, float],
    inputs: Inputs | None = None,
) -> None:
    """Sum the gradients of the weighted sum of losses over batches into ``.grad``, in eval mode.

    What no loss reaches gets zeros. In a process group all ranks end with the same gradients, those of all ranks added.

    Args:
        network: Its parameters' ``.grad`` is set; all else is left as it is.
        batches: On the network's device.
        losses: Task name to a function of (output, batch).
        weights: Task name to its loss weight.
        inputs: How to get the network's input from a batch.

    Raises:
        ValueError: For a loss or gradient that is not finite; the message names it.
    """
    network.zero_grad(set_to_none=True)
    with no_trace(network):
        for index, batch in enumerate(batches):
            outputs = forward(network, batch, inputs)
            torch.stack([w * task_loss(losses, t, outputs, batch, index) for t, w in weights.items()]).sum().backward()
    for name, parameter in network.named_parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(parameter.grad)
        if not torch.isfinite(parameter.grad).all():
            raise ValueError(f"the gradient of parameter {name!r} holds a number that is not finite")


def unit_values(graph: Any, network: nn.Module, group: Group, importance: Importance) -> Tensor:
    """Torch-Pruning's importance of a group's units: of the group of the layer that makes them.

    A unit of several channels has their mean. The heads of an attention module have that of the columns of ``proj``
    that read them: the graph does not map the rows of ``qkv`` to the layers behind, and Torch-Pruning's own pruner
    starts there too.

    Args:
        graph: The network's :func:`dependency_graph`.
        network: The network.
        group: One of its groups.
        importance: The importance.

    Returns:
        [units]; 0 where the group's mean is 0, which the normaliser divides by.

    Raises:
        ValueError: If the importance gives no value for this group.
    """
    name = group.name.split("/")[0]
    layer: Any = network.get_submodule(name)
    heads = is_plain(layer)
    if heads:
        name, layer = f"{name}.proj", layer.proj
    dim = int(heads or getattr(layer, "transposed", False))
    unit = next(s.unit for s in group.slots if s.name == f"{name}.weight" and s.dim == dim)
    pruner = graph.get_pruner_of_module(layer)
    prune = pruner.prune_in_channels if heads else pruner.prune_out_channels
    values = importance(graph.get_pruning_group(layer, prune, list(range(len(unit)))))
    if values is None:
        raise ValueError(f"importance {type(importance).__name__} gives no value for the units of {group.name}")
    values, owned = values.detach().float().cpu().nan_to_num(nan=0.0), unit >= 0
    total = torch.zeros(group.units).index_add_(0, unit[owned], values[owned])
    return total / torch.bincount(unit[owned], minlength=group.units)


def own_entries(groups: Sequence[Group], parameters: Mapping[str, Tensor]) -> list[tuple[Slot, Tensor]]:
    """For every group a slot in whose tensor no other dimension holds units, and each unit's first entry there.

    Such are biases, norms' scales, depthwise weights: a number on such an entry counts for one unit only.

    Raises:
        ValueError: If a group has none.
    """
    dims: dict[str, set[int]] = {}
    for slot in (s for g in groups for s in g.slots):
        dims.setdefault(slot.name, set()).add(slot.dim)
    found = []
    for group in groups:
        alone = [(s, _first(s, group.units)) for s in group.slots if s.name in parameters and len(dims[s.name]) == 1]
        whole = [(s, entries) for s, entries in alone if bool((entries < len(s.unit)).all())]
        if not whole:
            raise ValueError(f"the units of {group.name} own no entry alone (a bias, a norm's scale) to hold a value")
        found.append(whole[0])
    return found


def _first(slot: Slot, units: int) -> Tensor:
    """The first entry of each unit; the number of entries where it has none."""
    owned = slot.unit >= 0
    missing = torch.full((units,), len(slot.unit))
    return missing.scatter_reduce(0, slot.unit[owned], torch.arange(len(slot.unit))[owned], "amin")
