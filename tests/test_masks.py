"""Masks: applied, measured, silenced."""

import math

import pytest
import torch
from torch import nn

from cut.budget import Parameters, Sparsity
from cut.decomposition import owners, prunable
from cut.masks import (
    apply_mask,
    component_sparsity,
    layer_sparsity,
    make_mask,
    overlap,
    prune,
    silence,
    sparsity,
    task_masks,
)
from cut.scores import sensitivity
from cut.trace import trace
from tests.small_networks import Cnn, trained
from tests.test_reference import LOSSES, batches


@pytest.fixture
def model():
    torch.manual_seed(0)
    return trained(Cnn())


def kept_size(model, dropped=()) -> int:
    return sum(w.numel() for n, w in prunable(model).items() if not any(n.startswith(d) for d in dropped))


@pytest.mark.parametrize(("target", "floor"), [(0.5, 0.05), (0.9, 0.05), (0.95, 0.02)])
def test_prune_meets_the_sparsity_of_the_kept_part(model, target, floor):
    mask = prune(model, batches(), LOSSES, ["seg", "depth"], sparsity=target, floor_share=floor)
    total = kept_size(model, ["heads.normal", "scene", "classify"])
    zeros = sum(int((~mask[n]).sum()) for n in prunable(model) if n in mask)
    assert zeros == round(target * total)
    assert not any(n.startswith(("heads.normal", "scene", "classify")) for n in mask)
    for name, weight in prunable(model).items():
        if name in mask:
            assert not weight[~mask[name]].any()
    used = owners(model, batches()[0], LOSSES, list(LOSSES))
    parts = component_sparsity(model, mask, used, ["seg", "depth"])
    assert parts["kept"] == pytest.approx(target, abs=1 / total)
    whole = kept_size(model)
    assert parts["whole_model_with_dropped_heads"] == pytest.approx((whole - total + zeros) / whole)
    heads = {
        t: sparsity(model, mask, [n for n in prunable(model) if n.startswith(f"heads.{t}")]) for t in ("seg", "depth")
    }
    assert {t: parts[t] for t in heads} == heads


def test_every_output_keeps_an_input_and_every_layer_a_weight(model):
    mask = prune(model, batches(), LOSSES, ["seg", "scene"], sparsity=0.97, floor_share=0.01)
    assert all(mask[n].any() for n in prunable(model) if n in mask)
    assert mask["heads.seg.out.weight"].flatten(1).any(1).all()
    assert mask["classify.weight"].any(1).all()


def test_parameter_budget_counts_norms_and_biases_of_the_kept_part(model):
    data = batches()
    scores = sensitivity(model, data, LOSSES, ["seg"])
    mask = make_mask(model, scores, data[0], LOSSES, ["seg"], budget=Parameters(2500), silent=False)
    kept = {
        n: p.numel()
        for n, p in model.named_parameters()
        if not n.startswith(("heads.depth", "heads.normal", "scene", "classify"))
    }
    assert sum(kept.values()) - sum(int((~m).sum()) for m in mask.values()) == 2500


def test_dead_channels_emit_exactly_zero(model):
    """All weights of some channels are cut: behind their norm they are zero, although the norm has a shift."""
    mask = {n: torch.ones_like(w, dtype=torch.bool) for n, w in prunable(model).items()}
    mask["block1.expand.weight"][:5] = False
    mask["heads.seg.conv.weight"][3] = False
    extended = silence(model, mask, trace(model, batches()[0]))
    assert not extended["block1.norm1.bias"][:5].any() and extended["block1.norm1.bias"][5:].all()
    assert not extended["heads.seg.norm.weight"][3]
    apply_mask(model, extended)
    seen = {}
    model.block1.norm1.register_forward_hook(lambda m, a, out: seen.update(norm=out))
    model.heads["seg"].norm.register_forward_hook(lambda m, a, out: seen.update(head=out))
    model(batches()[0]["image"])
    assert not seen["norm"][:, :5].any() and seen["norm"][:, 5:].any()
    assert not seen["head"][:, 3].any()


