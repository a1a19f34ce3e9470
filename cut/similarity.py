"""Similarity: how near are a library's tasks to a new one, from a few labelled pictures of the new one?

Every class here maps a :class:`cut.newcomer.Newcomer` to ``{entry name: number}``, larger = nearer. Which measure the
authors of arXiv 2307.04365 use is not public; these are ours to choose from. ``RandomSimilarity`` and ``Everyone`` are
the controls without which nobody can tell whether similarity matters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from cut.decomposition import forward, network_input, no_trace, task_loss
from cut.library import Entry
from cut.newcomer import IGNORE, Newcomer, aligned, class_labels, label_matrix, label_of, running
from cut.scores import Scores, sensitivity
from cut.selection import Mask

_TINY = 1e-300


class Similarity(Protocol):
    """A callable that tells how near each library entry is to a new task."""

    def __call__(self, newcomer: Newcomer) -> dict[str, float]:
        """Entry name to a number, larger = nearer; one that is not finite says that it could not be told."""
        ...


class LEEP:
    r"""Log expected empirical prediction (arXiv 2002.12462), for classification.

    The library task's own classifier gives theta(x)_z over its classes z. With
    P(y,z) = mean over pictures of [y_i = y] theta(x_i)_z and P(y|z) = P(y,z) / sum_y P(y,z), it is
    mean_i log sum_z P(y_i|z) theta(x_i)_z: how well the new labels are guessed from the old classes alone. Range
    (-inf, 0]. A class z without any mass takes no part. Dense labels count by pixel.

    Args:
        sources: A model whose outputs are those of the library's tasks; None = the newcomer's model, which then needs
            their heads.
    """

    def __init__(self, sources: nn.Module | None = None) -> None:
        self.sources = sources

    def __call__(self, newcomer: Newcomer) -> dict[str, float]:
        """LEEP of every entry's task.

        Raises:
            ValueError: If the labels are not classes, a library task has no output, or it is not one of classes.
        """
        model = self.sources if self.sources is not None else newcomer.model
        needed = sorted({e.task for e in newcomer.entries})
        found: dict[str, list[Tensor]] = {task: [] for task in needed}
        labels: list[Tensor] = []
        classes = [class_labels(batch, newcomer.task) for batch in newcomer.batches]
        with running(model), no_trace(model), torch.no_grad():
            for batch, target in zip(newcomer.batches, classes, strict=True):
                outputs = forward(model, batch, newcomer.inputs)
                valid = (target >= 0) & (target != IGNORE)
                labels.append(target[valid])
                for task in needed:
                    found[task].append(_probabilities(outputs, task, target)[valid])
        known = torch.cat(labels)
        per_task = {task: leep(torch.cat(parts), known) for task, parts in found.items()}
        return {e.name: per_task[e.task] for e in newcomer.entries}


def leep(probabilities: Tensor, labels: Tensor) -> float:
    """LEEP of a source's class probabilities [n, Z] for the new labels, whole numbers [n]; see :class:`LEEP`.

    Raises:
        ValueError: Without any label.

    Example:
        >>> leep(torch.eye(2), torch.tensor([1, 0])), round(leep(torch.full((2, 1), 1.0), torch.tensor([1, 0])), 4)
        (0.0, -0.6931)
    """
    if not len(labels):
        raise ValueError("no labels of the new task are known in these batches")
    theta = probabilities.double()
    classes, index = labels.unique(return_inverse=True)
    joint = torch.zeros(len(classes), theta.shape[1], dtype=theta.dtype, device=theta.device)
    joint.index_add_(0, index, theta)
    given = joint / joint.sum(0).clamp_min(_TINY)
    return float((given[index] * theta).sum(1).clamp_min(_TINY).log().mean())


def _probabilities(outputs: Mapping[str, Tensor], task: str, target: Tensor) -> Tensor:
    """A library task's class probabilities, [..., Z], at the places of the new labels."""
    if task not in outputs:
        raise ValueError(f"no output of library task {task!r}; there are {sorted(outputs)}: LEEP needs its classifier")
    output = outputs[task].double()
    if output.dim() == 4 and target.dim() == 3 and output.shape[-2:] != target.shape[-2:]:
        output = F.interpolate(output, target.shape[-2:], mode="bilinear", align_corners=False)
    if output.dim() != target.dim() + 1 or output.shape[1] < 2 or output.shape[2:] != target.shape[1:]:
        raise ValueError(
            f"library task {task!r} has outputs {tuple(output.shape)} and the new labels are {tuple(target.shape)}; "
            "LEEP needs class scores at the places of the labels"
        )
    return output.softmax(1).movedim(1, -1)


