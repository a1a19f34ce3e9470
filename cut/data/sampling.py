"""Sampling: an order of the data that depends on seed and epoch only, so that stop and resume equals running through."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch.utils.data import Dataset, DistributedSampler


class SeededSampler(DistributedSampler):
    """Yields (epoch, index): a data set can make its augmentation a pure function of (seed, epoch, index).

    It is a distributed sampler for any number of processes, one included, so Lightning keeps it and calls ``set_epoch``.

    Args:
        dataset: The data set.
        seed: Seed of the order.
        shuffle: Whether the order changes from epoch to epoch.
    """

    def __init__(self, dataset: Dataset[Any], seed: int = 0, shuffle: bool = True) -> None:
        ready = torch.distributed.is_available() and torch.distributed.is_initialized()
        world = torch.distributed.get_world_size() if ready else 1
        rank = torch.distributed.get_rank() if ready else 0
        super().__init__(dataset, world, rank, shuffle=shuffle, seed=seed, drop_last=False)

    def __iter__(self) -> Iterator[Any]:
        """Pairs of epoch and index."""
        for index in super().__iter__():
            yield self.epoch, index


class PartSampler(torch.utils.data.Sampler[Any]):
    """Every process's own part of the data in order, without the repeats that make parts equal: for exact evaluation.

    Args:
        dataset: The data set.
    """

    def __init__(self, dataset: Sized) -> None:
        ready = torch.distributed.is_available() and torch.distributed.is_initialized()
        world = torch.distributed.get_world_size() if ready else 1
        rank = torch.distributed.get_rank() if ready else 0
        self.indices = range(rank, len(dataset), world)

    def __iter__(self) -> Iterator[Any]:
        """Pairs of epoch 0 and index."""
        return ((0, index) for index in self.indices)

    def __len__(self) -> int:
        """Pictures of this process."""
        return len(self.indices)
