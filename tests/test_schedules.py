"""Schedules: which share of the budget is cut at which epoch."""

import itertools

import pytest

from cut.schedules import Gradual, Iterative, OneShot, rounds_of

SCHEDULES = [
    OneShot(2),
    Iterative(),
    Iterative(rounds=5, every=2, start=1, final_sparsity=0.75),
    Gradual(),
    Gradual(1, 8, 3),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{type(s).__name__}{vars(s)}")
def test_cuts_only_grow_and_the_last_one_is_the_whole_budget(schedule):
    steps = schedule.steps()
    epochs, shares = list(steps), list(steps.values())
    assert epochs == sorted(set(epochs))
    assert all(a < b for a, b in itertools.pairwise(shares))
    assert shares[0] > 0 and shares[-1] == 1.0


@pytest.mark.parametrize(("rounds", "sparsity"), [(1, 0.5), (3, 0.9), (6, 0.98)])
def test_every_round_of_an_iterative_cut_removes_the_same_share_of_what_is_left(rounds, sparsity):
    left = [1.0]
    for share in Iterative(rounds=rounds, final_sparsity=sparsity).steps().values():
        left.append(1 - share * sparsity)
    removed = [1 - b / a for a, b in itertools.pairwise(left)]
    assert removed == pytest.approx([removed[0]] * rounds)
    assert left[-1] == pytest.approx(1 - sparsity)


def test_a_gradual_cut_follows_the_cubic_with_equal_distances_and_ends_at_its_end():
    steps = Gradual(start=1, end=8, every=3).steps()
    assert list(steps) == [1, 4, 7, 8]
    assert list(steps.values()) == pytest.approx([1 - (1 - i / 4) ** 3 for i in (1, 2, 3, 4)])


@pytest.mark.parametrize(
    ("kind", "options", "told"),
    [
        (OneShot, {"epoch": -1}, "epoch -1; allowed: 0 or later"),
        (Iterative, {"rounds": 0}, "rounds=0"),
        (Iterative, {"every": 0}, "every=0"),
        (Iterative, {"start": -2}, "start=-2"),
        (Iterative, {"final_sparsity": 1.0}, "final_sparsity 1.0; allowed: between 0 and 1"),
        (Iterative, {"final_sparsity": 0.0}, "final_sparsity 0.0"),
        (Gradual, {"start": 4, "end": 3}, "start=4, end=3"),
        (Gradual, {"start": -1}, "start=-1"),
        (Gradual, {"every": 0}, "every=0"),
    ],
)
def test_a_schedule_that_cannot_be_followed_is_refused_with_its_value(kind, options, told):
    with pytest.raises(ValueError, match=told):
        kind(**options)


def test_rounds_to_a_budget_that_removes_nothing_are_rounds_all_the_same():
    assert rounds_of(2, target=0.0) == [0.5, 1.0]