class GradientCosine:
    """The cosine between the new task's and the library task's loss gradient on the shared weights. Range [-1, 1].

    Two tasks that pull the shared weights the same way are near (the measure of gradient surgery, arXiv 2001.06782).
    It needs losses, heads and labels of the library's tasks on the newcomer's pictures, as data with several labels a
    picture have them. The gradients are summed over the batches; a task without any has no cosine.
    """

    def __call__(self, newcomer: Newcomer) -> dict[str, float]:
        """The cosine for every entry's task.

        Raises:
            ValueError: If a library task has no loss, no output or no label.
        """
        missing = sorted({e.task for e in newcomer.entries} - set(newcomer.losses))
        if missing:
            raise ValueError(
                f"no loss for library task {missing[0]!r}; there are losses for {sorted(newcomer.losses)}: "
                "a gradient cosine needs labels and heads of the library's tasks"
            )
        names = sorted({n for e in newcomer.entries for n in e.mask})
        tasks = sorted({newcomer.task, *(e.task for e in newcomer.entries)})
        found = _gradients(newcomer, names, tasks)
        mine = found[newcomer.task]
        return {
            e.name: cosine({n: mine[n] for n in e.mask}, {n: found[e.task][n] for n in e.mask})
            for e in newcomer.entries
        }


def cosine(first: Scores, second: Scores) -> float:
    """The cosine between two sets of tensors of the same names, each taken as one vector; NaN if one is zero.

    Example:
        >>> cosine({"w": torch.tensor([3.0, 4.0])}, {"w": torch.tensor([-3.0, -4.0])})
        -1.0
    """
    product = sum(float((first[n].double() * second[n].double()).sum()) for n in first)
    norms = [sum(float(v.double().square().sum()) for v in per.values()) ** 0.5 for per in (first, second)]
    length = norms[0] * norms[1]
    return max(-1.0, min(1.0, product / length)) if length > 0 else float("nan")


def _gradients(newcomer: Newcomer, names: Sequence[str], tasks: Sequence[str]) -> dict[str, Scores]:
    """Task to the sum over batches of its loss's gradient by weight; zero where it does not reach."""
    model = newcomer.model
    parameters = dict(model.named_parameters())
    weights = [parameters[n] for n in names]
    found: dict[str, Scores] = {t: {} for t in tasks}
    with running(model), no_trace(model):
        for index, batch in enumerate(newcomer.batches):
            outputs = forward(model, batch, newcomer.inputs)
            for task in tasks:
                loss = task_loss(newcomer.losses, task, outputs, batch, index)
                grads = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
                for name, weight, grad in zip(names, weights, grads, strict=True):
                    grad = torch.zeros_like(weight) if grad is None else grad
                    found[task][name] = found[task][name] + grad if name in found[task] else grad
    return found


class MaskOverlap:
    """Intersection over union of an entry's mask and a cheap first mask of the new task. Range [0, 1].

    The first mask keeps the weights that the new task's scores put first, as many as the entry keeps. Entries that cut
    channels are compared by rows (a layer's output channels): a row scores the sum of its weights, and is kept if any
    weight of it is. Scores that the newcomer does not bring are CUT's, from the first batch alone.
    """

    def __call__(self, newcomer: Newcomer) -> dict[str, float]:
        """The overlap with every entry.

        Raises:
            ValueError: If the new task uses none of an entry's weights.
        """
        scores = newcomer.scores
        if scores is None:
            task, first = newcomer.task, newcomer.batches[:1]
            scores = sensitivity(newcomer.model, first, newcomer.losses, [task], newcomer.inputs)[task]
        places: dict[tuple[str, tuple[str, ...]], dict[str, Tensor]] = {}
        found: dict[str, float] = {}
        for entry in newcomer.entries:
            names = tuple(sorted(n for n in entry.mask if n in scores))
            if not names:
                raise ValueError(f"the new task uses none of the weights of entry {entry.name}")
            mask = {n: entry.mask[n] for n in names}
            if entry.units == "channels":
                mask = {n: m.flatten(1).any(1) for n, m in mask.items()}
            key = entry.units, names
            if key not in places:  # one sort serves all entries over the same weights
                places[key] = _places({n: scores[n] for n in names}, entry.units)
            kept = sum(int(m.sum()) for m in mask.values())
            found[entry.name] = iou(mask, {n: place < kept for n, place in places[key].items()})
        return found


