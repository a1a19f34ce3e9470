"""Cut a pre-trained multi-task vision model down to the tasks a device needs.

The functional core, on any ``nn.Module`` whose forward returns ``{task: Tensor}``::

    mask = cut.prune(model, batches, losses, tasks=["seg"], sparsity=0.9)   # score, fuse, cut
    ...                                            # fine-tune; cut.apply_mask(model, mask) after every optimiser step
    small = cut.compact(model, ["seg"], mask, batches[0])
    cut.save(small, "small")
    cut.export_onnx(small, "small.onnx", image, tasks=["seg"])
"""

from cut.budget import KeepRatio, Parameters, Sparsity
from cut.checkpoint import load, save
from cut.compact import compact
from cut.decomposition import owners, prunable
from cut.export import export_onnx
from cut.fusion import Max, Mean, Vote, Weighted
from cut.masks import apply_mask, component_sparsity, make_mask, overlap, prune, sparsity
from cut.scores import Magnitude, Random, Sensitivity, sensitivity

__all__ = [
    "KeepRatio",
    "Magnitude",
    "Max",
    "Mean",
    "Parameters",
    "Random",
    "Sensitivity",
    "Sparsity",
    "Vote",
    "Weighted",
    "apply_mask",
    "compact",
    "component_sparsity",
    "export_onnx",
    "load",
    "make_mask",
    "overlap",
    "owners",
    "prunable",
    "prune",
    "save",
    "sensitivity",
    "sparsity",
]
