"""Scoring batches: a fixed list, moved to the device one at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import move_data_to_device
from torch import Tensor

FEW = 2  # pictures


class ScoringBatches:
    """Scoring batches, moved to the device one at a time, with a progress bar on the terminal of rank 0."""

    def __init__(self, batches: Sequence[Mapping[str, Tensor]], device: torch.device, what: str) -> None:
        self.batches, self.device, self.what = batches, device, what

    def first(self) -> Mapping[str, Tensor]:
        """A few pictures of the first batch, on the device: enough to see what belongs to which task."""
        few = {k: v[:FEW] if isinstance(v, Tensor) and v.dim() else v for k, v in self.batches[0].items()}
        return move_data_to_device(few, self.device)

    def __iter__(self) -> Any:
        """All batches in order."""
        from rich.progress import track

        rank = (
            torch.distributed.get_rank()
            if torch.distributed.is_available() and torch.distributed.is_initialized()
            else 0
        )
        for batch in track(self.batches, f"scoring ({self.what})", disable=rank > 0, transient=True):
            yield move_data_to_device(batch, self.device)
