"""Randomness: the state of all random numbers, as plain values that can be stored and put back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def random_state(device: torch.device, loader: Any = None) -> dict[str, Any]:
    """The state of torch, NumPy and Python, and of the generators that a loader and its samplers have of their own.

    Args:
        device: Whose state is taken too, if it is a CUDA device.
        loader: Any loader; what it draws in worker processes of its own is not part of the state.

    Returns:
        Tensors, numbers and tuples only, so that it loads weights-only.
    """
    name, numbers, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [
            str(name),
            torch.from_numpy(np.asarray(numbers, np.int64)),
            int(rest[0]),
            int(rest[1]),
            float(rest[2]),
        ],
        "python": random.getstate(),
        "loader": [g.get_state() for g in _generators(loader)],
    }


def set_random_state(state: dict[str, Any], device: torch.device, loader: Any = None) -> None:
    """Put back what :func:`random_state` gave for the same kind of device and loader.

    Raises:
        ValueError: If the loader has other generators.
    """
    own = list(_generators(loader))
    if len(own) != len(state["loader"]):
        raise ValueError(f"the loader has {len(own)} random generators, not {len(state['loader'])}")
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    name, numbers, *rest = state["numpy"]
    np.random.set_state((name, numbers.numpy().astype(np.uint32), *rest))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    for generator, stored in zip(own, state["loader"], strict=True):
        generator.set_state(stored)


def _generators(loader: Any) -> Iterator[torch.Generator]:
    """A loader's own generators, each once, in a fixed order."""
    batches = getattr(loader, "batch_sampler", None)
    seen: set[int] = set()
    for holder in (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)):
        found = getattr(holder, "generator", None)
        if isinstance(found, torch.Generator) and id(found) not in seen:
            seen.add(id(found))
            yield found