def test_a_channel_fed_by_silent_channels_only_is_dead_too():
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.na, self.act = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()
            self.b, self.nb = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.BatchNorm2d(4)
            self.c = nn.Conv2d(4, 2, 1)

        def forward(self, x):
            x = self.nb(self.b(self.act(self.na(self.a(x)))))
            y = x.clone()
            y += 1  # changed on the way: c must not be taken to read nb's channels
            return {"t": self.c(y)}

    model = trained(Chain())
    mask = {n: torch.ones_like(w, dtype=torch.bool) for n, w in prunable(model).items()}
    mask["a.weight"][1] = False
    extended = silence(model, mask, trace(model, (torch.randn(1, 3, 8, 8),)))
    for name in ("a.bias", "na.weight", "na.bias", "b.bias", "nb.weight", "nb.bias"):
        assert extended[name].tolist() == [True, False, True, True], name
    assert "c.bias" not in extended
    assert {n: int((~m).sum()) for n, m in mask.items()} == {"a.weight": 3, "b.weight": 0, "c.weight": 0}


def test_an_in_place_residual_sum_breaks_the_chain():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.n, self.b = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)

        def forward(self, x):
            y = self.n(self.a(x))
            y += x
            return {"t": self.b(y)}

    model = trained(Residual())
    mask = {n: torch.ones_like(w, dtype=torch.bool) for n, w in prunable(model).items()}
    mask["a.weight"][:] = False
    extended = silence(model, mask, trace(model, (torch.randn(1, 3, 8, 8),)))
    assert not extended["n.bias"].any()
    assert "b.bias" not in extended


def test_trace_knows_the_last_layer_of_each_task(model):
    used = owners(model, batches()[0], LOSSES, list(LOSSES))
    last = trace(model, batches()[0]).last_layers(model, used)
    assert last == {
        **{t: f"heads.{t}.out.weight" for t in ("seg", "depth", "normal")},
        "scene": "classify.weight",
    }


def test_overlap_of_task_masks(model):
    scores = sensitivity(model, batches(), LOSSES, ["seg", "depth", "normal"])
    masks = task_masks(scores, 0.2)
    for task, per in scores.items():
        assert sum(int(m.sum()) for m in masks[task].values()) == round(0.2 * sum(s.numel() for s in per.values()))
    found = overlap(masks)
    assert "heads.seg.out.weight" not in found
    stem = found["stem.weight"]
    a, b = (masks[t]["stem.weight"].numpy() for t in ("seg", "depth"))
    assert stem["seg & depth"] == pytest.approx((a & b).sum() / max(1, (a | b).sum()))
    assert 0 <= stem["all"] <= min(v for k, v in stem.items() if k != "all")
    assert overlap({"a": masks["seg"], "b": masks["seg"]})["stem.weight"] == {"a & b": 1.0}


def test_layer_sparsity(model):
    mask = {"stem.weight": torch.zeros(24, 3, 3, 3, dtype=torch.bool)}
    mask["stem.weight"][:6] = True
    assert layer_sparsity(model, mask) == {"stem.weight": 0.75}


def test_a_mask_of_another_model_is_refused_and_nothing_changes(model):
    before = model.stem.weight.clone()
    good = torch.zeros_like(model.stem.weight, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"'nowhere\.weight'"):
        apply_mask(model, {"stem.weight": good, "nowhere.weight": good})
    with pytest.raises(ValueError, match=r"'stem.weight' has shape \(2,\)"):
        apply_mask(model, {"stem.weight": torch.ones(2, dtype=torch.bool)})
    assert torch.equal(model.stem.weight, before)


def test_a_budget_below_the_floor_is_refused(model):
    with pytest.raises(ValueError, match="the floor needs"):
        prune(model, batches(), LOSSES, ["seg"], sparsity=0.99, floor_share=0.05)


def test_the_floor_of_a_later_cut_is_made_of_weights_that_are_left(model):
    """A layer that no gradient reaches any more scores zero throughout; it still keeps some of what it has."""
    data = batches()
    scores = sensitivity(model, data, LOSSES, ["seg"])
    scores["seg"]["block1.expand.weight"] = torch.zeros_like(scores["seg"]["block1.expand.weight"])
    kept = {n: torch.ones_like(s, dtype=torch.bool) for n, s in scores["seg"].items()}
    kept["block1.expand.weight"][:40] = False  # the first by index, which ties would choose
    mask = make_mask(model, scores, data[0], LOSSES, ["seg"], budget=Sparsity(0.9), cut=kept, silent=False)
    floor = math.ceil(0.05 * mask["block1.expand.weight"].numel())
    assert int(mask["block1.expand.weight"].sum()) >= floor
    assert not mask["block1.expand.weight"][:40].any()
