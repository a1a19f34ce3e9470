"""Sampling: an order that depends on seed and epoch only, so that stop and resume equals running through."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, DistributedSampler


def _place() -> tuple[int, int]:
    """Number of processes and this one's rank."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(), torch.distributed.get_rank()
    return 1, 0


class SeededSampler(DistributedSampler[Any]):
    """Pairs (epoch, index), shuffled anew in each epoch.

    Augmentation can so be a function of seed, epoch and index. Being a distributed sampler for any number of
    processes, one included, it is kept by Lightning, which calls ``set_epoch``. Processes get equal parts;
    the last ones repeat pictures where the number is not divisible.

    Args:
        dataset: The data set.
        seed: Seed of the order.
    """

    def __init__(self, dataset: Dataset[Any], seed: int = 0) -> None:
        super().__init__(dataset, *_place(), shuffle=True, seed=seed, drop_last=False)

    def __iter__(self) -> Iterator[Any]:
        """Pairs of epoch and index."""
        epoch = self.epoch
        return ((epoch, index) for index in super().__iter__())


class PartSampler(DistributedSampler[Any]):
    """Pairs (0, index): each process's own part of the data in order, without repeats, for exact evaluation.

    It is a distributed sampler only so that Lightning does not divide it among the processes once more.

    Args:
        dataset: The data set.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        super().__init__(dataset, *_place(), shuffle=False)
        self.indices = range(self.rank, len(dataset), self.num_replicas)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        """Pairs of epoch 0 and index."""
        return ((0, index) for index in self.indices)

    def __len__(self) -> int:
        """Pictures of this process."""
        return len(self.indices)
