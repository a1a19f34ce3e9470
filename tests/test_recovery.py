"""Recovery: the training loop, and that a training which was stopped goes on as if it had not been."""

import copy
import itertools
import random
import signal

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from cut import recovery
from cut.data.synthetic import Synthetic
from cut.masks import prune
from cut.recovery import recover
from cut.snapshot import Snapshot
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


class KilledError(Exception):
    """What a test stops a training with."""


def dropping() -> nn.Module:
    """A network whose training draws random numbers."""
    model = trained(Cnn())
    model.block1.act1 = nn.Sequential(nn.ReLU6(), nn.Dropout(0.2))
    return model


class Shifting:
    """A data set that draws from every global source of random numbers for each picture."""

    def __init__(self) -> None:
        self.batches = batches(count=5)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int):
        noise = torch.rand(1).item() + np.random.rand() + random.random()
        return {k: v + noise if k == "image" else v for k, v in self.batches[index].items()}


LOADERS = {
    "list": lambda: batches(count=4),
    "shuffled": lambda: DataLoader(Shifting(), batch_size=None, shuffle=True),
    "own generator": lambda: DataLoader(
        Shifting(), batch_size=None, shuffle=True, generator=torch.Generator().manual_seed(5)
    ),
    "workers": lambda: DataLoader(batches(count=5), batch_size=None, shuffle=True, num_workers=1),
    "seeded": lambda: Synthetic(("seg", "depth"), size=(32, 32), num=24, batch_size=4, seed=1),
}


def train(loader: str, path, stop: int | None = None, how: str = "loss", **options):
    """Train a fresh model, as a fresh process would; ``stop`` kills it in that step, or before it."""
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(11)
    torch.rand(options.pop("drawn", 0))
    model, data = dropping(), LOADERS[loader]()
    losses = dict(LOSSES)
    if isinstance(data, Synthetic):
        data.setup()
        losses = dict.fromkeys(TASKS, lambda out, batch: (out - batch["image"]).abs().mean())
        data = data.train_dataloader()
    mask = {"block1.expand.weight": torch.rand(48, 24, 1, 1, generator=torch.Generator().manual_seed(0)) > 0.5}
    calls = []

    def depth(out, batch):
        calls.append(1)
        if how == "loss" and len(calls) == stop:
            torch.rand(7)
            raise KilledError
        return losses["depth"](out, batch)

    def progress(steps):
        for step in steps:
            if how == "progress" and step == stop:
                raise KilledError
            yield step

    history = recover(
        model,
        data,
        {**losses, "depth": depth},
        TASKS,
        **{"steps": 11, "lr": 1e-2, "mask": mask, "progress": progress, "resume": path, **options},
    )
    return model.state_dict(), history


@pytest.mark.parametrize("how", ["loss", "progress"])
@pytest.mark.parametrize("loader", [pytest.param(n, marks=pytest.mark.slow if n == "workers" else ()) for n in LOADERS])
def test_killed_training_goes_on_as_if_it_had_not_been(loader, how, tmp_path, monkeypatch):
    straight, history = train(loader, None)
    monkeypatch.setattr(recovery, "SECONDS", 0.0)
    with pytest.raises(KilledError):
        train(loader, tmp_path / "a.pt", stop=3, how=how)
    with pytest.raises(KilledError):  # a second time, counted from where it was
        train(loader, tmp_path / "a.pt", stop={"loss": 6, "progress": 9}[how], how=how, drawn=5)
    weights, resumed = train(loader, tmp_path / "a.pt", drawn=3)
    assert resumed == history
    for name, value in straight.items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=0, msg=name)


def test_keeping_a_training_does_not_change_it(tmp_path, monkeypatch):
    straight, history = train("shuffled", None)
    monkeypatch.setattr(recovery, "SECONDS", 0.0)
    weights, kept = train("shuffled", tmp_path / "a.pt")
    assert kept == history and all(torch.equal(v, weights[n]) for n, v in straight.items())


def test_training_that_ended_is_not_trained_again(tmp_path):
    weights, history = train("shuffled", tmp_path / "a.pt")
    again, found = train("shuffled", tmp_path / "a.pt", stop=1)  # would be killed in its first step
    assert found == history and all(torch.equal(v, again[n]) for n, v in weights.items())


@pytest.mark.parametrize(
    ("other", "words"),
    [({"steps": 12}, "steps was 11"), ({"lr": 0.1}, "lr was 0.01"), ({"mask": {}}, "mask was"), ({}, "weights was")],
)
def test_another_training_does_not_go_on_from_its_file(other, words, tmp_path, monkeypatch):
    monkeypatch.setattr(recovery, "SECONDS", 0.0)
    with pytest.raises(KilledError):
        train("list", tmp_path / "a.pt", stop=3)
    if not other:
        monkeypatch.setitem(globals(), "dropping", lambda: trained(Cnn(), seed=1))
    with pytest.raises(ValueError, match=words):
        train("list", tmp_path / "a.pt", **other)


def test_training_is_kept_by_the_clock_and_at_its_end(tmp_path, monkeypatch):
    clock = iter(range(0, 10_000, 10))  # every look at it is ten seconds later
    monkeypatch.setattr(recovery.time, "monotonic", lambda: float(next(clock)))
    kept = []
    keep = Snapshot.keep
    monkeypatch.setattr(Snapshot, "keep", lambda s, n, v: (kept.append(len(v["history"])), keep(s, n, v)))
    train("list", tmp_path / "a.pt")
    assert kept[0] == 3 and kept[-1] == 11 and all(b - a <= 3 for a, b in itertools.pairwise(kept))


def test_interrupt_is_raised_after_a_whole_step_that_is_kept(tmp_path):
    straight, history = train("shuffled", None)

    def interrupted(steps):
        for step in steps:
            if step == 5:
                signal.raise_signal(signal.SIGINT)
            yield step

    with pytest.raises(KeyboardInterrupt):
        train("shuffled", tmp_path / "a.pt", progress=interrupted)
    weights, resumed = train("shuffled", tmp_path / "a.pt", stop=6)  # five steps are left
    assert resumed == history and all(torch.equal(v, weights[n]) for n, v in straight.items())
