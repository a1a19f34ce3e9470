"""Dependency: Torch-Pruning's graph of which channels hang together (Fang et al., *DepGraph*, CVPR 2023)."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from cut.decomposition import no_trace


def dependency_graph(model: nn.Module, example: Tensor) -> Any:
    """The dependency graph of a model that returns ``{task: Tensor}``.

    Raises:
        Exception: Whatever the tracer raises for a network that it cannot follow.
    """
    import torch_pruning  # heavy, and needed nowhere else

    class Graph(torch_pruning.DependencyGraph):
        """The graph without its exception for position embeddings."""

        def _trace(self, *args: Any, **kwargs: Any) -> Any:
            # The exception forgets which channels are whose in *any* concatenation behind an embedding, those of a
            # head too, though only that of tokens joins no channels; sizes tell the two apart just after.
            nodes = super()._trace(*args, **kwargs)
            for node in nodes.values():
                node.enable_index_mapping = True
            return nodes

    with warnings.catch_warnings(), no_trace(model), _without_hooks_left(model):
        warnings.simplefilter("ignore")
        # A factor of one gives every output a node of its own, so that no layer which emits it looks unread.
        return Graph().build_dependency(
            model,
            example,
            forward_fn=lambda m, x: [o * 1.0 for o in m(x).values() if o.requires_grad],
            verbose=False,
        )


@contextlib.contextmanager
def _without_hooks_left(model: nn.Module) -> Iterator[None]:
    """Torch-Pruning's hooks stay where a trace fails: what came in between goes."""
    before = {m: set(m._forward_hooks) for m in model.modules()}
    try:
        yield
    finally:
        for module, known in before.items():
            for key in set(module._forward_hooks) - known:
                del module._forward_hooks[key]
