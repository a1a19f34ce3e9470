"""Selection: which epoch of a run a table reports."""

from __future__ import annotations

from typing import Any

from cut.records import Record

# The loss whose lowest value chooses the epoch. Only a table marked as legacy may look at the test set.
LOSSES = {"best_val": "val/loss", "best_test": "test/loss"}
RULES = ("last", *LOSSES)


def epoch_metrics(entry: dict[str, Any], split: str) -> dict[str, float]:
    """The metrics of one split in an epoch's numbers, without losses."""
    start = f"{split}/"
    return {k.removeprefix(start): v for k, v in entry.items() if k.startswith(start) and not k.endswith("loss")}


def select(record: Record, rule: str) -> dict[str, dict[str, float]]:
    """Metrics by split at the epoch that a rule chooses; of equal epochs the first.

    Args:
        record: Of a run that looked at the test set in some epochs.
        rule: ``last``, ``best_val`` (lowest validation loss) or ``best_test`` (lowest test loss).

    Raises:
        ValueError: If the rule is unknown, or no epoch has both test metrics and the loss.
    """
    if rule not in RULES:
        raise ValueError(f"selection rule {rule!r}; allowed: {', '.join(RULES)}")
    if rule == "last":
        return record.metrics
    loss = LOSSES[rule]
    epochs = [e for e in record.history if loss in e and epoch_metrics(e, "test")]
    if not epochs:
        raise ValueError(f"record {record.id} has no epoch with {loss} and test metrics, so {rule!r} cannot choose one")
    best = min(epochs, key=lambda e: e[loss])
    return {split: epoch_metrics(best, split) for split in ("val", "test")}
