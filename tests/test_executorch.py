import sys

import numpy as np
import pytest
import torch
from torch import nn

from cut import export
from cut.data.rooms import Rooms
from cut.evaluation import evaluate_file
from cut.executorch import export_executorch
from cut.latency import compare
from cut.network import MultiTaskNet, NetworkConfig
from cut.runtime import open_file
from tests.small_networks import trained
from tests.test_structured import halved_vit, relative

TASKS = ["seg", "depth"]


def test_missing_extra_is_named_before_the_work(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "executorch.exir", None)
    with pytest.raises(ValueError, match="extra 'executorch'"):
        export_executorch(nn.Identity(), tmp_path / "a.pte", torch.zeros(1, 3, 8, 8), tasks=["seg"])
    (tmp_path / "b.pte").write_bytes(b"0000ET12")
    monkeypatch.setitem(sys.modules, "executorch.runtime", None)
    with pytest.raises(ValueError, match="extra 'executorch'"):
        open_file(tmp_path / "b.pte")


@pytest.fixture(scope="module")
def data():
    return Rooms(batch_size=4, num_workers=0)


@pytest.fixture(scope="module")
def pictures(data):
    pytest.importorskip("executorch")
    return [b["image"] for b in data.score_batches(2)]


@pytest.fixture(scope="module")
def network(data, pictures):
    """A small network of ours, its norms fitted to real pictures."""
    torch.manual_seed(0)
    outputs = {t.name: t.channels for t in data.tasks if t.name in TASKS}
    net = MultiTaskNet(outputs, config=NetworkConfig("resnet10t", head_width=16))
    net = trained(net).train()
    with torch.no_grad():
        for images in [*pictures, *pictures]:
            net(images)
    return net.eval()


@pytest.fixture(scope="module")
def meta(network, data, pictures):
    tasks = [t for t in data.tasks if t.name in TASKS]
    return export.metadata(tasks, network.mean, network.std, pictures[0].shape[-2:])


@pytest.fixture(scope="module")
def program(network, pictures, meta, tmp_path_factory):
    path = tmp_path_factory.mktemp("executorch") / "float.pte"
    return export_executorch(network, path, pictures[0], tasks=TASKS, meta=meta)


@pytest.fixture(scope="module")
def int8(network, pictures, meta, program):
    path = program.path.with_name("int8.pte")
    return export_executorch(network, path, pictures[0], tasks=TASKS, meta=meta, calibration=pictures)


@pytest.mark.slow
def test_outputs_equal_those_of_pytorch_on_real_pictures(program, network, pictures):
    worst = export.check_parity(program.path, network, pictures, tolerance=1e-3)
    assert set(worst) == set(TASKS)
    assert program.bytes == program.path.stat().st_size


@pytest.mark.slow
def test_the_program_carries_its_facts(program, meta, pictures):
    opened = open_file(program.path)
    assert opened.meta == meta and opened.runtime == "ExecuTorch" and opened.size == tuple(pictures[0].shape[-2:])
    found = opened.run(pictures[0][:3].numpy())
    assert list(found) == TASKS and all(len(v) == 3 for v in found.values())
    again = opened.run(pictures[1][:1].numpy())
    assert not np.array_equal(found["seg"][:1], again["seg"]), "earlier outputs are not overwritten"


@pytest.mark.slow
def test_int8_is_smaller_and_close(program, int8, network, pictures, data):
    assert int8.bytes < 0.3 * program.bytes
    found = open_file(int8.path).run(pictures[0].numpy())
    with torch.no_grad():
        expected = network(pictures[0])
    for task in TASKS:
        value = expected[task].numpy()
        assert np.abs(found[task] - value).mean() < 0.2 * value.std(), task


@pytest.mark.slow
def test_a_vision_transformer_cut_by_heads_and_neurons(tmp_path):
    pytest.importorskip("executorch", reason="needs the extra 'executorch'")
    small, pictures, expected = halved_vit()
    options = {"tasks": list(expected)}
    before = export_executorch(small, tmp_path / "float.pte", pictures[0], **options)
    export.check_parity(before.path, small, pictures, tolerance=1e-3)
    after = export_executorch(small, tmp_path / "int8.pte", pictures[0], calibration=pictures, **options)
    assert after.bytes < before.bytes, "a network this small is mostly graph"
    assert 0 < relative(open_file(after.path).run(pictures[0].numpy()), expected) < 0.3


@pytest.mark.slow
def test_programs_are_judged_and_timed(program, int8, data):
    before, after = (evaluate_file(f.path, data, tasks=["depth"]) for f in (program, int8))
    assert after["depth/abs"] == pytest.approx(before["depth/abs"], rel=0.2)
    found = compare({"f32": program.path, "int8": int8.path}, warmup=1, repeats=4, rounds=2, progress=False)
    assert all(t.runtime == "ExecuTorch" and t.median_ms > 0 for t in found.values())


@pytest.mark.slow
def test_refusals_and_a_damaged_program(network, pictures, program, tmp_path):
    with pytest.raises(ValueError, match="no output 'smell'"):
        export_executorch(network, tmp_path / "a.pte", pictures[0], tasks=["smell"])
    with pytest.raises(ValueError, match="no calibration"):
        export_executorch(network, tmp_path / "a.pte", pictures[0], tasks=TASKS, calibration=[])

    class Branches(nn.Module):
        def forward(self, image):
            return {"seg": image if image.mean() > 0 else -image}

    with pytest.raises(ValueError, match="cannot be exported to ExecuTorch"):
        export_executorch(Branches(), tmp_path / "a.pte", pictures[0], tasks=["seg"])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "cut.pte").write_bytes(program.path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cut\.pte is not a readable ExecuTorch program"):
        open_file(tmp_path / "cut.pte")


@pytest.mark.slow
def test_the_network_keeps_its_modes(network, pictures, program):
    assert not network.training and all(p.requires_grad for p in network.parameters())
