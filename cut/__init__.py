"""Cut a pre-trained multi-task vision model down to the tasks a device needs.

The functional core, on any ``nn.Module`` whose forward returns ``{task: Tensor}``::

    mask = cut.prune(model, batches, losses, tasks=["seg"], sparsity=0.9)   # score, fuse, cut
    ...                                            # fine-tune; cut.apply_mask(model, mask) after every optimiser step
    small = cut.compact(model, ["seg"], mask, batches[0])
    cut.save(small, "small")
    cut.export_onnx(small, "small.onnx", image, tasks=["seg"])

Whole channels, to a latency: ``mask, found = cut.prune_to_latency(model, batches, losses, ["seg"], "0.5x")``.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cut.names import (
        Bytes,
        Channels,
        KeepRatio,
        Library,
        MACs,
        Magnitude,
        Max,
        Mean,
        Parameters,
        Random,
        Sensitivity,
        SimilarTasks,
        Sparsity,
        Together,
        Vote,
        Weighted,
        apply_mask,
        compact,
        component_sparsity,
        export_onnx,
        load,
        make_mask,
        make_unit_mask,
        newtask,
        overlap,
        owners,
        prunable,
        prune,
        prune_to_latency,
        save,
        sensitivity,
        sparsity,
    )

__all__ = [
    "Bytes",
    "Channels",
    "KeepRatio",
    "Library",
    "MACs",
    "Magnitude",
    "Max",
    "Mean",
    "Parameters",
    "Random",
    "Sensitivity",
    "SimilarTasks",
    "Sparsity",
    "Together",
    "Vote",
    "Weighted",
    "apply_mask",
    "compact",
    "component_sparsity",
    "export_onnx",
    "load",
    "make_mask",
    "make_unit_mask",
    "newtask",
    "overlap",
    "owners",
    "prunable",
    "prune",
    "prune_to_latency",
    "save",
    "sensitivity",
    "sparsity",
]


class _Package(ModuleType):
    """The package; whoever only reads records through it need not wait for PyTorch."""

    def __getattr__(self, name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from cut import names

        return getattr(names, name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})

    def __setattr__(self, name: str, value: Any) -> None:
        """Set, but for a module that is called as a name is: importing ``cut.compact`` leaves the function there."""
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
