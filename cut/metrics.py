"""Metrics of dense and image-level tasks, counted over a whole set.

This is the *corrected* family, the default: mIoU from one confusion matrix over the set and all classes
present in the labels, void left out; angles between true unit normals; depth errors over the valid pixels of
the set. What the published code computes instead is :mod:`cut.legacy`. Every metric knows whether more is
better, adds up over processes, and is NaN where a set has no valid label. States are counts in int64 and sums
in compensated float32, so results do not depend on how the set is cut into batches and devices without
float64 can hold them. Updates replace a state: spawned processes share the memory of the first one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from cut.delta import delta_m as delta_m

IGNORE = 255
BINS_PER_DEGREE = 100


def best_class(logits: Tensor) -> Tensor:
    """Index of the largest logit, [B, C, ...] to [B, ...]."""
    return logits.max(1).indices  # three times faster than argmax(1) of a channels-first map


class ConfusionMetric(Metric):
    """Shared state of segmentation metrics: one confusion matrix over the whole set (rows = labels).

    Args:
        classes: Number of classes; labels are 0 to ``classes`` - 1, or 255 = void.
    """

    full_state_update = False
    higher_is_better = True
    confusion: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.add_state("confusion", torch.zeros(classes, classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Count one batch: logits [B, C, H, W], labels [B, H, W]; void is left out.

        Raises:
            ValueError: If a label is neither a class nor 255.
        """
        valid = target != IGNORE
        index = target[valid] * self.classes + best_class(logits)[valid]
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= self.classes**2):
            wrong = target[valid & ((target < 0) | (target >= self.classes))]
            raise ValueError(f"label {int(wrong[0])} is out of range: classes are 0 to {self.classes - 1}, 255 = void")
        counts = torch.bincount(index, minlength=self.classes**2)
        self.confusion = self.confusion + counts.view(self.classes, self.classes)

    def counts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Intersection, union and number of labels of every class, each [C]."""
        both, labels = self.confusion.diag(), self.confusion.sum(1)
        return both, self.confusion.sum(0) + labels - both, labels


class MeanIoU(ConfusionMetric):
    """Mean IoU over the classes that the labels of the set hold, in [0, 1]."""

    def compute(self) -> Tensor:
        """The mean over classes with at least one label."""
        both, union, labels = self.counts()
        return (both / union.clamp_min(1))[labels > 0].mean()


class PixelAccuracy(ConfusionMetric):
    """Share of the valid pixels of the whole set whose class is right, in [0, 1]."""

    def compute(self) -> Tensor:
        """Right / valid."""
        return self.confusion.diag().sum() / self.confusion.sum()


class AverageMetric(Metric):
    """Shared state of metrics that are the mean of many values: their sum and their number."""

    full_state_update = False
    higher_is_better = False
    total: Tensor
    rest: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("rest", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def add(self, values: Tensor) -> None:
        """Add values that count once each."""
        self.total, self.rest = add_exactly(self.total, self.rest, values.float().sum())
        self.count = self.count + values.numel()

    def compute(self) -> Tensor:
        """The mean of all values."""
        return (self.total + self.rest) / self.count


def add_exactly(total: Tensor, rest: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Add a float32 value to a float32 sum and to the sum of what rounding lost so far (Knuth's two-sum).

    Example:
        >>> total, rest = add_exactly(torch.tensor(2.0**24), torch.tensor(0.0), torch.tensor(1.0))
        >>> total.item() == 2.0**24, rest.item()
        (True, 1.0)
    """
    new = total + value
    part = new - total
    return new, rest + ((total - (new - part)) + (value - part))


