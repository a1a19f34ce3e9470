"""Reconstruction: the fit is least squares under the mask, in the order of the forward pass."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, ScaledStdConv2d
from torch import nn

from cut.budget import Sparsity
from cut.decomposition import prunable
from cut.limits import MACs
from cut.masks import apply_mask
from cut.pruning import Pruning
from cut.reconstruction import _squares, fit, fit_large, reconstruct
from tests.test_pruning import build
from tests.test_pruning import fit as train
from tests.test_structured import FAST, SLOW, network_of


class Small(nn.Module):
    """Strided, grouped and plain convolutions, a norm, a linear layer."""

    def __init__(self, width=8):
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=2, dilation=2, groups=width)
        self.last = nn.Conv2d(width, 4, 1)
        self.line = nn.Linear(4, 2)

    def forward(self, x):
        x = self.last(F.relu(self.depthwise(F.relu(self.norm(self.first(x))))))
        return {"a": x, "b": self.line(x.mean((2, 3)))}


def cut_pair(share=0.5):
    torch.manual_seed(0)
    dense = Small().eval()
    dense.norm.momentum = 1.0
    with torch.no_grad():
        dense.train()(torch.cat([b["image"] for b in batches()]))
    dense.eval()
    weights = {n: p for n, p in dense.named_parameters() if n.endswith("weight") and "norm" not in n}
    mask = {n: torch.rand_like(p) > share for n, p in weights.items()}
    pruned = copy.deepcopy(dense)
    apply_mask(pruned, mask)
    return dense, pruned, mask


def batches(n=3):
    generator = torch.Generator().manual_seed(1)
    coarse = [torch.randn(4, 3, 6, 8, generator=generator) for _ in range(n)]
    return [{"image": F.interpolate(c, (12, 16), mode="bilinear")} for c in coarse]


def test_fit_equals_numpys_least_squares_row_by_row():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(6, 200)), rng.normal(size=(3, 6))
    y = w @ x
    kept = rng.random((3, 6)) > 0.4
    found = fit(x @ x.T, y @ x.T, kept, np.zeros_like(w), ridge=0.0)
    for row in range(3):
        chosen = np.flatnonzero(kept[row])
        expected = np.linalg.lstsq(x[chosen].T, y[row], rcond=None)[0]
        np.testing.assert_allclose(found[row, chosen], expected, rtol=1e-9)
        assert not found[row][~kept[row]].any()


def test_a_strong_pull_leaves_the_weights():
    rng = np.random.default_rng(0)
    x, old = rng.normal(size=(5, 50)), rng.normal(size=(2, 5))
    kept = np.ones((2, 5), bool)
    np.testing.assert_allclose(fit(x @ x.T, 0 * old, kept, old, ridge=1e9), old, rtol=1e-6)


def test_without_a_cut_nothing_but_the_norms_changes():
    dense, _, mask = cut_pair()
    same = copy.deepcopy(dense)
    reconstruct(same, dense, {n: torch.ones_like(m) for n, m in mask.items()}, batches(), ridge=1e-6)
    torch.testing.assert_close(same.first.weight, dense.first.weight, rtol=1e-3, atol=1e-4)


def test_every_layer_is_the_least_squares_fit_given_the_layers_before_it():
    dense, pruned, mask = cut_pair()
    reconstruct(pruned, dense, mask, batches(), ridge=1e-9)
    image = torch.cat([b["image"] for b in batches()])
    with torch.no_grad():
        # The depthwise layer, spelled out: its input is the fitted network's, its target the dense layer's output.
        x = F.relu(pruned.norm(pruned.first(image)))
        y = dense.depthwise(F.relu(dense.norm(dense.first(image))))
        for channel in range(8):
            columns = F.unfold(x[:, channel : channel + 1], 3, dilation=2, padding=2).transpose(0, 1).flatten(1)
            chosen = mask["depthwise.weight"][channel].flatten()
            target = (y[:, channel] - dense.depthwise.bias[channel]).flatten()
            expected = torch.linalg.lstsq(columns[chosen].double().T, target.double()[:, None]).solution[:, 0]
            found = pruned.depthwise.weight[channel].flatten()[chosen].double()
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "layer",
    [
        Conv2dSame(3, 5, 3, stride=2),
        Conv2dSame(3, 5, 5, stride=2, dilation=2, bias=False),
        nn.Conv2d(3, 5, 3, padding="same", dilation=2),
        nn.Conv2d(3, 5, (2, 4), padding="same"),
        nn.Conv2d(3, 5, 3, padding="valid"),
        nn.Conv2d(3, 5, 3, stride=2, padding=(1, 2), padding_mode="reflect"),
        nn.Conv2d(3, 5, 3, padding=2, padding_mode="circular"),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(12, 16), (11, 13)])
def test_every_padding_is_fitted_as_the_layer_pads(layer, size):
    # A layer's own weights give its outputs exactly, so from any start the fit must find those that are kept.
    dense, pruned = nn.Sequential(copy.deepcopy(layer)), nn.Sequential(copy.deepcopy(layer))
    nn.init.zeros_(pruned[0].weight)
    image = torch.randn(6, 3, *size, generator=torch.Generator().manual_seed(0))
    mask = {"0.weight": torch.ones_like(layer.weight, dtype=torch.bool)}
    reconstruct(pruned, dense, mask, [{"image": image}], ridge=1e-9)
    torch.testing.assert_close(pruned[0].weight, dense[0].weight, rtol=1e-3, atol=1e-4)


def test_a_layer_that_does_more_than_multiply_is_refused_by_name():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), ScaledStdConv2d(4, 4, 3, padding=1))
    mask = {f"{i}.weight": torch.ones_like(network[i].weight, dtype=torch.bool) for i in range(2)}
    with pytest.raises(ValueError, match=r"'1', a ScaledStdConv2d.*allowed: Conv2d, Conv2dSame and Linear"):
        reconstruct(network, copy.deepcopy(network), mask, batches())


def test_a_layer_that_is_not_in_the_mask_need_not_be_fitted():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), ScaledStdConv2d(4, 4, 3, padding=1))
    before = network[1].weight.detach().clone()
    mask = {"0.weight": torch.tensor([True, True, False]).expand(4, 3).reshape(4, 3, 1, 1)}
    dense = copy.deepcopy(network)
    apply_mask(network, mask)
    start = network[0].weight.detach().clone()
    reconstruct(network, dense, mask, batches())
    assert torch.equal(network[1].weight, before) and not torch.equal(network[0].weight, start)


def standardised(task):
    """A model whose head of one task has a weight-standardised convolution, and data."""
    model, data = build()
    join = model.network.heads[task].join
    last = max(i for i, m in enumerate(join) if isinstance(m, nn.Conv2d))
    join[last] = ScaledStdConv2d(join[last].in_channels, join[last].out_channels, 1)
    return model, data, f"heads.{task}.join.{last}"


@pytest.mark.parametrize("budget", [Sparsity(0.6), MACs(0.6)], ids=["weights", "channels"])
def test_under_the_callback_the_heads_that_are_kept_must_be_fittable_and_no_others(budget, tmp_path):
    def pruning():
        units = "channels" if isinstance(budget, MACs) else "weights"
        return Pruning(budget, ["seg", "depth"], batches=2, reconstruct=1, units=units)

    model, data, path = standardised("normal")
    cut = pruning()
    train(model, data, [cut], tmp_path, 1)
    assert cut.mask and not any(n.startswith("heads.normal") for n in cut.mask)
    assert model.network.active == ["seg", "depth"]

    model, data, path = standardised("depth")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"{path}', a ScaledStdConv2d.* allowed: Conv2d"):
        train(model, data, [pruning()], tmp_path, 1)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items()), "before any training"
    assert model.network.active == ["seg", "depth"]


def test_cut_weights_stay_zero_and_the_outputs_come_closer():
    dense, pruned, mask = cut_pair()
    image = torch.cat([b["image"] for b in batches()])
    with torch.no_grad():
        before = {t: float((o - dense(image)[t]).square().mean()) for t, o in pruned(image).items()}
    reconstruct(pruned, dense, mask, batches())
    for name, kept in mask.items():
        assert not dict(pruned.named_parameters())[name].detach()[~kept].any()
    with torch.no_grad():
        after = {t: float((o - dense(image)[t]).square().mean()) for t, o in pruned(image).items()}
    assert all(after[t] < 0.7 * before[t] for t in after)


@pytest.mark.parametrize("calibrated", [True, False])
def test_norms_give_the_mean_and_variance_that_they_gave(calibrated):
    dense, pruned, mask = cut_pair()
    if not calibrated:  # a network whose running statistics are not those of its data
        for net in (dense, pruned):
            net.norm.running_mean.fill_(0.3)
            net.norm.running_var.fill_(0.7)
    reconstruct(pruned, dense, mask, batches())
    image = torch.cat([b["image"] for b in batches()])
    with torch.no_grad():
        wanted, found = (net.norm(net.first(image)).numpy() for net in (dense, pruned))
    np.testing.assert_allclose(found.mean((0, 2, 3)), wanted.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.std((0, 2, 3)), wanted.std((0, 2, 3)), rtol=1e-2)


def test_modes_are_put_back_and_the_dense_network_is_not_changed():
    dense, pruned, mask = cut_pair()
    pruned.train()
    pruned.norm.eval()
    state = copy.deepcopy(dense.state_dict())
    reconstruct(pruned, dense, mask, batches())
    assert pruned.training and not pruned.norm.training and not dense.training
    assert all(torch.equal(v, dense.state_dict()[k]) for k, v in state.items())
    assert not pruned.first._forward_pre_hooks and not dense.first._forward_hooks


@pytest.mark.parametrize(("given", "message"), [({"ridge": -1.0}, "ridge"), ({"batches": []}, "no batches")])
def test_bad_input_is_refused(given, message):
    dense, pruned, mask = cut_pair()
    with pytest.raises(ValueError, match=message):
        reconstruct(pruned, dense, mask, **{"batches": batches(), **given})


def test_large_layers_are_fitted_as_well_as_by_solving_the_equations():
    rng = np.random.default_rng(0)
    inputs = np.maximum(rng.standard_normal((600, 20)) @ rng.standard_normal((20, 90)), 0)
    inputs += 0.3 * rng.standard_normal((600, 90))
    wanted = rng.standard_normal((7, 90))
    outputs, kept = inputs @ wanted.T, rng.random((7, 90)) < 0.4
    kept[3] = False
    arrays = (inputs.T @ inputs, outputs.T @ inputs, kept, wanted * kept)
    exact = fit(*arrays, 1e-2)
    tensors = [torch.from_numpy(a) if a.dtype == bool else torch.from_numpy(a).float() for a in arrays]
    found = fit_large(*tensors, 1e-2).numpy()
    assert (found[~kept] == 0).all() and found.dtype == np.float32

    def error(weights):
        return ((inputs @ weights.T - outputs) ** 2)[:, kept.any(1)].mean()

    assert error(exact) < 0.5 * error(wanted * kept), "there is something to fit"
    assert error(found) == pytest.approx(error(exact), rel=1e-3)


def test_a_network_is_fitted_alike_by_both(monkeypatch):
    results = []
    for direct, few in ((10**6, 0), (0, 0), (0, 10**6)):
        monkeypatch.setattr("cut.reconstruction.DIRECT", direct)
        monkeypatch.setattr("cut.reconstruction.FEW", few)
        dense, pruned, mask = cut_pair()
        reconstruct(pruned, dense, mask, batches())
        with torch.no_grad():
            results.append(pruned(batches()[0]["image"]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(results[0], results[2])


def test_rows_that_keep_the_same_inputs_are_solved_together_and_alike(monkeypatch):
    rng = np.random.default_rng(0)
    inputs, start = rng.standard_normal((60, 12)), rng.standard_normal((9, 12))
    kept = np.tile(rng.random(12) < 0.5, (9, 1))
    kept[[2, 5]] = False
    kept[7] = ~kept[0]
    arrays = (inputs.T @ inputs, rng.standard_normal((9, 12)), kept, start)
    solve, calls = np.linalg.solve, []
    monkeypatch.setattr(np.linalg, "solve", lambda *args: calls.append(0) or solve(*args))
    together = fit(*arrays, 1e-2)
    assert len(calls) == 2
    alone = [fit(arrays[0], *(a[row : row + 1] for a in arrays[1:]), 1e-2)[0] for row in range(9)]
    np.testing.assert_allclose(together, alone, rtol=1e-9)


def test_inputs_that_no_row_uses_change_nothing_but_the_strength_of_the_pull():
    torch.manual_seed(0)
    columns, used = torch.randn(1, 6, 40), torch.tensor([[True, False, True, True, False, True]])
    found, whole = _squares(columns, used)[0], (columns @ columns.transpose(1, 2))[0]
    both = used[0, :, None] & used[0] | torch.eye(6, dtype=torch.bool)
    torch.testing.assert_close(found, whole * both)
    assert torch.equal(_squares(columns, torch.ones(1, 6, dtype=torch.bool))[0], whole)


# Layers of 4,608 inputs take a minute; timm's own tiny models and one with TensorFlow's padding do not.
QUICK = ["mobilenetv3_small_100", "tf_mobilenetv3_small_minimal_100", "test_byobnet", "test_convnext", "test_vit"]
LONG = [b for b in (*FAST, *SLOW) if b not in QUICK]


@pytest.mark.parametrize("backbone", [*QUICK, *(pytest.param(b, marks=pytest.mark.slow) for b in LONG)])
def test_every_backbone_is_fitted(backbone):
    dense, batch, _ = network_of(backbone)
    pruned, generator = copy.deepcopy(dense), torch.Generator().manual_seed(3)
    image = torch.randn(32, *batch["image"].shape[1:], generator=generator)
    mask = {n: torch.rand(p.shape, generator=generator) > 0.5 for n, p in prunable(dense).items()}
    apply_mask(pruned, mask)

    @torch.no_grad()
    def far():
        return sum(
            float((o - w).square().mean()) for o, w in zip(pruned(image).values(), dense(image).values(), strict=True)
        )

    before = far()
    reconstruct(pruned, dense, mask, [{"image": image}])
    assert far() < 0.5 * before
    assert all(not dict(pruned.named_parameters())[n][~kept].any() for n, kept in mask.items())
