"""Masks: which weights stay, how they are applied, and what they say about a model.

A mask maps parameter names to bools of the parameter's shape, ``True`` = kept. It may also hold biases and norm
parameters of dead channels (:func:`silence`); these never count in a sparsity.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cut.budget import Budget, Size, Sparsity, floor
from cut.decomposition import Inputs, Loss, Owners, check_tasks, components, kept_parameters, owners, prunable
from cut.fusion import Fusion, Ranking, Vote
from cut.scores import Scorer, Scores, Sensitivity
from cut.selection import Mask, best
from cut.trace import LAYERS, NORMS, Trace, preserves_zero, trace

BACKBONE = "backbone"


def apply_mask(model: nn.Module, mask: Mapping[str, Tensor]) -> None:
    """Set every weight that the mask cuts to zero, in place.

    Raises:
        ValueError: If the mask names a parameter that the model lacks, or has another shape.
    """
    parameters = dict(model.named_parameters())
    for name, kept in mask.items():
        if name not in parameters:
            raise ValueError(f"the mask is of another model: it names {name!r}, which this model lacks")
        if parameters[name].shape != kept.shape:
            found, wanted = tuple(kept.shape), tuple(parameters[name].shape)
            raise ValueError(f"the mask is of another model: {name!r} has shape {found}, the model's has {wanted}")
    with torch.no_grad():
        for name, kept in mask.items():
            parameters[name].mul_(kept.to(parameters[name].device))


def sparsity(model: nn.Module, mask: Mapping[str, Tensor], names: Iterable[str] | None = None) -> float:
    """Zeros that the mask makes / Conv and Linear weights, over the given names (default: the whole model)."""
    weights = prunable(model)
    chosen = list(weights) if names is None else [n for n in names if n in weights]
    total = sum(weights[n].numel() for n in chosen)
    zeros = sum(int((~mask[n]).sum()) for n in chosen if n in mask)
    return zeros / total if total else 0.0


def component_sparsity(
    model: nn.Module, mask: Mapping[str, Tensor], used: Owners, tasks: Sequence[str]
) -> dict[str, float]:
    """Sparsity of the backbone (what more than one task of the model uses) and of each kept head.

    Args:
        model: The model with all its heads.
        mask: The mask.
        used: Decomposition over *all* tasks of the model, from :func:`cut.decomposition.owners`.
        tasks: The kept tasks.

    Returns:
        ``"backbone"`` and each kept task, plus ``"kept"`` (backbone + kept heads: *the* sparsity) and
        ``"whole_model_with_dropped_heads"``, which counts the dropped heads' weights as removed.
    """
    weights = prunable(model)
    part_of = components(used, tasks)
    parts = {p: [n for n in weights if part_of.get(n) == p] for p in [BACKBONE, *tasks]}
    result = {p: sparsity(model, mask, names) for p, names in parts.items()}
    kept = [n for n in weights if n in kept_parameters(model, used, tasks)]
    result["kept"] = sparsity(model, mask, kept)
    total, left = sum(w.numel() for w in weights.values()), sum(weights[n].numel() for n in kept)
    result["whole_model_with_dropped_heads"] = 1 - (1 - result["kept"]) * left / total if total else 0.0
    return result


def layer_sparsity(model: nn.Module, mask: Mapping[str, Tensor]) -> dict[str, float]:
    """Sparsity of every masked Conv and Linear weight."""
    return {n: float((~mask[n]).float().mean()) for n in prunable(model) if n in mask}


def task_masks(scores: Mapping[str, Scores], keep: float) -> dict[str, Mask]:
    """Each task's own mask: the best ``keep`` of the units that it uses, before any fusion."""
    result = {}
    for task, per in scores.items():
        count = round(keep * sum(s.numel() for s in per.values()))
        result[task] = best(Ranking({task: per}), count)
    return result


