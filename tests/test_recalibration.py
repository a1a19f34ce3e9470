"""Batch norm's statistics measured anew, against NumPy."""

import copy

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn

from cut.budget import Sparsity
from cut.pruning import Pruning
from cut.recalibration import recalibrate
from tests.test_pruning import build, fit


class Net(nn.Module):
    """Two norms, the second behind the first, and dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.n1, self.drop = nn.BatchNorm2d(3, momentum=0.3), nn.Dropout(0.5)
        self.conv, self.n2 = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=1e-2)
        self.fixed = nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x):
        return {"t": self.fixed(self.n2(self.conv(self.drop(self.n1(x)))))}


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = Net()
    for norm in (model.n1, model.n2):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.num_batches_tracked.fill_(40)
    return model


def pictures():
    g = torch.Generator().manual_seed(1)
    sizes = (4, 4, 2)
    return [{"image": torch.randn(n, 3, 5, 6, generator=g) * (i + 1) + i} for i, n in enumerate(sizes)]


def naive(net: Net, batches) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Mean over batches of each batch's mean and unbiased variance, each norm fed with normalised batches."""
    w = {k: v.detach().double().numpy() for k, v in net.state_dict().items()}
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"n1": [], "n2": []}

    def normed(x, name, eps):
        axes = (0, 2, 3)
        found[name].append((x.mean(axes), x.var(axes, ddof=1)))
        y = (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + eps)
        return y * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]

    for batch in batches:
        x = normed(batch["image"].double().numpy(), "n1", 1e-5)
        x = np.einsum("oi,nihw->nohw", w["conv.weight"][:, :, 0, 0], x) + w["conv.bias"][:, None, None]
        normed(x, "n2", 1e-2)
    return {n: tuple(np.mean([p[i] for p in parts], 0) for i in (0, 1)) for n, parts in found.items()}


def test_statistics_are_the_mean_over_batches(net):
    expected = naive(net, pictures())
    recalibrate(net, pictures())
    for name, (mean, var) in expected.items():
        norm = getattr(net, name)
        np.testing.assert_allclose(norm.running_mean.numpy(), mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(norm.running_var.numpy(), var, rtol=1e-4)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    recalibrate(net, iter(pictures()))  # again, and from an iterator: what was there before counts for nothing
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_modes_momenta_weights_and_randomness_are_put_back(net):
    net.train()
    net.n2.eval()
    net.n2.momentum = None
    modes = {n: m.training for n, m in net.named_modules()}
    weights = {n: p.clone() for n, p in net.named_parameters()}
    random = torch.get_rng_state()
    recalibrate(net, pictures())
    assert torch.equal(torch.get_rng_state(), random)
    assert {n: m.training for n, m in net.named_modules()} == modes
    assert (net.n1.momentum, net.n2.momentum, net.fixed.momentum) == (0.3, None, 0.1)
    assert all(torch.equal(p, weights[n]) and p.grad is None for n, p in net.named_parameters())


def test_modes_are_put_back_after_a_failure(net):
    net.train()
    with pytest.raises(ValueError, match="no network input"):
        recalibrate(net, [*pictures(), {"label": torch.ones(1)}])
    assert net.n1.training and net.drop.training and net.n1.momentum == 0.3


def test_no_batches_are_refused_and_change_nothing(net):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(ValueError, match="no batches"):
        recalibrate(net, [])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_network_without_batch_norm_is_left_alone():
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2, track_running_stats=False))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    recalibrate(net, [])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


class Watch(pl.Callback):
    """The network right after the cut."""

    def on_train_epoch_start(self, trainer, pl_module):
        self.network = copy.deepcopy(pl_module.network)


def test_pruning_measures_the_cut_network(tmp_path):
    model, data = build()
    watch = Watch()
    fit(model, data, [Pruning(Sparsity(0.9), tasks=["seg"], batches=1, recalibrate=2), watch], tmp_path, 1)
    expected = copy.deepcopy(watch.network)
    for module in expected.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.fill_(7)
    recalibrate(expected, data.score_batches(2))
    assert all(torch.equal(v, watch.network.state_dict()[k]) for k, v in expected.state_dict().items())
    with pytest.raises(ValueError, match="recalibrate -1"):
        Pruning(Sparsity(0.9), recalibrate=-1)
