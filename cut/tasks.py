"""Tasks: what a model learns, how it is judged, and what its outputs mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from cut import metrics as m

Criterion = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Task:
    """One task of a multi-task model.

    Attributes:
        name: Its key in batches and outputs.
        kind: ``segmentation``, ``normals``, ``depth``, ``map`` or ``classification``; says how to draw it.
        channels: Output channels.
        criterion: (output at the label's resolution, label) to a scalar.
        metric_factory: Metric family to metrics by name.
        weight: Loss weight (the papers' lambda); scores leave it out.
        dense: One label per pixel, else one per picture.
        classes: Class names, where there are classes.
        unit: Unit of the output.
    """

    name: str
    kind: str
    channels: int
    criterion: Criterion
    metric_factory: Callable[[str], dict[str, Metric]]
    weight: float = 1.0
    dense: bool = True
    classes: tuple[str, ...] = ()
    unit: str = ""

    def loss(self, output: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """The task's loss without its weight; a dense output is resized to its label first.

        Raises:
            ValueError: If the batch has no such label, or a label is out of range.
        """
        if self.name not in batch:
            raise ValueError(f"the batch has no label {self.name!r}; its entries are {sorted(batch)}")
        target = batch[self.name]
        if self.dense and output.shape[-2:] != target.shape[-2:]:
            output = F.interpolate(output, target.shape[-2:], mode="bilinear", align_corners=False)
        return self.criterion(output.float(), target)

    def metrics(self, family: str = "corrected") -> MetricCollection:
        """Fresh metrics of one family.

        Raises:
            ValueError: If the family is neither ``"corrected"`` nor ``"legacy"``.
        """
        if family not in ("corrected", "legacy"):
            raise ValueError(f"metric family {family!r}; allowed: 'corrected', 'legacy'")
        found: dict[str, Metric | MetricCollection] = {**self.metric_factory(family)}
        return MetricCollection(found, compute_groups=False)


def _nothing(output: Tensor) -> Tensor:
    """Zero, connected to the output, for batches without any valid label."""
    return output.sum() * 0.0


def cross_entropy(output: Tensor, target: Tensor, name: str = "seg") -> Tensor:
    """Mean cross-entropy over labels other than 255.

    Raises:
        ValueError: If a label is neither a class nor 255.
    """
    valid = target != m.IGNORE
    labels = target[valid]
    if not labels.numel():
        return _nothing(output)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= output.shape[1]:
        wrong = low if low < 0 else high
        raise ValueError(f"label {wrong} of task {name!r} is out of range: classes are 0 to {output.shape[1] - 1}, 255 = ignore")
    return F.cross_entropy(output, target, ignore_index=m.IGNORE)


def one_minus_cosine(output: Tensor, target: Tensor) -> Tensor:
    """Mean of 1 - cosine between output and label over pixels whose label is not the zero vector."""
    valid = target.abs().sum(1) > 0
    if not valid.any():
        return _nothing(output)
    return 1 - F.cosine_similarity(output, target, dim=1)[valid].mean()


def l1_where_positive(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error over labels above 0."""
    valid = target > 0
    return (output - target)[valid].abs().mean() if valid.any() else _nothing(output)


def l1_where_finite(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error over labels that are not NaN."""
    valid = torch.isfinite(target)
    return (output - target)[valid].abs().mean() if valid.any() else _nothing(output)


def _seg_metrics(classes: int, family: str) -> dict[str, Metric]:
    if family == "legacy":
        return {"miou": m.LegacyMeanIoU(classes), "pixel_acc": m.LegacyPixelAccuracy(classes)}
    return {"miou": m.MeanIoU(classes), "pixel_acc": m.PixelAccuracy(classes)}


def _normal_metrics(family: str) -> dict[str, Metric]:
    legacy = family == "legacy"
    within = m.LegacyWithinAngle if legacy else m.WithinAngle
    return {
        "mean": m.LegacyMeanAngle() if legacy else m.MeanAngle(),
        "median": m.LegacyMedianAngle() if legacy else m.MedianAngle(),
        "within_11": within(11.25),
        "within_22": within(22.5),
        "within_30": within(30.0),
    }


def _depth_metrics(family: str) -> dict[str, Metric]:
    per_picture = family == "legacy"
    return {
        "abs": m.DepthError(per_picture=per_picture),
        "rel": m.DepthError(relative=True, per_picture=per_picture),
        **{f"delta{k}": m.DepthDelta(k) for k in (1, 2, 3)},
    }


def _map_metrics(family: str) -> dict[str, Metric]:
    return {"l1": m.MapError()}


def _class_metrics(family: str) -> dict[str, Metric]:
    return {"accuracy": m.Accuracy()}


def segmentation(classes: Sequence[str], name: str = "seg", weight: float = 1.0) -> Task:
    """Semantic segmentation: labels int64 [B, H, W], 255 = ignore."""
    factory = partial(_seg_metrics, len(classes))
    return Task(
        name, "segmentation", len(classes), partial(cross_entropy, name=name), factory, weight, classes=tuple(classes)
    )


def normals(name: str = "normal", weight: float = 1.0) -> Task:
    """Surface normals: labels [B, 3, H, W], unit vectors, zero = unknown."""
    return Task(name, "normals", 3, one_minus_cosine, _normal_metrics, weight, unit="unit vector, camera frame")


def depth(name: str = "depth", weight: float = 1.0) -> Task:
    """Depth: labels [B, 1, H, W] in metres, 0 = unknown."""
    return Task(name, "depth", 1, l1_where_positive, _depth_metrics, weight, unit="m")


def regression_map(name: str, weight: float = 1.0) -> Task:
    """A map such as edges or keypoints: labels [B, 1, H, W], NaN = unknown."""
    return Task(name, "map", 1, l1_where_finite, _map_metrics, weight, unit="response in [0, 1]")


def classification(classes: Sequence[str], name: str = "scene", weight: float = 1.0) -> Task:
    """An image-level class: labels int64 [B], 255 = ignore."""
    criterion = partial(cross_entropy, name=name)
    return Task(name, "classification", len(classes), criterion, _class_metrics, weight, dense=False, classes=tuple(classes))