def _places(scores: Scores, units: str) -> dict[str, Tensor]:
    """The place of every weight (or row) by its score, 0 = best, of equal ones the first before the next."""
    values = {n: s.detach().cpu().float() for n, s in scores.items()}
    if units == "channels":
        values = {n: s.flatten(1).double().sum(1).float() for n, s in values.items()}
    flat = torch.cat([v.flatten() for v in values.values()])
    place = torch.empty(len(flat), dtype=torch.int64)
    place[flat.sort(descending=True, stable=True).indices] = torch.arange(len(flat))
    parts = place.split([v.numel() for v in values.values()])
    return {n: part.view(v.shape) for (n, v), part in zip(values.items(), parts, strict=True)}


def iou(first: Mask, second: Mask) -> float:
    """Intersection over union of two masks of the same names; two empty masks agree.

    Example:
        >>> iou({"w": torch.tensor([True, True, False])}, {"w": torch.tensor([False, True, False])})
        0.5
    """
    union = sum(int((first[n] | second[n]).sum()) for n in first)
    return sum(int((first[n] & second[n]).sum()) for n in first) / union if union else 1.0


class CKA:
    """Linear centred kernel alignment (arXiv 1905.00414) of an entry's pruned features and the new labels. [0, 1].

    X are the features that the shared part gives on the newcomer's pictures with the entry's mask applied, averaged
    over the picture; Y the labels as numbers: classes one-hot, dense ones averaged over 4 x 4 cells. It is
    |Y'X|^2 / (|X'X| |Y'Y|), columns centred: 1 if the features hold the labels' geometry, whatever their rotation and
    scale. So it asks whether what the entry *keeps* tells the new labels apart, and takes any kind of label.
    """

    def __call__(self, newcomer: Newcomer) -> dict[str, float]:
        """CKA of every entry.

        Raises:
            ValueError: For fewer than two pictures, or labels of a kind that is not known.
        """
        targets = torch.cat(
            aligned([label_matrix(label_of(b, newcomer.task), newcomer.task) for b in newcomer.batches])
        )
        if len(targets) < 2:
            raise ValueError(f"CKA needs at least two labelled pictures; got {len(targets)}")
        return {e.name: linear_cka(_features(newcomer, e), targets) for e in newcomer.entries}


def linear_cka(first: Tensor, second: Tensor) -> float:
    """Linear CKA of two sets of features [n, p] and [n, q] of the same pictures; NaN if one does not vary."""
    grams = []
    for features in (first, second):
        centred = features.double() - features.double().mean(0)
        grams.append(centred @ centred.T)
    length = float(grams[0].norm() * grams[1].norm())
    return float((grams[0] * grams[1]).sum()) / length if length > 0 else float("nan")


def _features(newcomer: Newcomer, entry: Entry) -> Tensor:
    """Features [n, p] of the shared part with an entry's mask, at the new task's head or behind the last layer."""
    model = newcomer.model
    parameters = dict(model.named_parameters())
    masked = {n: parameters[n].detach() * m.to(parameters[n].device) for n, m in entry.mask.items()}
    heads = getattr(model, "heads", None)
    caught: list[Tensor] = []

    def catch(value: Any) -> None:
        value = value[-1] if isinstance(value, (list, tuple)) else value  # the deepest map
        caught[:] = [value]

    if isinstance(heads, nn.ModuleDict) and newcomer.task in heads:
        handles = [heads[newcomer.task].register_forward_pre_hook(lambda _, args: catch(args[0]))]
    else:
        layers = [m for n, m in model.named_modules() if f"{n}.weight" in entry.mask]
        handles = [m.register_forward_hook(lambda _, args, out: catch(out)) for m in layers]
    found = []
    try:
        with running(model), no_trace(model), torch.no_grad():
            for batch in newcomer.batches:
                functional_call(model, masked, ((newcomer.inputs or network_input)(batch),))
                found.append(_pooled(caught[0]))
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(found)


def _pooled(features: Tensor) -> Tensor:
    """Features averaged over the picture: [B, C, H, W], [B, N, C] or [B, C] to [B, C]."""
    if features.dim() == 4:
        return features.mean((2, 3))
    return features.mean(1) if features.dim() == 3 else features.flatten(1)


class RandomSimilarity:
    """A random number in [0, 1) for every entry: the control. It depends on seed and content, not on names or order.

    Args:
        seed: Of the draw.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def __call__(self, newcomer: Newcomer) -> dict[str, float]:
        """The numbers."""
        return {e.name: self._draw(e.digest) for e in newcomer.entries}

    def _draw(self, digest: str) -> float:
        return int(hashlib.sha256(f"{self.seed} {digest}".encode()).hexdigest()[:13], 16) / 16**13


class Everyone:
    """1 for every entry: all are as near as any. With ``k=None`` all vote: the control without a choice."""

    def __call__(self, newcomer: Newcomer) -> dict[str, float]:
        """1 for every entry."""
        return {e.name: 1.0 for e in newcomer.entries}
