"""Limits: exact counts, the largest model that meets them, nested, rounded, capped."""

import re

import pytest
import torch

from cut.budget import Parameters, Sparsity, Weights
from cut.checkpoint import save
from cut.compact import compact
from cut.cost import cost
from cut.fusion import Ranking
from cut.limits import Bytes, MACs, Together, most_units
from cut.masks import apply_mask
from cut.removal import without
from cut.selection import best
from cut.unitcost import UnitCost
from cut.units import find_groups, weight_mask
from tests.small_networks import Cnn, Vit, trained
from tests.test_units import Grouped, choice, image


class Threes(torch.nn.Module):
    """A convolution in eight groups of three channels."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 24, 3, padding=1)
        self.groups = torch.nn.Conv2d(24, 24, 3, padding=1, groups=8)
        self.head = torch.nn.Conv2d(24, 2, 1)

    def forward(self, x):
        return {"a": self.head(self.groups(self.stem(x).relu()).relu())}


def size_of(make):
    return 8 if make is Grouped else 32


@pytest.fixture(scope="module", params=[Cnn, Grouped, Vit])
def counted(request):
    network, picture = trained(request.param()), image(size_of(request.param))
    groups = find_groups(network, picture)
    return network, picture, UnitCost(network, groups, picture)


def random_ranking(groups, tasks=("a", "b"), seed=0):
    g = torch.Generator().manual_seed(seed)
    return Ranking({t: {q.name: torch.rand(q.units, generator=g) for q in groups} for t in tasks}, 0.5)


def numbers(kept):
    return sum(int(k.sum()) for k in kept.values())


@pytest.mark.parametrize("seed", range(3))
def test_counts_equal_those_of_the_network_without_the_units(counted, seed):
    network, picture, units = counted
    kept = choice(units.groups, 0.6, seed)
    small = without(network, units.groups, kept)
    found, true = units.amounts(kept), cost(small, picture)
    assert (found["parameters"], found["macs"]) == (true.params, true.macs)
    assert found["bytes"] == sum(v.numel() * v.itemsize for v in small.state_dict().values())
    assert units.dense["macs"] == cost(network, picture).macs


def test_compact_network_is_what_was_counted(counted):
    network, picture, units = counted
    kept = choice(units.groups, 0.5, 7)
    small = compact(network, list(network(picture)), weight_mask(network, units.groups, kept), picture)
    assert cost(small, picture).params == units.amounts(kept)["parameters"]


@pytest.mark.parametrize("budget", [MACs(0.6), Parameters(9000), Weights(9000), Sparsity(0.4), Bytes(0.7)])
def test_one_more_unit_would_break_the_limit(budget):
    network = trained(Cnn())
    units = UnitCost(network, find_groups(network, image()), image())
    ranking = random_ranking(units.groups)
    ((measure, most),) = budget.limits(units).items()
    kept = most_units(ranking, units, {measure: most})
    assert torch.equal(*(torch.cat([m[n] for n in sorted(m)]) for m in (kept, best(ranking, numbers(kept)))))
    assert units.amounts(kept)[measure] <= most < units.amounts(best(ranking, numbers(kept) + 1))[measure]


def test_the_smallest_of_several_limits_holds_and_smaller_ones_nest():
    network = trained(Cnn())
    units = UnitCost(network, find_groups(network, image()), image())
    ranking = random_ranking(units.groups)
    kept = [
        most_units(ranking, units, Together([MACs(m), Parameters(p)]).limits(units))
        for m, p in ((0.7, 9999), (0.4, 8000), (0.4, 5000))
    ]
    for small, large in zip(kept[1:], kept, strict=False):
        assert all((large[n] | ~small[n]).all() for n in small)
    assert units.amounts(kept[1])["macs"] <= 0.4 * units.dense["macs"]
    assert units.amounts(kept[2])["parameters"] <= 5000


def test_bytes_are_those_of_the_file(tmp_path):
    from cut.checkpoint import save

    network = trained(Cnn())
    units = UnitCost(network, find_groups(network, image()), image())
    target = 0.6 * save(network, tmp_path / "dense", sparse=False)
    kept = most_units(random_ranking(units.groups), units, Bytes(target).limits(units))
    size = save(without(network, units.groups, kept), tmp_path / "small", sparse=False)
    assert 0.97 * target < size <= target


@pytest.mark.parametrize("multiple", [4, 8])
def test_counts_are_rounded_to_multiples_and_the_limit_still_holds(multiple):
    network = trained(Cnn())
    units = UnitCost(network, find_groups(network, image()), image())
    limits = MACs(0.5).limits(units)
    kept = most_units(random_ranking(units.groups), units, limits, multiple=multiple)
    assert units.amounts(kept)["macs"] <= limits["macs"]
    assert all(int(k.sum()) % multiple == 0 or k.all() for k in kept.values())


def test_units_wider_than_a_channel_are_rounded_by_their_width():
    network = trained(Grouped())
    units = UnitCost(network, find_groups(network, image(8)), image(8))
    kept = most_units(random_ranking(units.groups), units, MACs(0.7).limits(units), multiple=8)
    assert int(kept["a"].sum()) in (2, 4), "two groups of four channels are a multiple of eight"


@pytest.mark.parametrize("multiple", [4, 8, 16])
def test_a_width_that_does_not_divide_the_multiple_is_rounded_too(multiple):
    """Eight groups of three channels: 24 is the only multiple of 8 or 16 that there is, 12 one of 4."""
    network = trained(Threes())
    units = UnitCost(network, find_groups(network, image(8)), image(8))
    (wide,) = [g for g in units.groups if g.width == 3]
    for share in (0.3, 0.5, 0.8):
        kept = most_units(random_ranking(units.groups), units, MACs(share).limits(units), multiple=multiple)
        left = int(kept[wide.name].sum()) * wide.width
        assert left % multiple == 0 or left == 24


def test_a_budget_of_bytes_out_of_reach_tells_sizes_of_files(tmp_path):
    network = trained(Cnn())
    units = UnitCost(network, find_groups(network, image()), image())
    front = {g.name: torch.ones(g.units, dtype=torch.bool) for g in units.groups}
    units.facts = 100
    need = re.escape(f"{save(network, tmp_path / 'm', sparse=False) + units.facts:.4g}")
    with pytest.raises(ValueError, match=rf"a budget of 500 bytes is out of reach.* need {need} \(100\.0%"):
        most_units(random_ranking(units.groups), units, Bytes(500).limits(units), front=front)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 0.0, -1.0])
def test_budgets_are_finite_and_above_nothing(number):
    for make in (MACs, Bytes, Parameters):
        with pytest.raises(ValueError, match="allowed"):
            make(number)


def test_floor_stays_and_what_is_cut_never_comes_back():
    network = trained(Cnn())
    units = UnitCost(network, find_groups(network, image()), image())
    front = {g.name: torch.arange(g.units) == g.units - 1 for g in units.groups}
    back = {g.name: torch.arange(g.units) == 0 for g in units.groups}
    kept = most_units(random_ranking(units.groups), units, MACs(0.4).limits(units), front=front, back=back)
    assert all(k[-1] and not k[0] for k in kept.values())
    everything = most_units(random_ranking(units.groups), units, {"macs": 1e12}, back=back)
    assert all(k[1:].all() and not k[0] for k in everything.values())


def test_limits_out_of_reach_say_what_is_reached():
    network = trained(Cnn())
    units = UnitCost(network, find_groups(network, image()), image())
    front = {g.name: torch.ones(g.units, dtype=torch.bool) for g in units.groups}
    with pytest.raises(ValueError, match=r"out of reach.*100.0%"):
        most_units(random_ranking(units.groups), units, MACs(0.4).limits(units), front=front)


@pytest.mark.parametrize("make", [MACs, Bytes])
def test_only_units_budgets_refuse_masks_over_weights(make):
    from cut.budget import Size
    from cut.fusion import Vote

    with pytest.raises(ValueError, match="units='channels'"):
        make(0.5).mask({"a": {"w": torch.rand(4)}}, Vote(), Size(4))
    with pytest.raises(ValueError, match="above 0"):
        make(0)
    with pytest.raises(ValueError, match="at least one of"):
        Together([])


def test_masks_zero_what_is_counted_as_gone(counted):
    network, _, units = counted
    kept = choice(units.groups, 0.5, 2)
    mask = weight_mask(network, units.groups, kept)
    apply_mask(network, {n: torch.ones_like(m) for n, m in mask.items()})
    left = sum(int(m.sum()) for m in mask.values()) + sum(
        p.numel() for n, p in network.named_parameters() if n not in mask
    )
    assert left == units.amounts(kept)["parameters"]
