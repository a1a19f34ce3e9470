"""Budgets shared out among layers, budgets in weights, and votes that fall with the sparsity."""

import itertools
import math

import numpy as np
import pytest
import torch

from cut.allocation import LayerSparsity, allocate, densities
from cut.budget import Size, Sparsity, Weights, floor
from cut.fusion import FallingVote, Max, Mean, Vote, Weighted
from cut.pruning import Pruning
from cut.scores import Scores
from tests.test_budget import TOTAL, scores, zeros
from tests.test_pruning import TASKS, build, fit

SHAPES = {n: tuple(s.shape) for per in scores().values() for n, s in per.items()}
FUSIONS = [Vote(0.0), Vote(0.5), Vote(1.0), Mean(), Max(), Weighted({"seg": 1, "depth": 3, "normal": 2})]


def random_problem(seed: int) -> tuple[dict, dict, int, dict, dict]:
    """Sizes, densities, count and bounds that can be met."""
    rng = np.random.default_rng(seed)
    names = [f"layer{i}" for i in range(int(rng.integers(1, 9)))]
    sizes = {n: int(rng.integers(1, 400)) for n in names}
    density = {n: float(rng.lognormal(0, 2)) for n in names}
    least = {n: int(rng.integers(0, sizes[n] // 3 + 1)) for n in names}
    most = {n: int(rng.integers(least[n], sizes[n] + 1)) for n in names}
    count = int(rng.integers(sum(least.values()), sum(most.values()) + 1))
    return sizes, density, count, least, most


def naive_allocation(sizes, density, count, least, most) -> dict[str, float]:
    """The real-valued allocation: fix the layers at a bound, one at a time, and share out the rest in proportion."""
    fixed: dict[str, float] = {}
    while True:
        free = [n for n in sizes if n not in fixed]
        if not free:
            return fixed
        factor = (count - sum(fixed.values())) / sum(density[n] * sizes[n] for n in free)
        wanted = {n: factor * density[n] * sizes[n] for n in free}
        over = sum(max(0.0, v - most[n]) for n, v in wanted.items())
        under = sum(max(0.0, least[n] - v) for n, v in wanted.items())
        hit = (
            {n: most[n] for n, v in wanted.items() if v > most[n]}
            if over >= under
            else {n: least[n] for n, v in wanted.items() if v < least[n]}
        )
        if not hit:
            return fixed | wanted
        fixed |= hit


def test_allocations_are_exact_within_bounds_and_proportional():
    for seed in range(200):
        sizes, density, count, least, most = random_problem(seed)
        counts = allocate(sizes, density, count, least, most)
        assert list(counts) == list(sizes)
        assert sum(counts.values()) == count, seed
        assert all(least[n] <= c <= most[n] for n, c in counts.items()), seed
        ideal = naive_allocation(sizes, density, count, least, most)
        assert all(abs(counts[n] - v) < 1 + 1e-6 for n, v in ideal.items()), seed


def test_more_units_take_none_away_beyond_rounding():
    for seed in range(8):
        sizes, density, _, least, most = random_problem(seed)
        before = None
        for count in range(sum(least.values()), sum(most.values()) + 1, 3):
            counts = allocate(sizes, density, count, least, most)
            assert before is None or all(counts[n] >= before[n] - 1 for n in counts), (seed, count)
            before = counts


def test_the_densities_of_the_rules():
    shapes = {"conv": (64, 32, 3, 3), "depthwise": (64, 1, 5, 5), "linear": (10, 64)}
    assert densities(shapes, "uniform") == {"conv": 1.0, "depthwise": 1.0, "linear": 1.0}
    expected = {"conv": (64 + 32 + 3 + 3) / 18432, "depthwise": (64 + 1 + 5 + 5) / 1600, "linear": 74 / 640}
    assert densities(shapes, "erk") == pytest.approx(expected)


def test_impossible_counts_are_refused():
    sizes, one = {"a": 4, "b": 6}, {"a": 1.0, "b": 1.0}
    for count, least in [(11, {"a": 0, "b": 0}), (3, {"a": 2, "b": 2}), (-1, {"a": 0, "b": 0})]:
        with pytest.raises(ValueError, match=f"cannot keep {count} units"):
            allocate(sizes, one, count, least, sizes)


@pytest.mark.parametrize("rule", ["uniform", "erk"])
@pytest.mark.parametrize("share", [0.0, 0.05])
@pytest.mark.parametrize("target", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("fusion", FUSIONS, ids=lambda f: type(f).__name__)
def test_layer_sparsity_is_exact_and_keeps_the_floor(rule, share, target, fusion):
    for ties in (False, True):
        s = scores(ties=ties)
        front = floor(fusion(s), share, rows=["seg", "depth", "normal"])
        mask = LayerSparsity(target, rule).mask(s, fusion, Size(TOTAL), front)
        assert zeros(mask) == round(target * TOTAL)
        assert all((mask[n] | ~front[n]).all() for n in front)


@pytest.mark.parametrize(
    ("fusion", "share"),
    [*itertools.product(FUSIONS, [0.0]), *itertools.product(FUSIONS[3:], [0.1])],
    ids=lambda f: type(f).__name__,
)
def test_within_a_layer_the_ranking_decides(fusion, share):
    """By full sorting: the floor first, then the best of the layer by fused value.

    With votes of several tasks a floor moves the other units' positions a little, so it is left out there.
    """
    s = scores(3)
    front = floor(fusion(s), share, rows=[]) or {n: torch.zeros(v, dtype=torch.bool) for n, v in SHAPES.items()}
    mask = LayerSparsity(0.6, "erk").mask(s, fusion, Size(TOTAL), front)
    fused = fusion(s).values()
    for name, kept in mask.items():
        order = np.lexsort((fused[name].flatten().numpy(), ~front[name].flatten().numpy()))
        expected = np.zeros(kept.numel(), bool)
        expected[order[: int(kept.sum())]] = True
        assert (kept.flatten().numpy() == expected).all(), name


def test_uniform_gives_every_layer_the_same_sparsity():
    for target in (0.25, 0.5, 0.83, 0.95):
        mask = LayerSparsity(target, "uniform").mask(scores(), Vote(0.5), Size(TOTAL))
        for name, kept in mask.items():
            assert abs(int((~kept).sum()) - target * kept.numel()) <= 1, name


def test_erk_shares_out_by_the_sum_of_sides():
    mask = LayerSparsity(0.95, "erk").mask(scores(), Vote(0.5), Size(TOTAL))
    kept, sides = TOTAL - round(0.95 * TOTAL), sum(sum(s) for s in SHAPES.values())
    for name, shape in SHAPES.items():
        assert sum(shape) / sides * kept < math.prod(shape)  # nothing is full, so the formula holds as it stands
        assert abs(int(mask[name].sum()) - sum(shape) / sides * kept) < 1, name


@pytest.mark.parametrize("rule", ["uniform", "erk"])
@pytest.mark.parametrize("fusion", [Vote(0.5), Mean()], ids=lambda f: type(f).__name__)
def test_steps_with_other_scores_are_exact_and_nested(rule, fusion):
    cut, before = None, None
    for step, fraction in enumerate([0.3, 0.6, 0.9, 1.0]):
        s = scores(step)
        behind = {t: {n: v.masked_fill(cut[n], -1.0) if cut else v for n, v in per.items()} for t, per in s.items()}
        front = floor(fusion(behind), 0.05, rows=["seg"])
        mask = LayerSparsity(0.9, rule).mask(s, fusion, Size(TOTAL), front, cut, fraction)
        assert zeros(mask) == round(fraction * 0.9 * TOTAL)
        assert all((mask[n] | ~front[n]).all() for n in front)
        assert before is None or all((before[n] | ~mask[n]).all() for n in mask)
        before, cut = mask, {n: ~m for n, m in mask.items()}


def test_marks_of_what_is_cut_do_not_turn_a_sum_around():
    """Scores are often far below 1: summed with the -1 of cut units, they would be normalised by a negative number."""
    s = {t: {n: v * 1e-6 for n, v in per.items()} for t, per in scores().items()}
    cut = {n: torch.zeros(shape, dtype=torch.bool) for n, shape in SHAPES.items()}
    cut["trunk"][:, :20] = True
    behind = {t: {n: v.masked_fill(cut[n], -1.0) for n, v in per.items()} for t, per in s.items()}
    for fusion in (Mean(), Max(), Weighted({"seg": 1, "depth": 3, "normal": 2})):
        front = floor(fusion(behind), 0.1)["trunk"]
        free = torch.where(cut["trunk"], 2.0, fusion(s).values()["trunk"])
        assert not (front & cut["trunk"]).any()
        best = free.flatten().argsort()[: int(front.sum())]
        assert front.flatten()[best].float().mean() > 0.7  # the best but for the cut units' share of the norm
        mask = LayerSparsity(0.8).mask(s, fusion, Size(TOTAL), None, cut)["trunk"]
        worst = free.flatten().masked_fill(cut["trunk"].flatten(), -1).argsort(descending=True)
        assert not mask.flatten()[worst[: int((~mask & ~cut["trunk"]).sum())]].any()


def test_layer_sparsity_through_the_trainer(tmp_path):
    model, data = build()
    pruning = Pruning(LayerSparsity(0.9, "uniform"), tasks=["seg", "depth"], floor=0.02, batches=1)
    fit(model, data, [pruning], tmp_path, 1)
    weights = {n: m for n, m in pruning.mask.items() if m.dim() > 1}
    total = sum(m.numel() for m in weights.values())
    assert zeros(weights) == round(0.9 * total)
    for name, kept in weights.items():
        if kept.numel() >= 100:
            assert float((~kept).float().mean()) == pytest.approx(0.9, abs=0.02), name
    assert set(TASKS) - {"seg", "depth"} == {"normal"} and not any("heads.normal" in n for n in weights)


def test_a_budget_of_weights_is_exact():
    s = scores()
    for target, fraction in itertools.product((89, 300, TOTAL), (0.5, 1.0)):
        mask = Weights(target).mask(s, Vote(0.5), Size(TOTAL, 17), floor(Vote(0.5)(s), 0.05), None, fraction)
        assert zeros(mask) == round(fraction * (TOTAL - target))
    assert zeros(Weights(10_000).mask(s, Vote(0.5), Size(TOTAL, 17))) == 0
    # Weights without a score are counted, but stay.
    assert zeros(Weights(300).mask(s, Vote(0.5), Size(TOTAL + 100))) == TOTAL + 100 - 300


def test_a_budget_of_weights_keeps_the_same_as_the_sparsity_that_it_amounts_to():
    s = scores(2)
    ours = Weights(TOTAL - round(0.7 * TOTAL)).mask(s, Vote(0.5), Size(TOTAL))
    theirs = Sparsity(0.7).mask(s, Vote(0.5), Size(TOTAL))
    assert all(torch.equal(m, theirs[n]) for n, m in ours.items())


def test_a_budget_of_weights_is_met_by_a_model_of_one_task(tmp_path):
    model, data = build()
    pruning = Pruning(Weights(40_000), tasks=["depth"], floor=0.02, batches=1)
    fit(model, data, [pruning], tmp_path, 1)
    left = {n: p for n, p in model.network.named_parameters() if n in pruning.mask and p.dim() > 1}
    assert sum(int(pruning.mask[n].sum()) for n in left) == 40_000
    assert all(not p[~pruning.mask[n]].any() for n, p in left.items())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s, f: LayerSparsity(1.0), "sparsity 1.0"),
        (lambda s, f: LayerSparsity(-0.1), "sparsity -0.1"),
        (lambda s, f: LayerSparsity(0.5, "global"), "rule 'global'; allowed: 'uniform', 'erk'"),
        (lambda s, f: LayerSparsity(0.9).mask(s, Vote(0.5), Size(TOTAL), f), "sparsity 0.9: cannot keep .* floor"),
        (lambda s, f: LayerSparsity(0.9).mask(s, Vote(0.5), Size(TOTAL + 5000)), "sparsity 0.9: cannot keep"),
        (lambda s, f: Weights(0), "weight budget 0"),
        (lambda s, f: Weights(80).mask(s, Vote(0.5), Size(TOTAL), f), "a budget of 80 weights .*the floor needs"),
        (lambda s, f: Weights(5).mask(s, Vote(0.5), Size(TOTAL + 100)), "5 weights is out of reach: 100 are never"),
        (lambda s, f: FallingVote(1.1, 0.0), "vote share 1.1"),
        (lambda s, f: FallingVote(1.0, -0.5), "vote share -0.5"),
    ],
)
def test_bad_budgets_are_refused(make, message):
    s = scores()
    with pytest.raises(ValueError, match=message):
        make(s, floor(Vote(0.5)(s), 0.3))


def test_a_falling_vote_is_a_vote_at_each_sparsity():
    s: dict[str, Scores] = scores(5)
    vote = FallingVote(0.9, 0.1)
    for sparsity, share in [(0.0, 0.9), (0.25, 0.7), (0.5, 0.5), (1.0, 0.1), (None, 0.1), (60_000, 0.1)]:
        assert vote.at(sparsity).share == pytest.approx(share)
        ours, theirs = vote.at(sparsity)(s).values(), Vote(share)(s).values()
        assert all(torch.equal(v, theirs[n]) for n, v in ours.items())
    ours, theirs = vote(s).values(), Vote(0.1)(s).values()  # without a sparsity: at the end
    assert all(torch.equal(v, theirs[n]) for n, v in ours.items())
    assert FallingVote(0.0, 1.0).at(0.25).share == 0.25


def test_pruning_takes_a_falling_vote_at_its_own_sparsity(tmp_path):
    target, share, masks = 0.3, 0.7, []
    for fusion in (FallingVote(1.0, 0.0), Vote(share)):
        model, data = build()
        pruning = Pruning(Sparsity(target), fusion=fusion, batches=1)
        fit(model, data, [pruning], tmp_path, 1)
        masks.append(pruning.mask)
    assert all(torch.equal(m, masks[1][n]) for n, m in masks[0].items())
