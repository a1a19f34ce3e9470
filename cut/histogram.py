"""Histogram: one task's scores counted by the upper bits of their floats, and the ranks that follow from the counts.

The bits of a float32, read as an integer, are ordered like the float. Their upper 17 bits bin the scores; the bins'
cumulative counts bound every score's percentile, and a sort of a few bins makes it exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from cut.scores import Scores

_SHIFT = 15
_HALF = 1 << (31 - _SHIFT)
_BINS = 2 * _HALF


def chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Aligned flat pieces that fit the processor's cache (or, on a GPU, few launches)."""
    size = 1 << (18 if tensors[0].device.type == "cpu" else 24)
    yield from zip(*(t.reshape(-1).split(size) for t in tensors), strict=True)


def bins_of(score: Tensor) -> Tensor:
    """The bin of every score, int64 in [0, 2^17), ordered like the scores."""
    bits = (score.float() + 0.0).view(torch.int32)  # + 0.0 turns -0 into 0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered >> _SHIFT).long() + _HALF


def _edge(index: int) -> float:
    """The smallest float32 of a bin."""
    ordered = np.int32((index - _HALF) << _SHIFT)
    bits = np.int32(ordered ^ ((ordered >> np.int32(31)) & np.int32(0x7FFFFFFF)))
    return float(bits.view(np.float32))


class Histogram:
    """Counts of one task's scores by bin, and the bounds on percentiles that follow."""

    def __init__(self, scores: Scores, private: Mapping[str, Tensor | None]) -> None:
        counts, alone = np.zeros(_BINS, np.int64), np.zeros(_BINS, np.int64)
        for name, score in scores.items():
            if score.numel() == 0:
                continue
            found = np.zeros(_BINS, np.int64)
            for (part,) in chunks(score):
                found += torch.bincount(bins_of(part), minlength=_BINS).cpu().numpy()
            counts += found
            if name in private:
                free = private[name]
                alone += found if free is None else torch.bincount(bins_of(score[free]), minlength=_BINS).cpu().numpy()
        self.total = int(counts.sum())
        at_least = counts[::-1].cumsum()[::-1]
        self.private_at_least = np.append(alone[::-1].cumsum()[::-1], 0)
        self.above = at_least - counts
        self.worst = np.append(at_least / self.total, 0.0)
        # An empty bin holds no unit, so its best percentile is that of the next bin that does.
        self.best = np.append((self.above + 1) / self.total, 0.0)
        populated = counts.nonzero()[0]
        self.first, self.last = int(populated[0]), int(populated[-1])

    def bound(self, cutoff: float, sure: bool) -> int:
        """The lowest bin all of whose units surely (or else possibly) have a percentile <= cutoff."""
        limits = self.worst if sure else self.best
        return int(np.searchsorted(-limits, -cutoff, side="left"))

    def edge(self, index: int) -> float:
        """The smallest score in bins >= index: -inf if all scores are, inf if none is."""
        if index <= self.first:
            return -np.inf
        return np.inf if index > self.last else _edge(index)


class Positions:
    """Exact percentiles of one task's scores, for scores inside given bins."""

    def __init__(self, scores: Scores, histogram: Histogram, ranges: list[tuple[int, int]]) -> None:
        self.histogram = histogram
        wanted = np.zeros(_BINS, bool)
        for low, high in ranges:
            wanted[low:high] = True
        gathered = []
        for score in scores.values():
            table = torch.from_numpy(wanted).to(score.device)
            for (part,) in chunks(score):
                part = part.float() + 0.0
                gathered.append(part[table[bins_of(part)]])
        self.sorted = torch.cat(gathered).sort().values
        # Gathered scores in a bin and all below it.
        self.upto = torch.bincount(bins_of(self.sorted), minlength=_BINS).cumsum(0)

    def percentile(self, values: Tensor) -> Tensor:
        """Q of the given scores, float64."""
        bins = bins_of(values)
        device = values.device
        at_least = len(self.sorted) - torch.searchsorted(self.sorted, values.float() + 0.0, side="left")
        higher_gathered = len(self.sorted) - self.upto[bins]
        above = torch.from_numpy(self.histogram.above).to(device)[bins]
        return (above + at_least - higher_gathered).double() / self.histogram.total
