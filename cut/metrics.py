"""Metrics of dense and image-level tasks, in two families, and Delta_m.

*Corrected* (default): mIoU from one confusion matrix over the whole set and all classes present in the labels, void left
out; angles between true unit normals; depth errors over all valid pixels of the set. *Legacy*: what DiSparse, AdapMTL and CUT's
code compute, to stand beside their tables: mIoU over the classes with a non-zero intersection only; accuracy per picture with
every label below the number of classes counted, void at -1 included; angles between raw 0-255 colour vectors; depth errors per
picture. Every metric knows whether more is better. All sums are reduced over processes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

IGNORE = 255
_ANGLE_BINS = 18_000  # of 0.01 degrees


class ConfusionMetric(Metric):
    """Shared state of segmentation metrics: one confusion matrix over the whole set (rows = labels)."""

    full_state_update = False
    higher_is_better = True
    confusion: Tensor

    def __init__(self, classes: int, ignore: int = IGNORE) -> None:
        super().__init__()
        self.classes, self.ignore = classes, ignore
        self.add_state("confusion", torch.zeros(classes, classes, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Count one batch: logits [B, C, H, W], labels [B, H, W]."""
        valid = (target != self.ignore) & (target >= 0)
        index = target[valid] * self.classes + logits.argmax(1)[valid]
        counts = torch.bincount(index, minlength=self.classes**2)
        self.confusion += counts.view(self.classes, self.classes)

    def iou(self) -> tuple[Tensor, Tensor, Tensor]:
        """IoU of every class, the labels' count and the intersection."""
        both = self.confusion.diag()
        union = self.confusion.sum(0) + self.confusion.sum(1) - both
        return both / union.clamp_min(1), self.confusion.sum(1), both


class MeanIoU(ConfusionMetric):
    """Mean IoU over the classes that the labels hold, in [0, 1]."""

    def compute(self) -> Tensor:
        """The mean; 0 if there were no labels."""
        iou, present, _ = self.iou()
        return iou[present > 0].mean() if (present > 0).any() else iou.sum() * 0


class LegacyMeanIoU(ConfusionMetric):
    """Mean IoU over the classes with a non-zero intersection, in [0, 1]: losing a class can raise it."""

    def compute(self) -> Tensor:
        """The mean; 0 if nothing was right."""
        iou, _, both = self.iou()
        return iou[both > 0].mean() if (both > 0).any() else iou.sum() * 0


class PixelAccuracy(ConfusionMetric):
    """Share of the valid pixels of the whole set that are right, in [0, 1]."""

    def compute(self) -> Tensor:
        """Right / valid."""
        return self.confusion.diag().sum() / self.confusion.sum().clamp_min(1)


class AverageMetric(Metric):
    """Shared state of metrics that are a sum divided by a count."""

    full_state_update = False
    higher_is_better = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def add(self, values: Tensor) -> None:
        """Add values that count once each."""
        self.total += values.double().sum()
        self.count += values.numel()

    def compute(self) -> Tensor:
        """The mean of all values; 0 if there were none."""
        return self.total / self.count.clamp_min(1)


class LegacyPixelAccuracy(AverageMetric):
    """Mean over pictures of right / (label < classes): void at -1 passes that test and counts as wrong, in [0, 1]."""

    higher_is_better = True

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add one batch: logits [B, C, H, W], labels [B, H, W]."""
        predicted = logits.argmax(1)
        valid = target < self.classes
        right = ((predicted == target) & valid).flatten(1).sum(1)
        self.add(right / valid.flatten(1).sum(1).clamp_min(1))


class Accuracy(AverageMetric):
    """Share of the pictures whose class is right, in [0, 1]; unknown labels are left out."""

    higher_is_better = True

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add one batch: logits [B, C], labels [B]."""
        valid = target != IGNORE
        self.add((logits.argmax(1) == target)[valid].float())


