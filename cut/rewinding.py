"""Rewinding: after a cut, what stays goes back to weights of before (arXiv 1803.03635, 1912.05671)."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from cut.initialisation import Draw, reinitialise


class Rewind(Protocol):
    """A callable that sets a network's weights, in place."""

    def __call__(self, network: nn.Module) -> None:
        """Set the weights; the mask is applied afterwards."""
        ...


class Checkpoint:
    """Back to a snapshot of the dense training.

    Args:
        path: A checkpoint with a ``state_dict``, as ``python -m experiments.run --snapshots=[0]`` writes;
            ``epoch-0.ckpt`` is the initialisation.
        folder: Where a relative path starts; None = the working directory.
    """

    def __init__(self, path: str, folder: str | None = None) -> None:
        self.path, self.folder = path, folder

    def __call__(self, network: nn.Module) -> None:
        """Load the snapshot's weights and running statistics.

        Raises:
            ValueError: If there is no such file, it is no checkpoint, or it is of another network.
        """
        path = Path(self.folder or ".") / self.path
        if not path.is_file():
            raise ValueError(f"no snapshot {path} to rewind to: the dense run keeps it with --snapshots")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{path} is no checkpoint with a state_dict: {error}") from error
        mine = {k.removeprefix("network."): v for k, v in state.items() if k.startswith("network.")}
        try:
            network.load_state_dict(mine)
        except RuntimeError as error:
            raise ValueError(f"{path} is of another network: {error}") from error


class Fresh:
    """To new random weights: the pruned shape trained from scratch.

    Args:
        seed: Of the draw.
        draw: See :func:`cut.initialisation.reinitialise`.
    """

    def __init__(self, seed: int = 0, draw: Draw = "default") -> None:
        self.seed = seed
        self.draw: Draw = draw

    def __call__(self, network: nn.Module) -> None:
        """Draw all weights anew."""
        reinitialise(network, self.seed, self.draw)
