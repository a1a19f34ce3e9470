"""Cutting to a latency, with a clock whose time is the number of multiply-accumulates."""

import pytest
import torch
from torch import nn

from cut import speed
from cut.budget import Parameters
from cut.conversion import Exported
from cut.cost import macs
from cut.decomposition import prunable
from cut.limits import MACs
from cut.search import Reading, TooSlowError
from cut.speed import prune_to_latency, target_of
from tests.commands.own_model import Net, pictures

LOSSES = {
    "seg": lambda out, batch: nn.functional.cross_entropy(out, batch[1]["seg"]),
    "depth": lambda out, batch: nn.functional.l1_loss(out, batch[1]["depth"]),
    "count": lambda out, batch: nn.functional.cross_entropy(out, batch[1]["count"]),
}


@pytest.fixture()
def files(monkeypatch):
    """Networks by the path that they were written to, and a clock that counts their work in thousands."""
    found = {}

    def write(network, path, image, *, tasks):
        found[str(path)] = (macs(network, image), sorted(network(image)), sum(p.numel() for p in network.parameters()))
        return Exported(path, 0)

    def clock(build, dense, target, **options):
        whole = found[str(dense)][0]

        def measure(density):
            work = found[str(dense if density == 1 else build(density))][0]
            value = work / whole if target.unit == "x" else work / 1000
            return Reading(value, value, value)

        return measure

    monkeypatch.setattr(speed, "clock", clock)
    return found, write


def test_the_file_is_as_fast_as_asked_and_not_much_faster(files):
    found, write = files
    torch.manual_seed(0)
    model = Net(32)
    mask, reached = prune_to_latency(model, pictures(0), LOSSES, ["depth"], "0.5x", write=write, progress=False)
    assert 0.4 < reached.reading.value <= 0.5
    dense = next(v for k, v in found.items() if k.endswith("dense.onnx"))
    assert dense[1] == ["depth"], "the reference is the dense model with the kept heads"
    assert any(v[0] / dense[0] == reached.reading.value for v in found.values())
    own = dict(model.named_parameters())
    assert all(not own[n][~m].any() for n, m in mask.items()), "what is cut is zero in the model"
    cut = {n: ~m for n, m in mask.items() if n in prunable(model)}
    rows = cut["trunk.0.weight"].flatten(1)
    assert torch.equal(rows.any(1), rows.all(1)), "channels go whole"
    assert {int(m.flatten(1).any(1).sum()) % 8 for n, m in mask.items() if n in cut and n.startswith("trunk")} == {0}


def test_milliseconds_and_another_budget_are_met_together(files):
    found, write = files
    torch.manual_seed(0)
    dense = macs(Net(32), pictures(0)[0][0]) / 1000
    options = {"write": write, "progress": False, "budgets": [Parameters(6000)]}
    _, reached = prune_to_latency(Net(32), pictures(0), LOSSES, ["depth"], f"{dense * 0.9:.0f}ms", **options)
    assert reached.reading.value <= dense * 0.9
    assert found[next(k for k in found if k.endswith(f"/{reached.density}.onnx"))][2] <= 6000


def test_a_wide_tolerance_makes_fewer_models_and_still_meets_the_target(files):
    found, write = files
    options = {"write": write, "progress": False}
    made = {}
    for tolerance in (0.01, 0.5):
        found.clear()
        torch.manual_seed(0)
        model = Net(32)
        _, reached = prune_to_latency(model, pictures(0), LOSSES, ["depth"], "0.5x", tolerance=tolerance, **options)
        assert 0.25 <= reached.reading.value <= 0.5
        made[tolerance] = len(found)
    assert made[0.5] < made[0.01]


def test_what_the_floor_forbids_is_not_tried(files):
    _, write = files
    with pytest.raises(ValueError, match="cannot be met"):
        prune_to_latency(Net(32), pictures(0), LOSSES, ["depth"], "0.05x", floor_share=0.5, write=write, progress=False)


@pytest.mark.parametrize("shape", [(10,), (1, 8, 8), (4, 6, 10)])
def test_inputs_of_any_form_are_timed(shape, files):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            kind = nn.Linear if len(shape) == 1 else lambda a, b: nn.Conv2d(a, b, 1)
            self.trunk, self.one, self.two = kind(shape[0], 64), kind(64, 2), kind(64, 3)

        def forward(self, x):
            x = self.trunk(x).relu()
            return {"one": self.one(x), "two": self.two(x)}

    batches = [torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))]
    losses = dict.fromkeys(("one", "two"), lambda out, batch: out.square().mean())
    options = {"write": files[1], "progress": False, "inputs": lambda x: x}
    _, reached = prune_to_latency(Two(), batches, losses, ["one"], "0.5x", **options)
    assert 0.3 < reached.reading.value <= 0.5


@pytest.mark.parametrize("text", ["", "fast", "0.5", "20 ms", "-1ms", "2x", "0x", "0ms", "1e3ms"])
def test_what_is_no_latency_is_refused(text):
    with pytest.raises(ValueError, match="allowed"):
        target_of(text)


def test_a_tighter_budget_than_any_latency_that_is_tried_is_met(files):
    """Other budgets may leave less than the smallest density that a search would try of itself."""
    _, write = files
    torch.manual_seed(0)
    options = {"write": write, "progress": False, "floor_share": 0.0, "rounding": 1}
    mask, reached = prune_to_latency(Net(64), pictures(0), LOSSES, ["depth"], "1x", budgets=[MACs(0.015)], **options)
    assert reached.density <= 0.015 and reached.reading.value <= 0.015 and mask
    with pytest.raises(TooSlowError, match=r"0\.001x cannot be met"):
        prune_to_latency(Net(64), pictures(0), LOSSES, ["depth"], "0.001x", budgets=[MACs(0.015)], **options)


def test_readings_of_another_model_or_other_scores_are_not_taken_from_a_cache(files, tmp_path):
    found, write = files
    options = {"write": write, "progress": False, "cache": tmp_path / "readings.json"}
    made = []
    for width, share in ((16, 0.5), (16, 0.5), (32, 0.5), (32, 1.0)):
        found.clear()
        torch.manual_seed(0)
        prune_to_latency(Net(width), pictures(0), LOSSES, ["seg", "depth"], "0.5x", share=share, **options)
        made.append(len(found))
    assert made[1] == 1, "only the dense model is written when all is known"
    assert min(made[0], made[2], made[3]) > 1
