"""Slots: where units lie in a network's tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slot:
    """One dimension of one tensor that holds units.

    Attributes:
        name: The parameter's or buffer's name in the network.
        dim: The dimension.
        unit: int64 [size of the dimension]: the unit of each entry, -1 if it is of none.
    """

    name: str
    dim: int
    unit: Tensor

    def entries(self, kept: Tensor) -> Tensor:
        """Bool of each entry: whether it stays when these units ([units], True = kept) stay."""
        return torch.cat([kept.cpu(), torch.ones(1, dtype=torch.bool)])[self.unit]  # -1 is the last: it stays


@dataclass(frozen=True)
class Group:
    """Units that the same layers make, and so are cut, floored and rounded together.

    Attributes:
        name: Name of the first layer that makes the units, or of the attention module; with ``/2`` and so on where a
            layer makes units of several groups.
        units: Number of units.
        slots: Where they lie.
    """

    name: str
    units: int
    slots: tuple[Slot, ...]

    @property
    def width(self) -> int:
        """Channels of a unit, where it has the fewest: 1, or those of a group of a grouped convolution or of a head."""
        counts = [torch.bincount(s.unit[s.unit >= 0], minlength=self.units) for s in self.slots]
        return min(int(c[c > 0].min()) for c in counts)

    def step(self, multiple: int) -> int:
        """The fewest units whose channels are a multiple of a number."""
        return multiple // math.gcd(multiple, self.width)

    def alive(self, values: Mapping[str, Tensor]) -> Tensor:
        """Units of which any entry of the given tensors (those missing do not count) is not zero: bool [units]."""
        alive = torch.zeros(self.units + 1, dtype=torch.bool)
        for slot in self.slots:
            if slot.name in values:
                used = (values[slot.name] != 0).movedim(slot.dim, 0).reshape(len(slot.unit), -1).any(1).cpu()
                alive[slot.unit[used]] = True
        return alive[: self.units]
