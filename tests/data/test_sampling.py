from collections import Counter

import pytest
import torch
from torch.utils.data import Dataset

from cut.data import sampling
from cut.data.sampling import PartSampler, SeededSampler


class Numbers(Dataset[int]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: tuple[int, int]) -> int:
        return key[1]


def epoch(sampler: SeededSampler, number: int) -> list[tuple[int, int]]:
    sampler.set_epoch(number)
    return list(sampler)


def test_order_is_a_function_of_seed_and_epoch() -> None:
    data = Numbers(20)
    through = SeededSampler(data, seed=1)
    orders = [epoch(through, e) for e in range(3)]
    assert epoch(SeededSampler(data, seed=1), 2) == orders[2]  # resumed
    assert epoch(SeededSampler(data, seed=2), 2) != orders[2]
    assert len({tuple(index for _, index in order) for order in orders}) == 3
    for e, order in enumerate(orders):
        assert sorted(order) == [(e, index) for index in range(20)]


def test_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    list(SeededSampler(Numbers(9)))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("world", [1, 2, 3])
def test_parts_of_all_processes_are_the_set(monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    data, parts, trains = Numbers(10), [], []
    for rank in range(world):
        monkeypatch.setattr(sampling, "_place", lambda rank=rank: (world, rank))
        part = PartSampler(data)
        assert len(part) == len(list(part))
        parts += [index for _, index in part]
        trains.append(epoch(SeededSampler(data), 3))
    assert Counter(parts) == Counter(range(10))  # each picture once: evaluation is exact
    assert len({len(train) for train in trains}) == 1  # equal steps
    assert {index for train in trains for _, index in train} == set(range(10))


def test_evaluation_is_in_order() -> None:
    assert list(PartSampler(Numbers(4))) == [(0, 0), (0, 1), (0, 2), (0, 3)]
