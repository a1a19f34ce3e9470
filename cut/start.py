"""Start: one scorer for the first cut of a schedule, another for those after it.

With :class:`cut.neighbours.SimilarTasks` first it is the voting start of an iterative pruning: the vote of similar
tasks gives the sub-network that a few rounds on the new task go on from (after the abstract of arXiv 2301.11560, whose
formulas are not public).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from cut.decomposition import Inputs, Loss
from cut.scores import Scorer, Scores, Sensitivity


class Start:
    """A scorer that asks one scorer at the first cut and another at every later one.

    Its state is kept with the pruning callback's, so a run that goes on from a checkpoint goes on here too.

    Args:
        first: For the first cut.
        then: For every later one; default CUT's score.
    """

    def __init__(self, first: Scorer, then: Scorer | None = None) -> None:
        self.first, self.then = first, then or Sensitivity()
        self.started = False

    def __call__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        losses: Mapping[str, Loss],
        tasks: Sequence[str],
        inputs: Inputs | None = None,
    ) -> dict[str, Scores]:
        """The scores of the one whose turn it is."""
        scores = (self.then if self.started else self.first)(model, batches, losses, tasks, inputs)
        self.started = True
        return scores

    def state_dict(self) -> dict[str, Any]:
        """Whether the first cut is made."""
        return {"started": self.started}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take the state back from a checkpoint."""
        self.started = bool(state_dict["started"])
