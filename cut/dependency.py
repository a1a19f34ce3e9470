"""Dependency: Torch-Pruning's graph of which channels hang together (Fang et al., *DepGraph*, CVPR 2023)."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

from cut.decomposition import no_trace


def dependency_graph(model: nn.Module, example: Tensor) -> Any:
    """The dependency graph of a model that returns ``{task: Tensor}``.

    Raises:
        Exception: Whatever the tracer raises for a network that it cannot follow.
    """
    import torch_pruning  # heavy, and needed nowhere else

    with warnings.catch_warnings(), no_trace(model):
        warnings.simplefilter("ignore")
        # A factor of one gives every output a node of its own, so that no layer which emits it looks unread.
        return torch_pruning.DependencyGraph().build_dependency(
            model,
            example,
            forward_fn=lambda m, x: [o * 1.0 for o in m(x).values() if o.requires_grad],
            verbose=False,
        )
