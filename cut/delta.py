"""Delta: how much better or worse a model is than another one, over tasks of different metrics."""

from __future__ import annotations

from collections.abc import Mapping


def delta_m(
    metrics: Mapping[str, float],
    reference: Mapping[str, float],
    higher_is_better: Mapping[str, bool],
    clip: float | None = None,
) -> float:
    """Delta_m in percent, positive = better.

    The mean over tasks of the mean over that task's metrics of the signed relative change.

    Args:
        metrics: ``"task/metric"`` to value.
        reference: The same of the dense model.
        higher_is_better: Direction of each metric.
        clip: Bound of each metric's change in percent (the bounded companion has 100); None = no bound.

    Returns:
        Percent; NaN if a value is NaN.

    Raises:
        ValueError: If the two differ in their metrics, there are none, a direction is missing, a reference
            value is zero or ``clip`` is not positive.

    Example:
        >>> up = {"a/x": True, "b/y": False, "b/z": False}
        >>> round(delta_m({"a/x": 1.1, "b/y": 1.0, "b/z": 3.0}, {"a/x": 1.0, "b/y": 2.0, "b/z": 2.0}, up), 6)
        5.0
    """
    if not metrics or set(metrics) != set(reference):
        odd = sorted(set(metrics) ^ set(reference))
        raise ValueError(f"Delta_m needs the same metrics on both sides; only one side has {odd or 'any'}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip {clip}; allowed: None or a positive number of percent")
    changes: dict[str, list[float]] = {}
    for key, value in metrics.items():
        if key not in higher_is_better:
            raise ValueError(f"no direction for metric {key!r}; known: {sorted(higher_is_better)}")
        if reference[key] == 0:
            raise ValueError(f"Delta_m is not defined: the reference's {key!r} is 0")
        change = 100 * (value - reference[key]) / abs(reference[key]) * (1 if higher_is_better[key] else -1)
        if clip is not None and abs(change) > clip:
            change = clip if change > 0 else -clip
        changes.setdefault(key.split("/")[0], []).append(change)
    return sum(sum(found) / len(found) for found in changes.values()) / len(changes)
