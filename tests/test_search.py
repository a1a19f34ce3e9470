import json

import pytest

from cut.search import Reading, Target, TooSlowError, search


class Machine:
    """A fake clock: latency as a function of density, and a list of the models that were made."""

    def __init__(self, curve, noise=0.0):
        self.curve, self.noise, self.made = curve, noise, []

    def __call__(self, density):
        self.made.append(density)
        wobble = 1 + self.noise * (-1) ** len(self.made)
        value = self.curve(density) * wobble
        return Reading(value, 0.95 * value, 1.05 * value)


CURVES = {
    "even": lambda d: 40 * d,
    "with a floor": lambda d: 6 + 34 * d,
    "steep at the end": lambda d: 40 * d**3,
    "flat at the end": lambda d: 40 * d**0.3,
    "steps of 8 channels": lambda d: 5 + 35 * round(d * 16) / 16,
}


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("ms", [38.0, 20.0, 14.0])
def test_the_largest_model_within_the_target(name, ms):
    machine = Machine(CURVES[name])
    found = search(machine, Target(ms), progress=False, most=20)
    assert found.reading.value <= ms
    grid = [i / 1000 for i in range(20, 1001)]
    best = max(d for d in grid if CURVES[name](d) <= ms)
    # Either the density is known to the resolution, or the model uses the target up to the tolerance.
    assert found.density >= best - 0.006 or found.reading.value >= 0.98 * ms
    assert len(machine.made) == len(set(machine.made)) == len(found.readings) <= 20


@pytest.mark.parametrize("name", ["even", "with a floor"])
def test_few_models_are_made(name):
    machine = Machine(CURVES[name])
    search(machine, Target(20), progress=False)
    assert len(machine.made) <= 4


@pytest.mark.parametrize("noise", [0.02, 0.1])
def test_noise_never_returns_a_model_that_was_read_as_too_slow(noise):
    for ms in (10, 17, 25, 33):
        found = search(Machine(CURVES["with a floor"], noise), Target(ms), progress=False)
        assert found.reading.value <= ms and found.readings[found.density] == found.reading
        assert all(d <= found.density for d, r in found.readings.items() if r.value <= ms)


def test_a_dense_model_that_is_fast_enough_is_the_only_one_made():
    machine = Machine(CURVES["even"])
    assert search(machine, Target(41), progress=False).density == 1 and machine.made == [1.0]


def test_other_budgets_bound_the_search():
    machine = Machine(CURVES["even"])
    found = search(machine, Target(20), highest=0.3, progress=False)
    assert found.density == 0.3 and machine.made == [0.3]


def test_a_target_out_of_reach_says_how_fast_the_smallest_is():
    with pytest.raises(TooSlowError, match=r"5ms cannot be met.*density 0\.02, takes 6\.68ms \(6\.35 to 7\.01\)"):
        search(Machine(CURVES["with a floor"]), Target(5), progress=False)


@pytest.mark.parametrize("most", [2, 3, 5])
def test_at_most_so_many_models_and_still_an_answer(most):
    machine = Machine(CURVES["flat at the end"])
    found = search(machine, Target(14), most=most, progress=False)
    assert len(machine.made) <= most and found.reading.value <= 14


def test_an_interrupted_search_goes_on(tmp_path):
    cache, key = tmp_path / "search.json", {"model": "abc", "threads": 1}

    class Stopped(Machine):
        def __call__(self, density):
            if len(self.made) == 2:
                raise KeyboardInterrupt
            return super().__call__(density)

    curve = CURVES["flat at the end"]
    whole = search(Machine(curve), Target(20), progress=False)
    with pytest.raises(KeyboardInterrupt):
        search(Stopped(curve), Target(20), cache=cache, key=key, progress=False)
    assert len(json.loads(cache.read_text())["readings"]) == 2
    machine = Machine(curve)
    assert search(machine, Target(20), cache=cache, key=key, progress=False) == whole
    assert len(machine.made) == len(whole.readings) - 2
    machine = Machine(curve)
    assert search(machine, Target(20), cache=cache, key=key, progress=False) == whole and machine.made == []
    for other in ({"model": "x", "threads": 1}, {}):
        machine = Machine(curve)
        search(machine, Target(20), cache=cache, key=other, progress=False)
        assert machine.made, "readings of another model are not used"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": {"target unit": "ms"}, "readings": [3]}'])
def test_a_damaged_cache_is_made_again(tmp_path, text):
    (tmp_path / "c.json").write_text(text)
    machine = Machine(CURVES["even"])
    search(machine, Target(20), cache=tmp_path / "c.json", progress=False)
    assert machine.made and json.loads((tmp_path / "c.json").read_text())["readings"]


@pytest.mark.parametrize("wrong", [(0, "ms"), (-1, "ms"), (float("nan"), "ms"), (float("inf"), "ms"), (1.5, "x")])
def test_targets_that_mean_nothing(wrong):
    with pytest.raises(ValueError, match=r"allowed: above 0 ms, or above 0x"):
        Target(*wrong)


def test_unknown_unit():
    with pytest.raises(ValueError, match="unit 's'"):
        Target(1, "s")


@pytest.mark.parametrize(
    "wrong", [{"lowest": 0}, {"highest": 1.1}, {"highest": 0.01}, {"tolerance": 1}, {"resolution": 0}, {"most": 1}]
)
def test_bad_numbers_are_refused_before_anything_is_made(wrong):
    machine = Machine(CURVES["even"])
    with pytest.raises(ValueError, match="allowed"):
        search(machine, Target(20), progress=False, **wrong)
    assert machine.made == []
