import copy

import pytest
import torch

from cut.masks import prune
from cut.recovery import recover
from tests.small_networks import Cnn, trained
from tests.test_reference import LOSSES, batches

TASKS = ["seg", "depth"]


def test_what_is_cut_stays_zero_and_the_loss_falls():
    torch.manual_seed(0)
    model, data = trained(Cnn()), batches()
    mask = prune(model, data, LOSSES, TASKS, sparsity=0.8)
    history = recover(model, data, LOSSES, TASKS, steps=30, lr=1e-2, mask=mask)
    assert len(history) == 30 and sum(history[-5:]) < sum(history[:5])
    own = dict(model.named_parameters())
    assert all(not own[n][~m].any() for n, m in mask.items())
    assert not model.training


def test_one_step_is_that_of_adamw_on_the_weighted_sum():
    model, data = trained(Cnn()), batches(count=1)
    other = copy.deepcopy(model).train()
    recover(model, data, LOSSES, TASKS, steps=1, lr=1e-3, weights={"depth": 5.0})
    # The only step is half way between start and end of the schedule.
    factor = (1 + torch.cos(torch.pi * torch.tensor((0.5 - 0.1) / 0.9))) / 2
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-3 * float(factor), weight_decay=1e-4)
    outputs = other(data[0]["image"])
    (LOSSES["seg"](outputs["seg"], data[0]) + 5 * LOSSES["depth"](outputs["depth"], data[0])).backward()
    optimizer.step()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_frozen_parameters_and_dropped_heads_stay():
    model, data = trained(Cnn()), batches()
    model.stem.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    recover(model, data, LOSSES, TASKS, steps=3)
    after = model.state_dict()
    same = {n for n, _ in model.named_parameters() if torch.equal(before[n], after[n])}
    assert "stem.weight" in same and "classify.weight" in same and "heads.normal.out.weight" in same
    assert "heads.seg.out.weight" not in same


def test_no_steps_change_nothing_but_the_cut():
    model = trained(Cnn())
    before = copy.deepcopy(model.state_dict())
    assert recover(model, batches(), LOSSES, TASKS, steps=0) == []
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_loss_that_is_not_finite_names_task_and_step():
    losses = {**LOSSES, "depth": lambda out, batch: out.sum() * float("inf")}
    with pytest.raises(ValueError, match=r"'depth'.* at step 0"):
        recover(trained(Cnn()), batches(), losses, TASKS, steps=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"steps": -1}, "steps -1"), ({"steps": 1, "lr": 0}, "lr 0"), ({"steps": 1, "mask": {"x": torch.ones(1)}}, "'x'")],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        recover(trained(Cnn()), batches(), LOSSES, TASKS, **options)


def test_unknown_task_is_named():
    with pytest.raises(ValueError, match="no output 'pose'"):
        recover(trained(Cnn()), batches(), {**LOSSES, "pose": LOSSES["seg"]}, ["pose"], steps=1)
