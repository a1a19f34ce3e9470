"""Weights whose memory is laid out channels last, as fast training on a GPU has them: everything is as it was."""

import copy

import pytest
import torch

from cut import checkpoint
from cut.allocation import LayerSparsity
from cut.budget import Parameters, Sparsity
from cut.compact import compact
from cut.decomposition import prunable
from cut.fusion import Max, Mean, Vote
from cut.limits import MACs
from cut.masks import apply_mask, make_mask, sparsity
from cut.reconstruction import reconstruct
from cut.regrowth import Regrowth
from cut.scores import Magnitude, Random, Sensitivity
from cut.structured import make_unit_mask
from tests.small_networks import Cnn, trained
from tests.test_reference import LOSSES, batches

KEPT = ["seg", "depth"]


@pytest.fixture
def models():
    """A network with channels first, and its twin with channels last."""
    torch.manual_seed(0)
    first = trained(Cnn())
    return first, copy.deepcopy(first).to(memory_format=torch.channels_last)


def channels_last(scores):
    """The same numbers in another memory."""
    return {
        task: {n: s.to(memory_format=torch.channels_last) if s.dim() == 4 else s for n, s in per.items()}
        for task, per in scores.items()
    }


def equal(one, two) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize("fusion", [Vote(0.5), Vote(0.0), Mean(), Max()])
@pytest.mark.parametrize("budget", [Sparsity(0.8), Parameters(2000), LayerSparsity(0.8)])
def test_masks_of_weights_are_the_same(budget, fusion, models):
    scores = Sensitivity()(models[0], batches(), LOSSES, KEPT)
    made = [
        make_mask(model, s, batches()[0], LOSSES, KEPT, fusion=fusion, budget=budget)
        for model, s in zip(models, (scores, channels_last(scores)), strict=True)
    ]
    assert equal(*made)


def test_masks_of_units_are_the_same(models):
    scores = Sensitivity()(models[0], batches(), LOSSES, KEPT)
    made = [
        make_unit_mask(model, s, batches()[0], LOSSES, KEPT, budget=MACs(0.5), inside=Sparsity(0.8))
        for model, s in zip(models, (scores, channels_last(scores)), strict=True)
    ]
    assert equal(*made)


@pytest.mark.parametrize("scorer", [Sensitivity(), Magnitude(), Random(0)])
def test_scores_are_the_same_up_to_rounding(scorer, models):
    found = [scorer(model, batches(), LOSSES, KEPT) for model in models]
    for task, per in found[0].items():
        for name, score in per.items():
            torch.testing.assert_close(found[1][task][name], score, rtol=1e-3, atol=1e-6)


def test_from_scores_to_a_file(models, tmp_path):
    model = models[1]
    scores = Sensitivity()(model, batches(), LOSSES, KEPT)
    mask = make_mask(model, scores, batches()[0], LOSSES, KEPT, budget=Sparsity(0.9))
    dense = copy.deepcopy(model)
    apply_mask(model, mask)
    reconstruct(model, dense, mask, batches())
    before = sparsity(model, mask, mask)
    moved = Regrowth(Magnitude(), end=2)(model, mask, batches(), LOSSES, KEPT, 0.3)
    apply_mask(model, moved)
    assert sparsity(model, moved, moved) == before and not equal(moved, mask)
    assert any(not p.is_contiguous() for p in prunable(model).values())
    image = batches()[0]["image"]
    small = compact(model, KEPT, moved, batches()[0])
    checkpoint.save(small, tmp_path / "small")
    loaded = checkpoint.load(tmp_path / "small", Cnn)
    expected = model.eval()(image)
    for task in KEPT:
        torch.testing.assert_close(small(image)[task], expected[task], rtol=1e-4, atol=1e-5)
        assert torch.equal(loaded(image)[task], small(image)[task])