class AngleMetric(Metric):
    """Shared state of normal metrics: a histogram of angles in bins of 0.01 degrees, and their exact sum."""

    full_state_update = False
    higher_is_better = False
    histogram: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("histogram", torch.zeros(_ANGLE_BINS, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def angles(self, output: Tensor, target: Tensor) -> Tensor:
        """Angles in degrees between true unit normals, at pixels where the label is not zero."""
        valid = target.abs().sum(1) > 0
        cosine = (F.normalize(output.float(), dim=1) * F.normalize(target.float(), dim=1)).sum(1)
        return torch.rad2deg(torch.acos(cosine[valid].clamp(-1, 1)))

    def update(self, output: Tensor, target: Tensor) -> None:
        """Add one batch: vectors [B, 3, H, W]; zero labels are unknown."""
        angles = self.angles(output, target)
        bins = (angles.double() * 100).floor().clamp(0, _ANGLE_BINS - 1).long()
        self.histogram += torch.bincount(bins, minlength=_ANGLE_BINS)
        self.total += angles.double().sum()


class RawAngles(AngleMetric):
    """Shared state of legacy normal metrics: angles between raw 0-255 colour vectors, which all lie in one octant."""

    def angles(self, output: Tensor, target: Tensor) -> Tensor:
        """Angles in degrees between (n + 1) / 2 x 255 of output and label, as the legacy code measures them."""
        valid = target.abs().sum(1) > 0
        unit = F.normalize(output.float(), dim=1)
        cosine = F.cosine_similarity((unit + 1) / 2 * 255, (target.float() + 1) / 2 * 255, dim=1)
        return torch.rad2deg(torch.acos(cosine[valid].clamp(-1, 1)))


class _MeanOf:
    histogram: Tensor
    total: Tensor

    def compute(self) -> Tensor:
        """Mean angle in degrees."""
        return self.total / self.histogram.sum().clamp_min(1)


class _MedianOf:
    histogram: Tensor

    def compute(self) -> Tensor:
        """Median angle in degrees, to 0.01."""
        counts = self.histogram.cumsum(0)
        half = counts[-1] / 2
        return (torch.searchsorted(counts, half).double() + 0.5) / 100 if counts[-1] > 0 else half


class _WithinOf:
    histogram: Tensor
    degrees: float

    def compute(self) -> Tensor:
        """Share of the angles below the limit, in [0, 1]."""
        return self.histogram[: round(self.degrees * 100)].sum() / self.histogram.sum().clamp_min(1)


class MeanAngle(_MeanOf, AngleMetric):
    """Mean angle between true normals over the whole set, in degrees."""


class MedianAngle(_MedianOf, AngleMetric):
    """Median angle between true normals over the whole set, in degrees."""


class WithinAngle(_WithinOf, AngleMetric):
    """Share of the pixels whose true angle is below a limit in degrees."""

    higher_is_better = True

    def __init__(self, degrees: float) -> None:
        super().__init__()
        self.degrees = degrees


class LegacyMeanAngle(_MeanOf, RawAngles):
    """Mean raw-colour angle, in degrees."""


class LegacyMedianAngle(_MedianOf, RawAngles):
    """Median raw-colour angle, in degrees."""


class LegacyWithinAngle(_WithinOf, RawAngles):
    """Share of the pixels whose raw-colour angle is below a limit in degrees."""

    higher_is_better = True

    def __init__(self, degrees: float) -> None:
        super().__init__()
        self.degrees = degrees


class DepthError(AverageMetric):
    """Mean absolute depth error over the valid pixels of the whole set: metres, or relative to the label.

    Args:
        relative: Divide by the label's depth.
        per_picture: The legacy way: the mean over pictures of each picture's mean.
    """

    def __init__(self, relative: bool = False, per_picture: bool = False) -> None:
        super().__init__()
        self.relative, self.per_picture = relative, per_picture

    def update(self, output: Tensor, target: Tensor) -> None:
        """Add one batch: depths [B, 1, H, W]; labels of 0 are unknown."""
        valid = target > 0
        error = (output.float() - target).abs()
        if self.relative:
            error = error / target.clamp_min(1e-9)
        if not self.per_picture:
            self.add(error[valid])
            return
        count = valid.flatten(1).sum(1)
        means = torch.where(valid, error, 0).flatten(1).sum(1) / count.clamp_min(1)
        self.add(means[count > 0])


class DepthDelta(AverageMetric):
    """Share of the valid pixels whose depth is within a factor 1.25^k of the label, in [0, 1]."""

    higher_is_better = True

    def __init__(self, power: int) -> None:
        super().__init__()
        self.power = power

    def update(self, output: Tensor, target: Tensor) -> None:
        """Add one batch: depths [B, 1, H, W]; labels of 0 are unknown, outputs of 0 and less are wrong."""
        valid = target > 0
        predicted, true = output.float()[valid].clamp_min(1e-9), target[valid]
        self.add((torch.maximum(predicted / true, true / predicted) < 1.25**self.power).float())


class MapError(AverageMetric):
    """Mean absolute error of a map over its finite labels."""

    def update(self, output: Tensor, target: Tensor) -> None:
        """Add one batch: maps [B, 1, H, W]; labels that are NaN are unknown."""
        valid = torch.isfinite(target)
        self.add((output.float() - target)[valid].abs())


def delta_m(
    metrics: Mapping[str, float],
    reference: Mapping[str, float],
    higher_is_better: Mapping[str, bool],
    clip: float | None = None,
) -> float:
    """Delta_m in percent, positive = better: the mean over tasks of the mean signed relative change over a task's metrics.

    Args:
        metrics: ``"task/metric"`` to value.
        reference: The same of the dense model.
        higher_is_better: Direction of each metric.
        clip: Bound of each metric's change in percent (the bounded companion has 100).

    Returns:
        Percent.

    Raises:
        ValueError: If the two differ in their metrics, a direction is missing or a reference value is zero.

    Example:
        >>> up = {"a/x": True, "b/y": False, "b/z": False}
        >>> round(delta_m({"a/x": 1.1, "b/y": 1.0, "b/z": 3.0}, {"a/x": 1.0, "b/y": 2.0, "b/z": 2.0}, up), 6)
        5.0
    """
    if set(metrics) != set(reference) or not metrics:
        odd = sorted(set(metrics) ^ set(reference))
        raise ValueError(f"Delta_m needs the same metrics on both sides; only one side has {odd or 'any'}")
    by_task: dict[str, list[float]] = {}
    for key, value in metrics.items():
        if key not in higher_is_better:
            raise ValueError(f"no direction for metric {key!r}")
        if reference[key] == 0:
            raise ValueError(f"Delta_m is not defined: the reference's {key} is 0")
        change = 100 * (value - reference[key]) / abs(reference[key]) * (1 if higher_is_better[key] else -1)
        by_task.setdefault(key.split("/")[0], []).append(change if clip is None else max(-clip, min(clip, change)))
    means = [sum(changes) / len(changes) for changes in by_task.values()]
    return sum(means) / len(means)
