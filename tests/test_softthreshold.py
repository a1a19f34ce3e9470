"""Soft thresholds: their gradient, the sparsity that they give, and task weights that follow the pruning."""

import copy
import math

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from cut.allocation import LayerSparsity
from cut.budget import Parameters, Sparsity
from cut.pruning import Pruning
from cut.schedules import OneShot
from cut.scores import Magnitude
from cut.softthreshold import SoftThreshold
from tests.test_pruning import build, fit, weights_of_kept, zeros

SHAPES = {"a1": (7, 9), "a2": (5, 4, 3, 3), "b1": (11, 6)}
OF = {"a1": "backbone", "a2": "backbone", "b1": "seg"}


def soft(weight, threshold):
    return np.sign(weight) * np.maximum(np.abs(weight) - threshold, 0)


def loss_of(weights: dict, coefficients: dict):
    """A loss that is curved in every weight; of arrays or tensors."""
    total = 0.0
    for name, w in weights.items():
        c = coefficients[name]
        total = total + (c * w + 0.5 * w**2 + 0.2 * c**2 * w**3).sum()
    return total


@pytest.fixture
def problem():
    """A callback over three weights of two components, without a trainer."""
    rng = np.random.default_rng(0)
    true = {n: rng.normal(size=s) for n, s in SHAPES.items()}
    coefficients = {n: rng.normal(size=s) for n, s in SHAPES.items()}
    callback = SoftThreshold(0.5, rate=1.0)
    callback._of = dict(OF)
    callback._weights = {n: nn.Parameter(torch.from_numpy(w.copy())) for n, w in true.items()}
    callback.thresholds = {"backbone": 0.6, "seg": 0.31}
    return callback, true, coefficients


def test_thresholds_and_weights_get_the_gradient_of_the_thresholded_network(problem):
    callback, true, coefficients = problem
    old = dict(callback.thresholds)
    with torch.no_grad():
        for name, w in callback._weights.items():
            callback._true[name] = w.detach().clone()
            w.copy_(torch.from_numpy(soft(true[name], old[OF[name]])))
    constants = {n: torch.from_numpy(c) for n, c in coefficients.items()}
    loss_of(callback._weights, constants).backward()
    arriving = {n: w.grad.numpy().copy() for n, w in callback._weights.items()}
    callback.on_before_optimizer_step(None, None, None)

    def loss(thresholds, weights):
        return loss_of({n: soft(w, thresholds[OF[n]]) for n, w in weights.items()}, coefficients)

    for component, threshold in old.items():
        up, down = ({**old, component: threshold * math.exp(s * 1e-5)} for s in (1, -1))
        slope = (loss(up, true) - loss(down, true)) / 2e-5  # of the logarithm
        mine = [n for n in OF if OF[n] == component]
        above = {n: np.abs(true[n]) > threshold for n in mine}
        size = sum(np.abs(arriving[n] * above[n]).sum() for n in mine) * threshold
        step = -math.log(callback.thresholds[component] / threshold)  # the rate is 1
        assert step == pytest.approx(slope / size, rel=1e-4), component
        assert 0 < abs(step) < 1
    rng = np.random.default_rng(1)
    for name, w in callback._weights.items():
        np.testing.assert_array_equal(w.detach().numpy(), true[name])  # the true weights are back
        for _ in range(20):
            index = tuple(int(rng.integers(s)) for s in SHAPES[name])
            up, down = ({**true, name: true[name].copy()} for _ in range(2))
            up[name][index] += 1e-6
            down[name][index] -= 1e-6
            slope = (loss(old, up) - loss(old, down)) / 2e-6
            assert float(w.grad[index]) == pytest.approx(slope, rel=1e-4, abs=1e-6), (name, index)
    assert not callback._true


def test_thresholds_without_a_gradient_stay(problem):
    callback, _, _ = problem
    old = dict(callback.thresholds)
    callback.on_before_optimizer_step(None, None, None)  # after the epochs with thresholds: nothing to do
    assert callback.thresholds == old
    for name, w in callback._weights.items():
        callback._true[name] = w.detach().clone()
        w.grad = torch.zeros_like(w) if name == "b1" else None
    callback.on_before_optimizer_step(None, None, None)
    assert callback.thresholds == pytest.approx(old)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scaled_thresholds_give_the_sparsity_exactly(dtype):
    for seed in range(10):
        g = torch.Generator().manual_seed(seed)
        callback = SoftThreshold(0.5)
        callback._weights = {n: nn.Parameter(torch.randn(40, 41, generator=g).to(dtype) * 0.1) for n in OF}
        callback._of, callback.thresholds = dict(OF), {"backbone": 1e-3, "seg": 2.3e-3}
        total = sum(w.numel() for w in callback._weights.values())
        for wanted in (0.001, 0.1, 0.333, 0.5, 0.9, 0.99):
            callback._scale(wanted)
            assert callback.thresholds["seg"] / callback.thresholds["backbone"] == pytest.approx(2.3)
            left = [(w.detach().abs() - callback.thresholds[OF[n]]).clamp_min(0) for n, w in callback._weights.items()]
            assert sum(int((v == 0).sum()) for v in left) == round(wanted * total), (seed, wanted)