class Accuracy(AverageMetric):
    """Share of the pictures whose class is right, in [0, 1]; unknown labels (255) are left out."""

    higher_is_better = True

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add one batch: logits [B, C], labels [B]."""
        self.add((best_class(logits) == target)[target != IGNORE])


def angle(u: Tensor, v: Tensor) -> Tensor:
    """Angle between vectors in degrees, [B, 3, ...] to [B, ...]; a zero vector is 90 degrees off.

    Kahan's form, which unlike the arc cosine keeps its precision at small angles.

    Example:
        >>> u, v = torch.tensor([[1.0, 0, 0], [2, 0, 0]]), torch.tensor([[1.0, 1e-4, 0], [0, 0, 3]])
        >>> [round(x, 5) for x in angle(u, v).tolist()]
        [0.00573, 90.0]
    """
    u, v = unit(u), unit(v)
    return torch.rad2deg(2 * torch.atan2(length(u - v), length(u + v)))


def length(vectors: Tensor) -> Tensor:
    """Euclidean length along dimension 1, [B, C, ...] to [B, ...]."""
    return (vectors * vectors).sum(1).sqrt()  # a hundred times faster than norm(dim=1) of a channels-first map


def unit(vectors: Tensor) -> Tensor:
    """Vectors of length 1 along dimension 1; zero stays zero."""
    return vectors / length(vectors).clamp_min(1e-12)[:, None]


class AngleMetric(Metric):
    """Shared state of normal metrics: a histogram of angles in bins of 0.01 degrees, and their sum.

    The histogram makes the median and the shares those of the whole set in constant memory: the median is
    exact to 0.01 degrees, the shares are exact at limits that are whole hundredths of a degree.
    """

    full_state_update = False
    higher_is_better = False
    histogram: Tensor
    total: Tensor
    rest: Tensor

    def __init__(self) -> None:
        super().__init__()
        bins = torch.zeros(180 * BINS_PER_DEGREE, dtype=torch.int64)
        self.add_state("histogram", bins, dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("rest", torch.zeros(()), dist_reduce_fx="sum")

    def vectors(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The vectors whose angle counts: outputs and labels themselves."""
        return output, target

    def update(self, output: Tensor, target: Tensor) -> None:
        """Add one batch: vectors [B, 3, H, W] of any length; zero labels are unknown and left out.

        An output of zero is 90 degrees off, one that is not finite 180.
        """
        valid = (target != 0).any(1)
        u, v = self.vectors(output.float(), target.float())
        angles = angle(u, v)[valid].nan_to_num(nan=180.0)
        bins = (angles * BINS_PER_DEGREE).long().clamp(0, len(self.histogram) - 1)
        self.histogram = self.histogram + torch.bincount(bins, minlength=len(self.histogram))
        self.total, self.rest = add_exactly(self.total, self.rest, angles.sum())

    def compute(self) -> Tensor:
        """Mean angle in degrees."""
        return (self.total + self.rest) / self.histogram.sum()


class MeanAngle(AngleMetric):
    """Mean angle between true unit normals over the valid pixels of the whole set, in degrees."""


def median_angle(histogram: Tensor) -> Tensor:
    """Median of a histogram of angles in degrees, to 0.01; NaN if it is empty.

    Example:
        >>> histogram = torch.zeros(18_000, dtype=torch.int64)
        >>> histogram[1000], histogram[2000] = 1, 1
        >>> round(median_angle(histogram).item(), 3)
        15.005
    """
    upto = histogram.cumsum(0)
    count = upto[-1]
    middle = [(upto <= rank).sum() for rank in ((count - 1) // 2, count // 2)]
    median = (middle[0] + middle[1] + 1) / (2 * BINS_PER_DEGREE)
    return torch.where(count > 0, median, torch.nan)


class MedianAngle(AngleMetric):
    """Median angle between true unit normals over the valid pixels of the whole set, in degrees, to 0.01."""

    def compute(self) -> Tensor:
        """Median angle in degrees."""
        return median_angle(self.histogram)


class WithinAngle(AngleMetric):
    """Share of the valid pixels of the whole set whose angle is below a limit, in [0, 1].

    Args:
        degrees: The limit; 11.25, 22.5 and 30 are usual.
    """

    higher_is_better = True

    def __init__(self, degrees: float) -> None:
        super().__init__()
        self.degrees = degrees

    def compute(self) -> Tensor:
        """Below the limit / valid."""
        below = self.histogram[: round(self.degrees * BINS_PER_DEGREE)].sum()
        return below / self.histogram.sum()


class DepthError(AverageMetric):
    """Mean absolute error of depth over the valid pixels of the whole set.

    Args:
        relative: Divide each error by its label; else the error is in metres.
    """

    def __init__(self, relative: bool = False) -> None:
        super().__init__()
        self.relative = relative

    def update(self, output: Tensor, target: Tensor) -> None:
        """Add one batch: depths [B, 1, H, W]; labels of 0 are unknown."""
        valid = target > 0
        error = (output.float()[valid] - target[valid]).abs()
        self.add(error / target[valid] if self.relative else error)


class DepthDelta(AverageMetric):
    """Share of the valid pixels whose depth is within a factor below 1.25^k of the label, in [0, 1].

    Args:
        power: The k.
    """

    higher_is_better = True

    def __init__(self, power: int) -> None:
        super().__init__()
        self.power = power

    def update(self, output: Tensor, target: Tensor) -> None:
        """Add one batch: depths [B, 1, H, W]; labels of 0 are unknown, outputs of 0 and less are wrong."""
        valid = target > 0
        predicted, true = output.float()[valid], target[valid]
        ratio = torch.maximum(predicted / true, true / predicted)
        self.add((ratio < 1.25**self.power) & (predicted > 0))


class MapError(AverageMetric):
    """Mean absolute error of a map over the known pixels of the whole set."""

    def update(self, output: Tensor, target: Tensor) -> None:
        """Add one batch: maps [B, 1, H, W]; labels that are NaN are unknown."""
        valid = torch.isfinite(target)
        self.add((output.float()[valid] - target[valid]).abs())
