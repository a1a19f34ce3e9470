"""The loader's bench: its set is a set, workers are compared with this process, the line says what was measured."""

from pathlib import Path

import pytest

from cut.data.augmentation import Augmentation
from cut.data.check import check
from experiments import bench, loading

SIZE = (96, 128)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return loading.write_set(tmp_path_factory.mktemp("loading"), files=10, listed=40, size=SIZE)


def test_the_synthetic_set_is_a_good_one(root):
    report = check(root)
    assert report.wrong == [] and report.size == SIZE and report.pictures == {"train": 39, "val": 1, "test": 1}


def test_every_pass_is_timed_and_workers_give_the_same(root):
    small = Augmentation(scale=(0.5, 1.5), crop=(64, 64), pad=True, uniform=True)
    rate = loading.measure(root, workers=1, passes=2, augmentation=small)
    assert rate.same and len(rate.per_second) == 2 and min(rate.per_second) > 0
    assert min(rate.per_second) <= rate.median <= max(rate.per_second)
    assert rate.stages.keys() == {"decode", "zoom", "labels", "all"} and min(rate.stages.values()) > 0
    assert 0 < rate.processor < 1000


@pytest.mark.parametrize(("rates", "same", "ok"), [((61, 70, 59), True, True), ((59, 59, 99), True, False)])
def test_the_line_is_the_median_of_the_passes(monkeypatch, rates, same, ok):
    found = loading.Rate(rates, 30.0, {"decode": 19.0, "zoom": 3.0, "labels": 3.0, "all": 25.0}, same)
    monkeypatch.setattr(loading, "write_set", lambda path: path)
    monkeypatch.setattr(loading, "measure", lambda path: found)
    line = bench.MEASURES["loader_rate"]()
    assert line["value"] == sorted(rates)[1] and line["ok"] == ok and line["target"] == ">= 60"
    assert "30.0 ms of processor time a picture in all, 25.0 in one process (decode 19.0" in line["detail"]