def overlap(masks: Mapping[str, Mask]) -> dict[str, dict[str, float]]:
    """How much the tasks' masks agree: intersection over union, by layer and pair of tasks.

    Returns:
        Parameter name (of those shared by at least two tasks) to ``"a & b"`` to IoU; of more than two tasks also
        ``"all"``.
    """
    result: dict[str, dict[str, float]] = {}
    tasks = list(masks)
    for name in [n for n in masks[tasks[0]] if n in {k for t in tasks[1:] for k in masks[t]}] if tasks else []:
        mine = [t for t in tasks if name in masks[t]]
        pairs = {f"{a} & {b}": [masks[a][name], masks[b][name]] for i, a in enumerate(mine) for b in mine[i + 1 :]}
        if len(mine) > 2:
            pairs["all"] = [masks[t][name] for t in mine]
        result[name] = {k: _iou(v) for k, v in pairs.items()}
    return result


def _iou(kept: list[Tensor]) -> float:
    """Intersection over union; two empty masks agree."""
    stacked = torch.stack(kept)
    union = int(stacked.any(0).sum())
    return int(stacked.all(0).sum()) / union if union else 1.0


def _dead_rows(weight: nn.Module, kept: Tensor, silent_in: Tensor | None) -> Tensor:
    """Outputs of a layer that no weight feeds: all incoming weights are cut or come from silent inputs."""
    flat = kept.reshape(len(kept), kept.shape[1], -1).any(-1)
    if silent_in is not None:
        groups = getattr(weight, "groups", 1)
        flat = flat & ~silent_in.view(groups, -1).repeat_interleave(len(kept) // groups, dim=0)
    return ~flat.any(1)


def silence(model: nn.Module, mask: Mapping[str, Tensor], seen: Trace) -> Mask:
    """The mask extended so that dead channels emit exactly zero.

    A channel is dead if all its incoming weights are cut (or come from channels that are silent themselves). Its bias,
    and the scale and shift of a batch norm right behind it, are cut too: batch norm alone would leave a constant, which
    zero padding makes uneven.

    Args:
        model: The model that the mask is for.
        mask: The mask over weights.
        seen: The model's :func:`cut.trace.trace`.

    Returns:
        A new mask: the given one plus bools for biases and norm parameters of layers with dead channels.
    """
    modules = dict(model.named_modules())
    names = {id(p): n for n, p in model.named_parameters()}
    result = dict(mask)
    silent: dict[str, Tensor] = {}

    def cut_parameter(parameter: Tensor | None, dead: Tensor) -> None:
        if parameter is not None and dead.any():
            name = names[id(parameter)]
            result[name] = result.get(name, torch.ones_like(dead)) & ~dead

    for name in dict.fromkeys(seen.calls):
        module, sources = modules[name], seen.feeds[name]
        inputs = [silent.get(s) if s is not None else None for s in sources]
        known = [s for s in inputs if s is not None]
        silent_in = torch.stack(known).all(0) if len(known) == len(inputs) else None
        if isinstance(module, nn.modules.conv._ConvTransposeNd):
            continue
        if isinstance(module, LAYERS):
            kept = mask.get(names[id(module.weight)], torch.ones_like(module.weight, dtype=torch.bool))
            dead = _dead_rows(module, kept, silent_in)
            cut_parameter(module.bias, dead)
            silent[name] = dead
        elif isinstance(module, NORMS):
            act = getattr(module, "act", None)
            if silent_in is not None and module.affine and (act is None or preserves_zero(act)):
                cut_parameter(module.weight, silent_in)
                cut_parameter(module.bias, silent_in)
                silent[name] = silent_in
        elif silent_in is not None:
            silent[name] = silent_in
    return result


def behind(scores: Mapping[str, Scores], cut: Mask) -> dict[str, Scores]:
    """Scores with what is cut already behind all else, so that a floor is made of weights that are still there."""
    return {t: {n: s.masked_fill(cut[n], -1.0) if n in cut else s for n, s in per.items()} for t, per in scores.items()}


def make_mask(
    model: nn.Module,
    scores: Mapping[str, Scores],
    batch: Any,
    losses: Mapping[str, Loss],
    tasks: Sequence[str],
    *,
    fusion: Fusion | None = None,
    budget: Budget | None = None,
    floor_share: float = 0.05,
    silent: bool = True,
    cut: Mask | None = None,
    fraction: float = 1.0,
    inputs: Inputs | None = None,
) -> Mask:
    """Scores to a mask: fuse, put the floor in front, meet the budget, silence dead channels.

    Args:
        model: The model with all its heads; it is not changed.
        scores: From a scorer.
        batch: One batch, to see which parameters belong to which task.
        losses: Losses of *all* tasks of the model, so that heads of tasks that are not selected are known as such.
        tasks: The selected tasks.
        fusion: Default: vote share 0.5.
        budget: Default: sparsity 0.9.
        floor_share: Share of every layer that is kept before any cut; 0 for none.
        silent: Whether dead channels are silenced.
        cut: An earlier mask; what it cuts stays cut.
        fraction: How far towards the budget (a schedule's step).
        inputs: How to get the network's input from a batch.

    Returns:
        The mask of the kept part; parameters of dropped heads are not in it.

    Raises:
        ValueError: For a bad selection, or a budget that the floor or the scored weights cannot meet.
    """
    tasks = check_tasks(tasks, losses)
    fusion, budget = fusion or Vote(0.5), budget or Sparsity(0.9)
    used = owners(model, batch, losses, list(losses), inputs)
    weights, kept = prunable(model), kept_parameters(model, used, tasks)
    parameters = dict(model.named_parameters())
    counts = {n: sum(n in u for u in used.values()) for n in weights}
    prunable_size = sum(w.numel() for n, w in weights.items() if n in kept)
    size = Size(
        prunable_size,
        sum(p.numel() for n, p in parameters.items() if n in kept) - prunable_size,
        frozenset(n for n, c in counts.items() if c > 1),
    )
    seen = trace(model, batch, inputs)
    rows = sorted({w for t, w in seen.last_layers(model, used).items() if t in tasks})
    before = {n: ~m for n, m in (cut or {}).items() if n in weights}
    ranking = fusion(behind(scores, before))
    front = floor(ranking, floor_share, rows)
    # Where nothing is cut yet the budget's ranking is the floor's, and a fusion can cost as much as all the rest.
    mask = budget.mask(scores, fusion if before else lambda _: ranking, size, front, before, fraction)
    empty = [n for n, m in mask.items() if not m.any()]
    if empty:
        warnings.warn(f"layers cut whole: {', '.join(empty)}; a floor prevents this", stacklevel=2)
    return silence(model, mask, seen) if silent else mask


def prune(
    model: nn.Module,
    batches: Iterable[Any],
    losses: Mapping[str, Loss],
    tasks: Sequence[str],
    *,
    sparsity: float = 0.9,
    share: float = 0.5,
    scorer: Scorer | None = None,
    floor_share: float = 0.05,
    inputs: Inputs | None = None,
) -> Mask:
    """CUT in one call: score each task, fuse by vote share, cut to an exact sparsity, set the cut weights to zero.

    Apply the mask again with :func:`apply_mask` after every optimiser step of the fine-tuning.

    Args:
        model: Any module whose forward returns ``{task: Tensor}``; changed in place.
        batches: Scoring batches (some tens are plenty).
        losses: Every task of the model to a function of (output, batch).
        tasks: The tasks to keep.
        sparsity: Fraction of the Conv and Linear weights of backbone and kept heads that goes.
        share: Vote share, see :mod:`cut.fusion`.
        scorer: Default: CUT's score, :class:`cut.scores.Sensitivity`.
        floor_share: Share of every layer that is kept before any cut.
        inputs: How to get the network's input from a batch.

    Returns:
        The mask.
    """
    tasks = check_tasks(tasks, losses)
    batches = list(batches)
    budget = Sparsity(sparsity)
    scores = (scorer or Sensitivity())(model, batches, losses, tasks, inputs)
    mask = make_mask(
        model,
        scores,
        batches[0],
        losses,
        tasks,
        fusion=Vote(share),
        budget=budget,
        floor_share=floor_share,
        inputs=inputs,
    )
    apply_mask(model, mask)
    return mask
