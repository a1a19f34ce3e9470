"""Cut a pre-trained multi-task vision model down to the tasks a device needs.

The functional core, on any ``nn.Module`` whose forward returns ``{task: Tensor}``::

    mask = cut.prune(model, batches, losses, tasks=["seg"], sparsity=0.9)   # score, fuse, cut
    ...                                            # fine-tune; cut.apply_mask(model, mask) after every optimiser step
    small = cut.compact(model, ["seg"], mask, batches[0])
    cut.save(small, "small")
    cut.export_onnx(small, "small.onnx", image, tasks=["seg"])

Whole channels, to a latency: ``mask, found = cut.prune_to_latency(model, batches, losses, ["seg"], "0.5x")``.
"""

from cut.budget import KeepRatio, Parameters, Sparsity
from cut.checkpoint import load, save
from cut.compact import compact
from cut.decomposition import owners, prunable
from cut.export import export_onnx
from cut.fusion import Max, Mean, Vote, Weighted
from cut.library import Library
from cut.limits import Bytes, MACs, Together
from cut.masks import apply_mask, component_sparsity, make_mask, overlap, prune, sparsity
from cut.neighbours import SimilarTasks, newtask
from cut.scores import Magnitude, Random, Sensitivity, sensitivity
from cut.speed import prune_to_latency
from cut.structured import Channels, make_unit_mask

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
