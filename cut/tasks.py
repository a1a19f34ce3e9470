"""Tasks: what a model learns, how it is judged, and what its outputs mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from cut import legacy
from cut import metrics as m

Criterion = Callable[[Tensor, Tensor], Tensor]
FAMILIES = ("corrected", "legacy")
# Below this length an output vector's direction is damped, so that a head that a cut silenced does not get
# the gradient of 1 / length, 1e8 at torch's own bound.
SHORTEST = 1e-3


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
        """The task's loss without its weight; a dense output is resized bilinearly to its label first.

        A batch without any known label gives a zero that is connected to the output.

        Raises:
            ValueError: If the batch has no such label, or a label is out of range.
        """
        if self.name not in batch:
            raise ValueError(f"the batch has no label {self.name!r}; its entries are {sorted(batch)}")
        target = batch[self.name]
        output = output.float()
        if self.dense and output.shape[-2:] != target.shape[-2:]:
            output = F.interpolate(output, target.shape[-2:], mode="bilinear", align_corners=False)
        try:
            return self.criterion(output, target)
        except LabelError as error:
            raise ValueError(f"{error} (task {self.name!r})") from error

    def metrics(self, family: str = "corrected") -> MetricCollection:
        """Fresh metrics of one family.

        Raises:
            ValueError: If the family is neither ``"corrected"`` nor ``"legacy"``.
        """
        if family not in FAMILIES:
            raise ValueError(f"metric family {family!r}; allowed: {', '.join(map(repr, FAMILIES))}")
        found: dict[str, Metric | MetricCollection] = {**self.metric_factory(family)}
        return MetricCollection(found, compute_groups=False)


class LabelError(ValueError):
    """A label is out of range."""


def check_range(labels: Tensor, low: float, high: float, unknown: str) -> None:
    """Compare the smallest and the largest label with a range; one pass, and one wait for the device.

    Args:
        labels: Any shape; NaN is out of range.
        low: The smallest value allowed.
        high: The largest value allowed.
        unknown: How unknown labels are written, for the message.

    Raises:
        LabelError: Naming the value and the range.
    """
    if not labels.numel():
        return
    for value in torch.stack(torch.aminmax(labels)).tolist():
        if not low <= value <= high:
            raise LabelError(f"label {value:g} is out of range: {low:g} to {high:g}, unknown = {unknown}")


def _mean(values: Tensor, valid: Tensor) -> Tensor:
    """Mean over the valid values; zero, connected to the graph, if there are none."""
    return torch.where(valid, values, 0).sum() / valid.sum().clamp_min(1)


def cross_entropy(output: Tensor, target: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    """Mean cross-entropy over labels other than 255.

    Args:
        output: Logits [B, C] or [B, C, H, W].
        target: Classes [B] or [B, H, W], 255 = unknown.
        weights: Weight of each class; the mean is weighted, as in :func:`torch.nn.functional.cross_entropy`.

    Raises:
        ValueError: If a label is neither a class nor 255.
    """
    valid = target != m.IGNORE
    labels = torch.where(valid, target, 0)
    check_range(labels, 0, output.shape[1] - 1, str(m.IGNORE))
    weight = None if weights is None else output.new_tensor(weights)
    total = F.cross_entropy(output, target, weight, ignore_index=m.IGNORE, reduction="sum")
    if weight is None:
        return total / valid.sum().clamp_min(1)
    return total / (weight[labels] * valid).sum().clamp_min(torch.finfo(weight.dtype).tiny)


def one_minus_cosine(output: Tensor, target: Tensor) -> Tensor:
    """Mean of 1 - cosine between output and label, both [B, 3, H, W], over pixels whose label is not zero.

    Raises:
        ValueError: If a label's component is outside [-1, 1].
    """
    check_range(target, -1.001, 1.001, "0 0 0")
    # Spelled out: cosine_similarity of channels-first maps is a hundred times slower.
    length = (output * output).sum(1).clamp_min(SHORTEST**2).sqrt()
    cosine = (output * m.unit(target)).sum(1) / length
    return _mean(1 - cosine, (target != 0).any(1))


def l1_where_positive(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error, both [B, 1, H, W], over labels above 0.

    Raises:
        ValueError: If a label is negative or not finite.
    """
    check_range(target, 0, torch.finfo(torch.float32).max, "0")
    return _mean((output - target).abs(), target > 0)


