"""Scores: how much is each parameter worth to each task?

A scorer maps (model, batches, losses, tasks) to ``{task: {parameter name: tensor}}``, larger = worth more. Scorers that
know only one joint answer (magnitude, random) return the single key ``"all"``; fusing one entry changes nothing, so
they need no special case further on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from cut.decomposition import Inputs, Loss, check_tasks, forward, no_trace, owners, prunable, task_loss

Scores = dict[str, Tensor]
JOINT = "all"
Accumulate = Literal["absolute", "squared", "signed"]


class Scorer(Protocol):
    """A callable that scores every prunable weight for each task."""

    def __call__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        losses: Mapping[str, Loss],
        tasks: Sequence[str],
        inputs: Inputs | None = None,
    ) -> dict[str, Scores]:
        """Task name (or ``"all"``) to scores of the prunable weights that the task uses."""
        ...


def _accumulate(
    total: Scores, grads: Mapping[str, Tensor], weights: Mapping[str, Tensor], how: Accumulate, power: int
) -> None:
    """Add ``|gradient x weight^power|``, its square or the signed product in float32, in the gradients' memory."""
    with torch.no_grad():
        for name, grad in grads.items():
            for _ in range(power):
                grad.mul_(weights[name])
            worth = grad.float()
            worth = worth.abs_() if how == "absolute" else worth.square_() if how == "squared" else worth
            if name in total:
                total[name].add_(worth)
            else:
                total[name] = worth


def _check(mode: str, accumulate: str, power: int) -> None:
    """Refuse choices that :func:`sensitivity` does not have."""
    if mode not in ("eval", "train"):
        raise ValueError(f"mode {mode!r}; allowed: 'eval', 'train'")
    if accumulate not in get_args(Accumulate):
        raise ValueError(f"accumulate {accumulate!r}; allowed: {', '.join(map(repr, get_args(Accumulate)))}")
    if power not in (0, 1, 2):
        raise ValueError(f"power {power} of the weight; allowed: 0, 1, 2")


def _sum_over_ranks(scores: dict[str, Scores]) -> dict[str, Scores]:
    """The sums of all processes, in float32, the same on every rank."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for per_parameter in scores.values():
            for value in per_parameter.values():
                torch.distributed.all_reduce(value)
    return scores


def _dealt() -> tuple[int, int]:
    """This process's rank and the number of processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    losses: Mapping[str, Loss],
    tasks: Sequence[str],
    inputs: Inputs | None = None,
    mode: Literal["eval", "train"] = "eval",
    accumulate: Accumulate = "absolute",
    power: int = 1,
    joint: Mapping[str, float] | None = None,
) -> dict[str, Scores]:
    r"""CUT's score: the sum over batches of ``|weight x gradient of that task's loss|``, on the weights as they are.

    It equals the gradient of a mask of ones (SNIP's connection sensitivity, arXiv 1810.02340), taken per task and on
    the pre-trained weights (arXiv 2504.09803). One forward serves all tasks; each task then costs one backward through
    its own head and what it shares. The model is left as it was found.

    Other scores are variants of it: ``accumulate="signed"`` is the first-order Taylor estimate of the change of the
    loss over all batches (arXiv 1906.10771), ``"squared"`` the empirical Fisher's estimate (arXiv 1801.05787, up to a
    factor), ``power=0`` the gradient alone (what RigL grows by), ``joint`` SNIP's on the training loss.

    In a process group every rank gets the same list of batches, scores those dealt to it, and all end with the sum.

    Args:
        model: Any module whose forward returns ``{task: Tensor}``; unwrapped, not inside DDP.
        batches: The scoring batches, on the model's device.
        losses: Task name to a function of (output, batch), without loss weights.
        tasks: The tasks to score for.
        inputs: How to get the network's input from a batch.
        mode: ``"eval"``, or ``"train"`` as in the reference code: dropout on and batch statistics, both put back.
        accumulate: What is summed over batches: absolute values, squares, or the values themselves (of whose sum the
            absolute value is taken).
        power: Of the weight that the gradient is multiplied with: 0, 1 or 2.
        joint: Loss weights: one score of the weighted sum of the tasks' losses, under the key ``"all"``, instead of
            one per task; a task without a weight counts with 1.

    Returns:
        Task to parameter name to float32 scores of the parameter's shape.

    Raises:
        ValueError: For a bad choice or task selection, no batches, or a loss that is not finite (names task and batch).
    """
    _check(mode, accumulate, power)
    tasks = check_tasks(tasks, losses)
    weights = prunable(model)
    # What is differentiated: each task's loss, or one weighted sum of them.
    goals = {t: {t: 1.0} for t in tasks} if joint is None else {JOINT: {t: float(joint.get(t, 1.0)) for t in tasks}}
    last = list(goals)[-1]
    scores: dict[str, Scores] = {goal: {} for goal in goals}
    rank, world = _dealt()
    used: dict[str, list[str]] = {}
    count = 0
    with no_trace(model, mode):
        for index, batch in enumerate(batches):
            count += 1
            mine = index % world == rank
            if not mine and used:
                continue
            outputs = forward(model, batch, inputs)
            for goal, members in goals.items():
                loss = sum(
                    (w * task_loss(losses, t, outputs, batch, index) for t, w in members.items()), torch.tensor(0.0)
                )
                names = used.get(goal, list(weights))
                if not loss.requires_grad:
                    raise ValueError(f"the loss of task {goal!r} depends on no parameter of the model")
                grads = torch.autograd.grad(
                    loss, [weights[n] for n in names], retain_graph=goal != last, allow_unused=True
                )
                found = {n: g for n, g in zip(names, grads, strict=True) if g is not None}
                used.setdefault(goal, list(found))
                if mine:
                    _accumulate(scores[goal], found, weights, accumulate, power)
                else:
                    scores[goal] = {n: torch.zeros_like(weights[n], dtype=torch.float32) for n in used[goal]}
                del loss, grads
    if not count:
        raise ValueError("no scoring batches were given")
    scores = _sum_over_ranks(scores)
    if accumulate == "signed":
        scores = {goal: {n: s.abs() for n, s in per.items()} for goal, per in scores.items()}
    return scores


