"""Budgets are exact, nested, and honour the floor."""

import itertools

import pytest
import torch

from cut.budget import KeepRatio, Parameters, Size, Sparsity, floor
from cut.fusion import Max, Mean, Vote, Weighted
from cut.scores import Scores


def scores(seed: int = 0, ties: bool = False) -> dict[str, Scores]:
    g = torch.Generator().manual_seed(seed)

    def value(*shape):
        return torch.randn(*shape, generator=g).abs().mul(4).round() if ties else torch.rand(*shape, generator=g)

    return {
        "seg": {"trunk": value(20, 30), "deep": value(10, 20), "seg": value(5, 10)},
        "depth": {"trunk": value(20, 30), "deep": value(10, 20), "depth": value(1, 10)},
        "normal": {"trunk": value(20, 30), "normal": value(3, 10)},
    }


TOTAL = 600 + 200 + 50 + 10 + 30


def zeros(mask) -> int:
    return sum(int((~m).sum()) for m in mask.values())


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.05])
@pytest.mark.parametrize("target", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize(
    "fusion", [Vote(0.0), Vote(0.5), Vote(1.0), Mean(), Max(), Weighted({"seg": 1, "depth": 3, "normal": 2})]
)
def test_sparsity_is_met_exactly(fusion, target, share, ties):
    s = scores(ties=ties)
    front = floor(fusion(s), share, rows=["seg", "depth", "normal"])
    mask = Sparsity(target).mask(s, fusion, Size(TOTAL, 17), front)
    assert zeros(mask) == round(target * TOTAL)
    assert all((mask[n] | ~front[n]).all() for n in front)


def test_all_equal_and_all_zero_scores_meet_the_budget():
    for fill in (torch.ones, torch.zeros):
        s = {t: {n: fill(v.shape) for n, v in per.items()} for t, per in scores().items()}
        assert zeros(Sparsity(0.7).mask(s, Vote(0.5), Size(TOTAL))) == round(0.7 * TOTAL)


@pytest.mark.parametrize("share", [0.0, 0.05])
def test_masks_of_smaller_budgets_are_nested(share):
    s = scores(1)
    front = floor(Vote(0.5)(s), share)
    masks = [Sparsity(t).mask(s, Vote(0.5), Size(TOTAL), front) for t in (0.9, 0.7, 0.5, 0.1)]
    for small, large in itertools.pairwise(masks):
        assert all((large[n] | ~small[n]).all() for n in small)


def test_a_parameter_budget_counts_everything():
    s = scores()
    mask = Parameters(300).mask(s, Vote(0.5), Size(TOTAL, 17))
    assert TOTAL - zeros(mask) + 17 == 300
    assert zeros(Parameters(10_000).mask(s, Vote(0.5), Size(TOTAL, 17))) == 0


def test_unscored_weights_count_but_are_never_cut():
    s = scores()
    mask = Sparsity(0.5).mask(s, Vote(0.5), Size(TOTAL + 100))
    assert zeros(mask) == round(0.5 * (TOTAL + 100))
    with pytest.raises(ValueError, match="only 890 are reached"):
        Sparsity(0.95).mask(s, Vote(0.5), Size(TOTAL + 5000))


def test_what_is_cut_stays_cut():
    s = scores()
    first = Sparsity(0.5).mask(s, Vote(0.5), Size(TOTAL))
    cut = {n: ~m for n, m in first.items()}
    second = Sparsity(0.8).mask(scores(7), Vote(0.5), Size(TOTAL), floor(Vote(0.5)(scores(7)), 0.05), cut)
    assert zeros(second) == round(0.8 * TOTAL)
    assert all((first[n] | ~second[n]).all() for n in first)


def test_the_floor_keeps_its_share_of_every_layer_and_an_input_per_output():
    s = scores()
    front = floor(Vote(0.5)(s), 0.05, rows=["seg"])
    assert {n: int(m.sum()) for n, m in front.items() if n != "seg"} == {
        "trunk": 30,
        "deep": 10,
        "depth": 1,
        "normal": 2,
    }
    assert front["seg"].any(1).all()
    assert floor(Vote(0.5)(s), 0.0) == {}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sparsity(1.0), "sparsity 1.0"),
        (lambda: Sparsity(-0.1), "sparsity -0.1"),
        (lambda: Parameters(0), "parameter budget 0"),
        (lambda: KeepRatio(0.0), "keep ratio 0.0"),
        (lambda: KeepRatio(0.5, votes=0), "votes 0"),
        (lambda: Vote(1.2), "vote share 1.2"),
        (lambda: Weighted({"seg": 0.0}), "must be positive"),
        (lambda: Weighted({"seg": 1.0})(scores()), "no weight for task 'depth'"),
        (lambda: floor(Vote(0.5)(scores()), 2.0), "floor 2.0"),
        (
            lambda: Sparsity(0.99).mask(scores(), Vote(0.5), Size(TOTAL), floor(Vote(0.5)(scores()), 0.3)),
            "the floor needs",
        ),
        (lambda: Parameters(5).mask(scores(), Vote(0.5), Size(TOTAL, 17)), "17 are never cut"),
        (lambda: KeepRatio(0.5).mask(scores(), Vote(0.5), Size(TOTAL), fraction=0.5), "no floor and no steps"),
    ],
)
def test_bad_budgets_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_ties_at_the_reference_threshold_are_kept():
    s = {"a": {"w": torch.tensor([3.0, 2.0, 2.0, 1.0])}}
    assert KeepRatio(0.5, votes=1).mask(s, Vote(0.5), Size(4))["w"].tolist() == [True, True, True, False]
