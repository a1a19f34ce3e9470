"""Exact selection against full sorting, and vote share against voting in NumPy."""

import itertools
import math

import numpy as np
import pytest
import torch

import cut.selection
from cut.fusion import Ranking, Vote, percentiles
from cut.selection import best, best_per_layer


def draw(kind: int, size: int, g: torch.Generator) -> torch.Tensor:
    """Scores of every nature: spread, tied, all zero, heavy-tailed, signed, half zero."""
    x = torch.randn(size, generator=g)
    return [x.abs(), (x * 3).round().abs(), torch.zeros(size), x.abs() ** 6, x, x.clamp_min(0)][kind]


def random_scores(seed: int) -> tuple[Ranking, torch.Generator]:
    """1 to 5 tasks with private heads of different sizes; one task skips a shared layer."""
    g = torch.Generator().manual_seed(seed)
    integer = lambda high: int(torch.randint(high, (1,), generator=g))  # noqa: E731
    tasks = 1 + integer(5)
    scores = {
        f"t{i}": {
            "s0": draw(integer(6), 50, g).view(5, 10),
            "s1": draw(integer(6), 37, g),
            f"h{i}": draw(integer(6), 1 + integer(30), g),
        }
        for i in range(tasks)
    }
    if tasks > 2:
        del scores["t0"]["s1"]
    return Ranking(scores, float(torch.rand(1, generator=g))), g


def sorted_best(ranking: Ranking, count: int, front=None, back=None) -> dict[str, torch.Tensor]:
    """The best units by sorting all fused values."""
    values = {n: v.clone() for n, v in ranking.values().items()}
    for name, value in values.items():
        if front:
            value[front[name]] = -1
        if back:
            value[back[name]] = 9
    flat = torch.cat([v.flatten() for v in values.values()])
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[flat.sort(stable=True).indices[:count]] = True
    return {
        n: m.view(v.shape)
        for (n, v), m in zip(values.items(), mask.split([v.numel() for v in values.values()]), strict=True)
    }


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("seed", range(25))
def test_selection_equals_full_sorting(seed, sampled, monkeypatch):
    monkeypatch.setattr(cut.selection, "_SAMPLE", 1 if sampled else 1 << 20)
    ranking, g = random_scores(seed)
    total = sum(v.numel() for v in ranking.values().values())
    for count in (0, 1, total // 10, total // 2, total - 1, total):
        assert equal(best(ranking, count), sorted_best(ranking, count))
    front = {n: torch.rand(v.shape, generator=g) < 0.1 for n, v in ranking.values().items()}
    back = {n: (torch.rand(v.shape, generator=g) < 0.2) & ~front[n] for n, v in ranking.values().items()}
    for count in (total // 3, total // 2):
        assert equal(best(ranking, count, front, back), sorted_best(ranking, count, front, back))


@pytest.mark.parametrize("seed", range(10))
def test_best_per_layer_equals_sorting_within_each_layer(seed):
    ranking, _ = random_scores(seed)
    values = ranking.values()
    counts = {n: max(1, v.numel() // 4) for n, v in values.items()}
    for name, mask in best_per_layer(ranking, counts).items():
        expected = torch.zeros(values[name].numel(), dtype=torch.bool)
        expected[values[name].flatten().sort(stable=True).indices[: counts[name]]] = True
        assert torch.equal(mask.flatten(), expected)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.51, 1.0])
@pytest.mark.parametrize("seed", range(8))
def test_cutting_the_fused_ranking_is_voting(seed, share):
    """Fused <= r is what at least k tasks keep at ratio r, also where tasks use different numbers of units."""
    ranking, _ = random_scores(seed)
    ranking = Ranking(ranking.scores, share)
    ranks = {}
    for task, scores in ranking.scores.items():
        flat = np.concatenate([s.numpy().ravel() for s in scores.values()])
        position = np.array([(flat >= s).sum() for s in flat])  # ties share the worse position
        parts = np.split(position, np.cumsum([s.numel() for s in scores.values()])[:-1])
        ranks[task] = {n: (p.reshape(s.shape), len(flat)) for (n, s), p in zip(scores.items(), parts, strict=True)}
    fused = ranking.values()
    for r in (0.1, 0.37, 0.5, 0.9):
        for name, value in fused.items():
            users = [t for t in ranking.scores if name in ranking.scores[t]]
            votes = sum((ranks[t][name][0] <= np.floor(r * ranks[t][name][1] + 1e-9)).astype(int) for t in users)
            needed = max(1, math.ceil(share * len(users) - 1e-9))
            assert np.array_equal((value <= r + 1e-12).numpy(), votes >= needed)


def test_smaller_budgets_are_nested():
    ranking, _ = random_scores(3)
    total = sum(v.numel() for v in ranking.values().values())
    masks = [best(ranking, c) for c in range(0, total + 1, 7)]
    for small, large in itertools.pairwise(masks):
        assert all((large[n] | ~small[n]).all() for n in small)


def test_the_order_of_tasks_does_not_matter():
    ranking, _ = random_scores(11)
    other = Ranking(dict(reversed(ranking.scores.items())), ranking.share)
    assert equal(best(ranking, 40), best(other, 40))


def test_all_equal_scores_are_cut_by_index():
    ranking = Vote(0.5)({"a": {"w": torch.ones(10)}, "b": {"w": torch.ones(10)}})
    assert best(ranking, 4)["w"].tolist() == [True] * 4 + [False] * 6


def test_zero_scores_take_the_worst_rank():
    q = percentiles({"w": torch.tensor([0.0, 2.0, 0.0, 1.0])})["w"]
    assert q.tolist() == [1.0, 0.25, 1.0, 0.5]


def test_too_few_or_too_many_units_are_refused():
    ranking = Ranking({"a": {"w": torch.arange(4.0)}})
    with pytest.raises(ValueError, match="cannot keep 5 units"):
        best(ranking, 5)
    with pytest.raises(ValueError, match="the floor keeps 2"):
        best(ranking, 1, front={"w": torch.tensor([True, True, False, False])})


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match=r"task 'a', parameter 'w'"):
        Ranking({"a": {"w": torch.tensor([1.0, float("nan")])}})


def test_a_large_ranking_equals_sorting():
    """Large enough for several chunks and for the sampled bisection."""
    g = torch.Generator().manual_seed(0)
    shared = 1 << 19
    scores = {
        t: {"s": torch.randn(shared, generator=g).abs(), f"h{t}": torch.randn(5000, generator=g).abs() / 7}
        for t in "abc"
    }
    ranking = Vote(0.5)(scores)
    for count in (5_000, 100_000):
        assert equal(best(ranking, count), sorted_best(ranking, count))
