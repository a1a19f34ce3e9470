"""Initialisation: a model's weights drawn anew, for methods that score or train an untrained network."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from cut.decomposition import Inputs, Loss, prunable
from cut.scores import Scorer, Scores

Draw = Literal["default", "xavier"]


def reinitialise(model: nn.Module, seed: int = 0, draw: Draw = "default") -> None:
    """Draw all weights anew, in place; running statistics of norms start again too.

    Args:
        model: Any module; each layer with a ``reset_parameters`` is reset by it, other parameters stay.
        seed: Of the draw; the global random state is put back. The same seed gives the same weights.
        draw: ``"default"``: each layer's own; ``"xavier"``: Conv and Linear weights from Xavier's normal distribution,
            as DiSparse's static variant does.

    Raises:
        ValueError: For an unknown draw.
    """
    if draw not in ("default", "xavier"):
        raise ValueError(f"draw {draw!r}; allowed: 'default', 'xavier'")
    # Drawn on the CPU, so that devices agree.
    where = {n: p.device for n, p in [*model.named_parameters(), *model.named_buffers()]}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs, whose state is not put back
        for module in model.modules():
            reset = getattr(module, "reset_parameters", None)
            own = [p for p in module.parameters(recurse=False)] + [b for b in module.buffers(recurse=False)]
            if not callable(reset) or not own:
                continue
            device = own[0].device
            module.cpu()
            reset()
            module.to(device)
        if draw == "xavier":
            for weight in prunable(model).values():
                drawn = torch.empty(weight.shape)
                nn.init.xavier_normal_(drawn) if drawn.dim() > 1 else nn.init.normal_(drawn)
                weight.copy_(drawn)
    assert all(p.device == where[n] for n, p in model.named_parameters())


class AtInitialisation:
    """A scorer applied to a re-initialised copy: what methods do that prune before training.

    A batch norm that has seen no batch has no running statistics: in eval mode it is the identity, and the activations
    of a deep network die out. A scorer that differentiates should therefore be in train mode
    (``Sensitivity(mode="train")``), as SNIP's and DiSparse's are.

    Args:
        scorer: The scorer; in train mode where the network has batch norms.
        seed: Of the draw.
        draw: See :func:`reinitialise`.
    """

    def __init__(self, scorer: Scorer, seed: int = 0, draw: Draw = "default") -> None:
        if draw not in ("default", "xavier"):
            raise ValueError(f"draw {draw!r}; allowed: 'default', 'xavier'")
        self.scorer, self.seed = scorer, seed
        self.draw: Draw = draw

    def __call__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        losses: Mapping[str, Loss],
        tasks: Sequence[str],
        inputs: Inputs | None = None,
    ) -> dict[str, Scores]:
        """The scores of the copy; the model itself is not changed."""
        fresh = copy.deepcopy(model)
        reinitialise(fresh, self.seed, self.draw)
        return self.scorer(fresh, batches, losses, tasks, inputs)
