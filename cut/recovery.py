"""Recovery: fine-tuning under a mask as a plain loop, for models that know nothing of Lightning."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cut.decomposition import Inputs, Loss, forward
from cut.masks import apply_mask
from cut.objectives import endless, moved
from cut.randomness import random_state, set_random_state
from cut.snapshot import Snapshot, digest, patient

WARMUP = 0.1  # share of the steps in which the learning rate rises
SECONDS = 25.0  # between two times that a training is kept
SECTION = "training"  # of a snapshot


def recover(
    model: nn.Module,
    batches: Iterable[Any],
    losses: Mapping[str, Loss],
    tasks: Sequence[str],
    *,
    steps: int,
    lr: float = 1e-3,
    mask: Mapping[str, Tensor] | None = None,
    weights: Mapping[str, float] | None = None,
    inputs: Inputs | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    resume: str | Path | Snapshot | None = None,
) -> list[float]:
    """Train a model on the weighted sum of its tasks' losses; what a mask cuts stays zero.

    AdamW; the learning rate rises linearly for a tenth of the steps and falls to zero along a cosine. The mask is
    applied again after every step, so neither momentum nor weight decay revives a weight.

    Args:
        model: Forward gives ``{task: Tensor}``; trained in place, only what requires a gradient, and left in eval mode.
        batches: A loader, gone through as often as the steps need.
        losses: Task to a function of (output, batch).
        tasks: The tasks to train.
        steps: Optimiser steps; 0 trains nothing.
        lr: The highest learning rate.
        mask: Parameter name to bool, True = kept.
        weights: Task to loss weight; 1 where there is none.
        inputs: How to get the network's input from a batch.
        progress: Wraps the range of steps, for a progress bar; after an interruption those that are left.
        resume: A file in which the training is kept every 25 seconds, at Ctrl-C and at its end. The same call, on the
            same model as it was at first, goes on from there and ends with the same weights, to the bit on the CPU,
            unless the loader draws random numbers in worker processes. Delete it when the result is safe.

    Returns:
        The loss of every step.

    Raises:
        ValueError: For bad numbers, a mask of another model, a file of another training, or a loss that is not finite
            (it names task and step).
        KeyboardInterrupt: At Ctrl-C; with ``resume`` after the step is done and kept.
    """
    if steps < 0 or lr <= 0:
        raise ValueError(f"steps {steps}, lr {lr}; allowed: steps of at least 0, lr above 0")
    mask = mask or {}
    apply_mask(model, mask)
    snapshot = resume if resume is None or isinstance(resume, Snapshot) else Snapshot(Path(resume))
    parameters = dict(model.named_parameters())
    device = next((p.device for p in parameters.values()), torch.device("cpu"))
    pairs = [(parameters[n], m.to(device, parameters[n].dtype)) for n, m in mask.items() if not m.all()]
    optimizer = torch.optim.AdamW([p for p in parameters.values() if p.requires_grad], lr=lr, weight_decay=1e-4)
    training = Training(model, optimizer, batches, device)
    if snapshot is not None and steps:
        factors = {t: float(w) for t, w in (weights or {}).items()}
        facts = {"steps": int(steps), "lr": float(lr), "tasks": list(tasks), "loss weights": factors}
        training.keep_in(snapshot, facts | {"mask": digest(mask), "weights": digest(model.state_dict())})
    model.train()
    with patient() if snapshot is not None else nullcontext(lambda: False) as stopped:
        for step in progress(range(len(training.history), steps)):
            for group in optimizer.param_groups:
                group["lr"] = lr * _factor(step, steps)
            batch = moved(next(training.source), device)
            outputs = forward(model, batch, inputs)
            total = _total(outputs, batch, losses, tasks, weights or {}, step)
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            optimizer.step()
            if pairs:
                with torch.no_grad():
                    torch._foreach_mul_([p for p, _ in pairs], [m for _, m in pairs])
            training.done(float(total.detach()), now=stopped() or step == steps - 1)
            if stopped():
                break
    model.eval()
    return training.history


class Training:
    """A training as it stands: model, optimiser, losses so far, and where it is in the data.

    Args:
        model: The model.
        optimizer: Its optimiser.
        batches: The loader.
        device: Where the model is.

    Attributes:
        history: The loss of every step so far.
        source: The batches that are still to come.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[Any], device: torch.device
    ) -> None:
        self.model, self.optimizer, self.device = model, optimizer, device
        self.loader = _Counted(batches, device)
        self.history: list[float] = []
        self.source = endless(self.loader)
        self.snapshot: Snapshot | None = None
        self.key: dict[str, Any] = {}
        self.began = self.saved = time.monotonic()

    def keep_in(self, snapshot: Snapshot, key: Mapping[str, Any]) -> None:
        """Keep it in a file from now on, and go on from what the file holds.

        Args:
            snapshot: The file; its section ``training`` is used.
            key: What the training depends on.

        Raises:
            ValueError: If the file is of another training.
        """
        self.snapshot, self.key = snapshot, dict(key)
        stored = snapshot.get(SECTION)
        if stored is None:
            return
        snapshot.check("its training's ", key, stored["key"])
        self.model.load_state_dict(stored["model"])
        self.optimizer.load_state_dict(stored["optimizer"])
        self.history = list(stored["history"])
        self.began -= stored["seconds"]
        set_random_state(stored["random"], self.device, self.loader.loader)
        self.source = self._rest(stored)

    def _rest(self, stored: Mapping[str, Any]) -> Iterator[Any]:
        """The batches after those that were trained on: an epoch is drawn again as it was, what is done left out."""
        set_random_state(stored["epoch start"], self.device, self.loader.loader)
        self.loader.epoch = stored["epoch"] - 1
        source = endless(self.loader, stored["epoch"])
        for _ in range(stored["batch"]):
            next(source)
        set_random_state(stored["random"], self.device, self.loader.loader)
        yield from source

    def done(self, loss: float, now: bool) -> None:
        """A step is done; keep it all if ``now``, or if it is time."""
        self.history.append(loss)
        if self.snapshot is None or not (now or time.monotonic() - self.saved >= SECONDS):
            return
        place = {"epoch": self.loader.epoch, "batch": self.loader.batch, "epoch start": self.loader.start}
        state = {
            "key": self.key,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
            "seconds": time.monotonic() - self.began,
            "random": random_state(self.device, self.loader.loader),
        }
        self.snapshot.keep(SECTION, state | place)
        self.saved = time.monotonic()