def l1_where_known(output: Tensor, target: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Mean absolute error, both [B, 1, H, W], over labels that are not NaN.

    Raises:
        ValueError: If a label is outside [``low``, ``high``].
    """
    known = ~target.isnan()
    check_range(torch.where(known, target, low), low, high, "NaN")
    return _mean((output - target).abs(), known)


def _seg_metrics(family: str, classes: int, void_is_wrong: bool) -> dict[str, Metric]:
    if family == "legacy":
        return {
            "miou": legacy.LegacyMeanIoU(classes),
            "pixel_acc": legacy.LegacyPixelAccuracy(void_is_wrong),
        }
    return {"miou": m.MeanIoU(classes), "pixel_acc": m.PixelAccuracy(classes)}


def _normal_metrics(family: str, raw: bool = False) -> dict[str, Metric]:
    if raw and family == "corrected":
        raise ValueError("normals as published have legacy metrics only; allowed: family 'legacy'")
    old = family == "legacy" and not raw
    within = legacy.LegacyWithinAngle if old else m.WithinAngle
    return {
        "mean": legacy.LegacyMeanAngle() if old else m.MeanAngle(),
        "median": legacy.LegacyMedianAngle() if old else m.MedianAngle(),
        "within_11": within(11.25),
        "within_22": within(22.5),
        "within_30": within(30.0),
    }


def _depth_metrics(family: str) -> dict[str, Metric]:
    error = legacy.LegacyDepthError if family == "legacy" else m.DepthError
    delta = legacy.LegacyDepthDelta if family == "legacy" else m.DepthDelta
    return {"abs": error(), "rel": error(relative=True), **{f"delta{k}": delta(k) for k in (1, 2, 3)}}


def _map_metrics(family: str) -> dict[str, Metric]:
    return {"l1": legacy.LegacyMapError() if family == "legacy" else m.MapError()}


def _class_metrics(family: str) -> dict[str, Metric]:
    return {"accuracy": m.Accuracy()}


def segmentation(
    classes: Sequence[str],
    name: str = "seg",
    weight: float = 1.0,
    class_weights: Sequence[float] | None = None,
    void_is_wrong: bool = False,
) -> Task:
    """Semantic segmentation: labels int64 [B, H, W], 255 = ignore.

    Args:
        classes: Names of the classes.
        name: Key of the task.
        weight: Loss weight.
        class_weights: Weight of each class in the loss.
        void_is_wrong: Whether the legacy pixel accuracy counts void, as it does on Cityscapes.

    Raises:
        ValueError: If there are no classes, more than 255, or not one weight for each.
    """
    _check_classes(classes, name)
    if class_weights is not None and len(class_weights) != len(classes):
        raise ValueError(f"{len(class_weights)} class weights of task {name!r}; allowed: {len(classes)}")
    criterion = partial(cross_entropy, weights=None if class_weights is None else tuple(class_weights))
    metrics = partial(_seg_metrics, classes=len(classes), void_is_wrong=void_is_wrong)
    return Task(name, "segmentation", len(classes), criterion, metrics, weight, classes=tuple(classes))


def normals(name: str = "normal", weight: float = 1.0, raw: bool = False) -> Task:
    """Surface normals: labels [B, 3, H, W], unit vectors, zero = unknown.

    Args:
        name: Key of the task.
        weight: Loss weight.
        raw: The labels are those of the published code (directions of raw 0-255 colours on NYU-v2): its metrics are
            angles between them as they are, and there is no corrected family.
    """
    unit = "direction as published" if raw else "unit vector, camera frame"
    return Task(name, "normals", 3, one_minus_cosine, partial(_normal_metrics, raw=raw), weight, unit=unit)


def depth(name: str = "depth", weight: float = 1.0, unit: str = "m") -> Task:
    """Depth: labels [B, 1, H, W], in metres unless ``unit`` says otherwise, 0 = unknown."""
    return Task(name, "depth", 1, l1_where_positive, _depth_metrics, weight, unit=unit)


def regression_map(name: str, weight: float = 1.0, low: float = 0.0, high: float = 1.0) -> Task:
    """A map such as edges or keypoints: labels [B, 1, H, W] in [``low``, ``high``], NaN = unknown."""
    criterion = partial(l1_where_known, low=low, high=high)
    unit = f"response in [{low:g}, {high:g}]"
    return Task(name, "map", 1, criterion, _map_metrics, weight, unit=unit)


def classification(classes: Sequence[str], name: str = "scene", weight: float = 1.0) -> Task:
    """An image-level class: labels int64 [B], 255 = unknown.

    Raises:
        ValueError: If there are no classes or more than 255.
    """
    _check_classes(classes, name)
    return Task(
        name,
        "classification",
        len(classes),
        cross_entropy,
        _class_metrics,
        weight,
        dense=False,
        classes=tuple(classes),
    )


def _check_classes(classes: Sequence[str], name: str) -> None:
    if not 1 <= len(classes) <= m.IGNORE:
        raise ValueError(f"task {name!r} has {len(classes)} classes; allowed: 1 to {m.IGNORE} (255 = ignore)")
