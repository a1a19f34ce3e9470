"""Which epoch a table reports."""

import pytest

from experiments.selection import select
from tests.experiments.grid_records import cell, record

HISTORY = [
    {"epoch": 0, "step": 5, "train/loss": 3.0},
    {"epoch": 1, "step": 10, "val/loss": 2.0, "val/seg/miou": 0.2, "test/loss": 1.0, "test/seg/miou": 0.21},
    {"epoch": 2, "step": 15, "val/loss": 0.1},  # no look at the test set: cannot be chosen
    {"epoch": 3, "step": 20, "val/loss": 1.0, "val/seg/loss": 9.0, "val/seg/miou": 0.3, "test/loss": 1.5}
    | {"test/seg/loss": 9.0, "test/seg/miou": 0.31},
    {"epoch": 4, "step": 25, "val/loss": 1.0, "val/seg/miou": 0.4, "test/loss": 1.0, "test/seg/miou": 0.41},
]


def test_last_is_the_records_own_metrics():
    run = record(cell(), history=HISTORY)
    assert select(run, "last") == run.metrics


@pytest.mark.parametrize(("rule", "val", "test"), [("best_val", 0.3, 0.31), ("best_test", 0.2, 0.21)])
def test_best_is_the_first_epoch_of_the_lowest_loss_and_holds_no_losses(rule, val, test):
    assert select(record(cell(), history=HISTORY), rule) == {"val": {"seg/miou": val}, "test": {"seg/miou": test}}


def test_unknown_rules_and_runs_without_such_epochs_are_refused():
    with pytest.raises(ValueError, match="'best'; allowed: last, best_val, best_test"):
        select(record(cell()), "best")
    with pytest.raises(ValueError, match=f"{cell().id.replace('+', '.')} has no epoch with val/loss"):
        select(record(cell(), history=HISTORY[:1] + HISTORY[2:3]), "best_val")
