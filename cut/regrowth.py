"""Regrowth: a mask that moves during training at the same sparsity, as in RigL and DiSparse's dynamic variant."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from cut.decomposition import Inputs, Loss, prunable
from cut.fusion import Fusion, Vote
from cut.scores import Scorer, Sensitivity
from cut.selection import Mask, best_per_layer


class Regrowth:
    """In every layer, drop the smallest weights and grow as many of those whose gradient is largest.

    RigL (arXiv 1911.11134) grows by the gradient of the joint loss; DiSparse's dynamic variant (arXiv 2206.04662) by
    each task's, keeping the union of what the tasks grow. Here the tasks' gradients are fused by a vote, of share 0 for
    the union, and the best are grown: as many as were dropped, so that the sparsity stays exact.

    Args:
        scorer: What is grown by; default the gradient of each task.
        fusion: How tasks agree on it; default the union.
        rate: Share of a layer's kept weights that moves at first; it falls to 0 along a cosine.
        every: Epochs from one move to the next.
        start: Epoch of the first move.
        end: Epoch at which the share has fallen to 0.
        batches: Number of batches that gradients are summed over.
    """

    def __init__(
        self,
        scorer: Scorer | None = None,
        fusion: Fusion | None = None,
        rate: float = 0.3,
        every: int = 1,
        start: int = 1,
        end: int = 6,
        batches: int = 1,
    ) -> None:
        if not 0 < rate <= 1:
            raise ValueError(f"rate {rate}; allowed: 0 < rate <= 1 (a share of each layer's kept weights)")
        if every < 1 or not 0 <= start < end or batches < 1:
            raise ValueError(
                f"every={every}, start={start}, end={end}, batches={batches}; allowed: every and batches >= 1, "
                "0 <= start < end"
            )
        self.scorer, self.fusion = scorer or Sensitivity(power=0), fusion or Vote(0.0)
        self.rate, self.every, self.start, self.end, self.batches = rate, every, start, end, batches

    def share(self, epoch: int) -> float:
        """The share that moves before an epoch's training: 0 if the mask rests.

        Example:
            >>> [round(Regrowth(rate=0.4, start=1, end=5).share(e), 3) for e in range(6)]
            [0.0, 0.341, 0.2, 0.059, 0.0, 0.0]
        """
        if not self.start <= epoch < self.end or (epoch - self.start) % self.every:
            return 0.0
        progress = (epoch - self.start + 1) / (self.end - self.start)
        return round(self.rate * (1 + math.cos(math.pi * progress)) / 2, 12)

    def __call__(
        self,
        network: nn.Module,
        mask: Mask,
        batches: Iterable[Any],
        losses: Mapping[str, Loss],
        tasks: Sequence[str],
        share: float,
        inputs: Inputs | None = None,
    ) -> Mask:
        """The moved mask; as many weights of every layer are kept as before.

        Grown weights are zero until they are trained: the mask's user multiplies by it, and what was cut is zero.

        Args:
            network: The network under the mask, as it is in training.
            mask: The mask.
            batches: Batches to take gradients on.
            losses: Losses of all tasks.
            tasks: The kept tasks.
            share: Share of each layer's kept weights that moves.
            inputs: How to get the network's input from a batch.
        """
        grown = self.scorer(network, batches, losses, tasks, inputs)
        weights = prunable(network)
        scored = {n for per in grown.values() for n in per}
        moved = {n: m.clone(memory_format=torch.contiguous_format) for n, m in mask.items()}
        counts: dict[str, int] = {}
        for name in sorted(scored & set(mask)):
            kept = mask[name]
            count = min(int(share * int(kept.sum())), int((~kept).sum()))
            if not count:
                continue
            size = weights[name].detach().abs().masked_fill(~kept, math.inf).flatten()
            moved[name].view(-1)[size.argsort(stable=True)[:count]] = False
            counts[name] = count
        if not counts:
            return moved
        # Only what was not kept before may grow: the rest goes behind all gradients.
        free = {t: {n: s.masked_fill(mask[n], -1.0) for n, s in per.items() if n in mask} for t, per in grown.items()}
        chosen = best_per_layer(self.fusion(free), counts)
        for name, new in chosen.items():
            moved[name] |= new
        return self._awakened(network, moved)

    def _awakened(self, network: nn.Module, mask: Mask) -> Mask:
        """The mask without silenced biases and norms of layers that have grown: their channels may be needed again."""
        weights = prunable(network)
        return {n: m if n in weights else torch.ones_like(m) for n, m in mask.items()}