class Sensitivity:
    """CUT's score per task and its variants, see :func:`sensitivity`.

    Args:
        mode: ``"eval"``, or ``"train"`` as in the reference code.
        accumulate: ``"absolute"``, ``"squared"`` or ``"signed"``.
        power: Of the weight: 0, 1 or 2.
        joint: Loss weights, for one score of the joint loss; None scores each task.
    """

    def __init__(
        self,
        mode: Literal["eval", "train"] = "eval",
        accumulate: Accumulate = "absolute",
        power: int = 1,
        joint: dict[str, float] | None = None,
    ) -> None:
        _check(mode, accumulate, power)
        self.mode: Literal["eval", "train"] = mode
        self.accumulate, self.power, self.joint = accumulate, power, joint

    def __call__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        losses: Mapping[str, Loss],
        tasks: Sequence[str],
        inputs: Inputs | None = None,
    ) -> dict[str, Scores]:
        """See :func:`sensitivity`."""
        return sensitivity(model, batches, losses, tasks, inputs, self.mode, self.accumulate, self.power, self.joint)


class PerLayer:
    """Another scorer's scores, divided by their mean within each layer, so that layers compete as equals.

    Args:
        scorer: The scorer.
    """

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    def __call__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        losses: Mapping[str, Loss],
        tasks: Sequence[str],
        inputs: Inputs | None = None,
    ) -> dict[str, Scores]:
        """The scores with mean 1 in every layer that has any score above 0."""
        scores = self.scorer(model, batches, losses, tasks, inputs)
        return {t: {n: s / s.mean().clamp_min(1e-30) for n, s in per.items()} for t, per in scores.items()}


def _used_weights(
    model: nn.Module,
    batches: Iterable[Any],
    losses: Mapping[str, Loss],
    tasks: Sequence[str],
    inputs: Inputs | None,
) -> dict[str, dict[str, nn.Parameter]]:
    """Task to the prunable weights that it uses, found on the first batch."""
    tasks = check_tasks(tasks, losses)
    first = next(iter(batches), None)
    if first is None:
        raise ValueError("no scoring batches were given; one is needed to find out which weights the tasks use")
    used = owners(model, first, losses, tasks, inputs)
    weights = prunable(model)
    return {t: {n: p for n, p in weights.items() if n in used[t]} for t in tasks}


class Magnitude:
    """The weights' absolute values: the strong baseline (global magnitude), also of lottery tickets.

    Args:
        per_task: Give every task its own copy, so that tasks rank within their own sub-model (DiSparse's variant for
            trained models); otherwise one joint ranking over all that the kept tasks use.
    """

    def __init__(self, per_task: bool = False) -> None:
        self.per_task = per_task

    def __call__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        losses: Mapping[str, Loss],
        tasks: Sequence[str],
        inputs: Inputs | None = None,
    ) -> dict[str, Scores]:
        """Absolute values in float32, by task or under the key ``"all"``."""
        used = _used_weights(model, batches, losses, tasks, inputs)
        if not self.per_task:
            used = {JOINT: {n: p for n, p in prunable(model).items() if any(n in u for u in used.values())}}
        return {t: {n: p.detach().float().abs() for n, p in u.items()} for t, u in used.items()}


class Random:
    """Uniform random scores: the control that every method must beat.

    Args:
        seed: Seed of the draw; the global random state is not touched.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def __call__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        losses: Mapping[str, Loss],
        tasks: Sequence[str],
        inputs: Inputs | None = None,
    ) -> dict[str, Scores]:
        """Uniform float32 numbers in (0, 1) under the key ``"all"``, drawn on the CPU so that devices agree."""
        used = _used_weights(model, batches, losses, tasks, inputs)
        generator = torch.Generator().manual_seed(self.seed)
        scores = {}
        for name, p in prunable(model).items():
            if any(name in u for u in used.values()):
                scores[name] = torch.rand(p.shape, generator=generator).clamp_min(2.0**-24).to(p.device)
        return {JOINT: scores}