class _Counted:
    """A loader that knows its epoch, its batch, and the random state at the epoch's start."""

    def __init__(self, loader: Iterable[Any], device: torch.device) -> None:
        self.loader, self.device = loader, device
        self.epoch, self.batch = -1, 0
        self.start: dict[str, Any] = {}

    @property
    def sampler(self) -> Any:
        """The loader's, None if it has none."""
        return getattr(self.loader, "sampler", None)

    def __iter__(self) -> Iterator[Any]:
        """The batches of one epoch."""
        self.epoch, self.batch = self.epoch + 1, 0
        self.start = random_state(self.device, self.loader)
        for batch in self.loader:
            self.batch += 1
            yield batch


def _factor(step: int, steps: int) -> float:
    """The learning rate at a step as a factor of the highest."""
    progress = (step + 1) / (steps + 1)
    if progress < WARMUP:
        return progress / WARMUP
    return (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP))) / 2


def _total(
    outputs: Mapping[str, Tensor],
    batch: Any,
    losses: Mapping[str, Loss],
    tasks: Sequence[str],
    weights: Mapping[str, float],
    step: int,
) -> Tensor:
    """The weighted sum of the tasks' losses, each checked."""
    terms = []
    for task in tasks:
        if task not in outputs:
            raise ValueError(f"the model has no output {task!r}; its outputs are {sorted(outputs)}")
        loss = losses[task](outputs[task], batch)
        if not torch.isfinite(loss).all():
            raise ValueError(f"the loss of task {task!r} is {float(loss.detach())} at step {step}; try a lower lr")
        terms.append(weights.get(task, 1.0) * loss.float().reshape(()))
    return torch.stack(terms).sum()