class Before(pl.Callback):
    """The true weights, seen in front of SoftThreshold."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.true = {n: p.detach().clone() for n, p in pl_module.network.named_parameters()}


class After(pl.Callback):
    """Zeros and thresholds in the forward, seen behind SoftThreshold; factors and weights after every batch."""

    def __init__(self, threshold: SoftThreshold, before: Before | None = None) -> None:
        self.threshold, self.before = threshold, before
        self.zeros, self.factors, self.thresholds = [], [], []
        self.step_factors = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        weights = self.threshold._weights
        self.total = sum(w.numel() for w in weights.values())
        self.zeros.append(sum(int((w == 0).sum()) for w in weights.values()))
        self.step_factors.append(dict(pl_module.factors))
        if self.before is not None and trainer.current_epoch < self.threshold.epochs:
            for name, w in weights.items():
                limit = self.threshold.thresholds[self.threshold._of[name]]
                expected = soft(self.before.true[name].double().numpy(), limit)
                np.testing.assert_allclose(w.detach().numpy(), expected, rtol=1e-5, atol=1e-7)
            others = set(self.before.true) - set(weights)
            assert others and all(
                torch.equal(p, self.before.true[n]) for n, p in pl_module.network.named_parameters() if n in others
            )

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.factors.append(dict(pl_module.factors))
        self.thresholds.append(dict(self.threshold.thresholds))


def with_momentum_zero(model, rate):
    model.optimizer = lambda p: torch.optim.SGD(p, lr=rate)
    return model


def test_the_sparsity_in_training_follows_the_schedule_exactly(tmp_path):
    model, data = build()
    threshold, before = SoftThreshold(0.8, epochs=3), Before()
    watch = After(threshold, before)
    fit(model, data, [Pruning(tasks=["seg", "depth"]), before, threshold, watch], tmp_path, 4)
    assert set(threshold._of.values()) == {"backbone", "seg", "depth"}
    kept = weights_of_kept(model, ["seg", "depth"])
    assert set(threshold._weights) == set(kept) and watch.total == sum(w.numel() for w in kept.values())
    for step, found in enumerate(watch.zeros[:6]):  # two batches an epoch; the cubic takes half of the six steps
        progress = min(1.0, 2 * (step + 1) / 6)
        assert found == round(0.8 * (1 - (1 - progress) ** 3) * watch.total), step
    assert len({round(t, 12) for t in watch.thresholds[-1].values()}) == 3  # each component has learnt its own
    # In the epoch after them training goes on from the thresholded weights.
    assert watch.zeros[6] == pytest.approx(0.8 * watch.total, rel=0.1)
    assert model.factors == {}


def test_weights_are_left_thresholded_after_the_last_epoch_with_thresholds(tmp_path):
    model, data = build()
    with_momentum_zero(model, 0.0)  # weights would stay what they are
    start = {n: w.detach().double().numpy().copy() for n, w in weights_of_kept(model, ["seg"]).items()}
    threshold = SoftThreshold(0.7, epochs=2)
    fit(model, data, [Pruning(tasks=["seg"]), threshold], tmp_path, 3)
    for name, w in weights_of_kept(model, ["seg"]).items():
        expected = soft(start[name], threshold.thresholds[threshold._of[name]])
        np.testing.assert_allclose(w.detach().numpy(), expected, rtol=1e-5, atol=1e-7)
    before_end, data = build()
    with_momentum_zero(before_end, 0.0)
    fit(before_end, data, [Pruning(tasks=["seg"]), SoftThreshold(0.7, epochs=4)], tmp_path, 3)
    for name, w in weights_of_kept(before_end, ["seg"]).items():
        np.testing.assert_array_equal(w.detach().double().numpy(), start[name])  # not before


def test_gradients_that_add_up_over_batches_keep_the_true_weights(tmp_path):
    model, data = build()
    with_momentum_zero(model, 0.0)
    start = {n: w.detach().clone() for n, w in weights_of_kept(model, ["seg"]).items()}
    threshold = SoftThreshold(0.7, epochs=2)
    watch = After(threshold)
    options = {"trainer": {"accumulate_grad_batches": 2}}
    fit(model, data, [Pruning(tasks=["seg"]), threshold, watch], tmp_path, 1, **options)
    assert all(torch.equal(w, start[n]) for n, w in weights_of_kept(model, ["seg"]).items())
    # One optimiser step an epoch, so the first of two: the cubic's end.
    assert watch.zeros[0] == watch.zeros[1] == round(0.7 * watch.total)


@pytest.mark.parametrize("budget", [Sparsity(0.9), LayerSparsity(0.9, "uniform")])
def test_with_pruning_the_budget_is_exact(tmp_path, budget):
    model, data = build()
    threshold = SoftThreshold(epochs=2)
    pruning = Pruning(budget, tasks=["seg", "depth"], scorer=Magnitude(), schedule=OneShot(2), batches=1)
    fit(model, data, [threshold, pruning], tmp_path, 3)
    assert threshold.target == 0.9  # of the budget
    kept = weights_of_kept(model, ["seg", "depth"])
    assert zeros(pruning.mask, kept) == round(0.9 * sum(w.numel() for w in kept.values()))
    assert all(not w[~pruning.mask[n]].any() for n, w in kept.items() if n in pruning.mask)


@pytest.mark.parametrize("adapt", [0.0, 0.5, 1.0])
def test_factors_have_mean_1_follow_the_losses_and_are_put_back(tmp_path, adapt):
    model, data = build()
    threshold = SoftThreshold(0.9, epochs=2, adapt=adapt)
    watch = After(threshold)
    losses = []

    class Losses(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append({t: float(v) for t, v in pl_module.latest.items()})

    fit(model, data, [Losses(), Pruning(tasks=["seg", "normal"]), threshold, watch], tmp_path, 3)
    assert model.factors == {} and len(losses) == 6
    if not adapt:
        assert not any(watch.factors)
        return
    average = dict(losses[0])
    for step, (loss, found) in enumerate(zip(losses, watch.factors, strict=True)):
        average = {t: 0.9 * average[t] + 0.1 * loss[t] for t in average}
        rise = {t: (average[t] / losses[0][t]) ** adapt for t in average}
        expected = {t: 2 * r / sum(rise.values()) for t, r in rise.items()}
        assert found == pytest.approx(expected, rel=1e-6), step
        assert np.mean(list(found.values())) == pytest.approx(1.0)
    assert watch.factors[-1]["seg"] != pytest.approx(1.0, abs=1e-6)


def test_a_resumed_training_equals_running_through(tmp_path):
    class Keep(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "part.ckpt")

    def callbacks():
        threshold = SoftThreshold(epochs=3)
        pruning = Pruning(Sparsity(0.8), scorer=Magnitude(), schedule=OneShot(3), batches=1)
        return [threshold, pruning, After(threshold)]

    through, data = build()
    first = callbacks()
    fit(through, data, [*first, Keep()], tmp_path, 4)
    again, data = build()
    second = callbacks()
    fit(again, data, second, tmp_path, 4, ckpt_path=str(tmp_path / "part.ckpt"), weights_only=True)
    assert first[2].step_factors[4:] == second[2].step_factors and first[2].factors[4:] == second[2].factors
    assert first[2].zeros[4:] == second[2].zeros and first[2].thresholds[4:] == second[2].thresholds
    for (name, a), b in zip(through.network.state_dict().items(), again.network.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_no_threshold_no_change(tmp_path):
    """The callback of a sparsity that cuts next to nothing trains nearly the same network."""
    ends = []
    for callbacks in ([], [SoftThreshold(1e-9, epochs=2, adapt=0.0)]):
        model, data = build()
        fit(model, data, [Pruning(), *callbacks], tmp_path, 1)
        ends.append(copy.deepcopy(model.network.state_dict()))
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 1.0}, "target=1.0"),
        ({"target": 0.0}, "target=0.0"),
        ({"epochs": 0}, "epochs=0"),
        ({"rate": -0.1}, "rate=-0.1"),
        ({"adapt": -1.0}, "adapt=-1.0"),
    ],
)
def test_bad_choices_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SoftThreshold(**options)


def test_a_training_without_a_target_is_refused(tmp_path):
    model, data = build()
    for callbacks in ([], [Pruning()], [Pruning(Parameters(20_000), batches=1)]):
        with pytest.raises(ValueError, match="soft thresholds need a target"):
            fit(model, data, [SoftThreshold(), *callbacks], tmp_path, 1)
    with pytest.raises(ValueError, match="BoringModel has no 'factors'"):
        fit(BoringModel(), data, [SoftThreshold(0.5)], tmp_path, 1)
