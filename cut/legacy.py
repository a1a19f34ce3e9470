"""Metrics as the code of DiSparse, AdapMTL and CUT computes them, to stand beside published tables.

They differ from :mod:`cut.metrics`, which is the family to use, in these ways: mIoU leaves out the classes
that are never right, so losing a class can raise it; pixel accuracy is averaged over pictures and, on
Cityscapes, counts void as wrong; normals are compared as raw 0-255 colours, which all lie in one octant, so
angles shrink; depth errors are averaged over pictures; a negative depth passes the ratio test. (The published
loaders test one picture at a time, Taskonomy's 16, whose pixels it pools.) Outputs are compared at the
label's resolution after bilinear resizing, where that code takes the nearest output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cut import metrics as m


class LegacyMeanIoU(m.ConfusionMetric):
    """Mean IoU over the classes with a non-zero intersection only, in [0, 1]."""

    def compute(self) -> Tensor:
        """The mean over classes that were right at least once; 0 if none was, where that code has no number."""
        both, union, labels = self.counts()
        right = (both / union.clamp_min(1))[both > 0]
        return right.mean() if len(right) or not labels.any() else right.sum()


class PictureAverage(m.AverageMetric):
    """Shared state of metrics that are averaged over pictures, however many pixels of them are valid."""

    def add_pictures(self, values: Tensor, valid: Tensor) -> None:
        """Add each picture's mean over its valid pixels, both [B, ...]; pictures without any are left out."""
        count = valid.flatten(1).sum(1)
        means = torch.where(valid, values.float(), 0).flatten(1).sum(1) / count.clamp_min(1)
        self.add(means[count > 0])


class LegacyPixelAccuracy(PictureAverage):
    """Mean over pictures of right / counted pixels, in [0, 1].

    Args:
        void_is_wrong: Count void pixels, which no output can match: what that code does on Cityscapes,
            whose void label -1 passes its test ``label < classes``. Void stored as 255 (NYU-v2) does not.
    """

    higher_is_better = True

    def __init__(self, void_is_wrong: bool = False) -> None:
        super().__init__()
        self.void_is_wrong = void_is_wrong

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add one batch: logits [B, C, H, W], labels [B, H, W], 255 = void."""
        counted = torch.ones_like(target, dtype=torch.bool) if self.void_is_wrong else target != m.IGNORE
        self.add_pictures(m.best_class(logits) == target, counted)


class RawAngle(m.AngleMetric):
    """Shared state of legacy normal metrics: angles between raw colour vectors."""

    def vectors(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Unit normals n as that code's pictures hold them, (n + 1) / 2 * 255, not decoded."""
        return (m.unit(output) + 1) / 2 * 255, (target + 1) / 2 * 255


class LegacyMeanAngle(RawAngle, m.MeanAngle):
    """Mean angle between raw colour vectors, in degrees."""


class LegacyMedianAngle(RawAngle, m.MedianAngle):
    """Median angle between raw colour vectors, in degrees."""


class LegacyWithinAngle(RawAngle, m.WithinAngle):
    """Share of the pixels whose angle between raw colour vectors is below a limit, in [0, 1]."""


class LegacyDepthError(PictureAverage):
    """Mean over pictures of a picture's mean absolute depth error.

    Args:
        relative: Divide each error by its label; else the error is in metres.
    """

    def __init__(self, relative: bool = False) -> None:
        super().__init__()
        self.relative = relative

    def update(self, output: Tensor, target: Tensor) -> None:
        """Add one batch: depths [B, 1, H, W]; labels of 0 are unknown."""
        error = (output.float() - target).abs()
        self.add_pictures(error / target if self.relative else error, target > 0)


class LegacyDepthDelta(m.DepthDelta):
    """Share of the valid pixels with max(output / label, label / output) <= 1.25^k: negative outputs pass."""

    def update(self, output: Tensor, target: Tensor) -> None:
        """Add one batch: depths [B, 1, H, W]; labels of 0 are unknown."""
        valid = target > 0
        predicted, true = output.float()[valid], target[valid]
        self.add(torch.maximum(predicted / true, true / predicted) <= 1.25**self.power)


class LegacyMapError(PictureAverage):
    """Mean over pictures of a picture's mean absolute error of a map."""

    def update(self, output: Tensor, target: Tensor) -> None:
        """Add one batch: maps [B, 1, H, W]; labels that are NaN are unknown."""
        self.add_pictures((output.float() - target).abs(), torch.isfinite(target))
