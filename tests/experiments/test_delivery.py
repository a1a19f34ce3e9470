"""Delivered files: made once, equal to their model, timed against the dense one, judged."""

import json

import pytest
import torch

from cut import checkpoint, export
from cut.data.rooms import Rooms
from cut.network import MultiTaskNet, NetworkConfig
from experiments import delivery
from experiments.cell import Cell
from experiments.delivery import deliver, files, main
from experiments.grid import Grid, Row

TASKS = ("seg", "depth")
CONFIGS = ("trainer/default", "data/rooms", "model/mobilenetv2")


def model(folder, width):
    """A compact model's folder with random weights."""
    torch.manual_seed(0)
    data = Rooms(tasks=TASKS)
    network = MultiTaskNet({t.name: t.channels for t in data.tasks}, config=NetworkConfig("resnet18", head_width=width))
    meta = export.metadata(data.tasks, data.mean, data.std, (96, 128))
    checkpoint.save(network.eval(), folder / "compact", metadata=meta)


def cells():
    start = Cell((*CONFIGS, "pruning/dense"), {"data.init_args.tasks": list(TASKS)})
    dense = Cell((*CONFIGS, "pruning/dense-longer"), {"pruning.tasks": list(TASKS)}, start)
    cut = Cell((*CONFIGS, "pruning/cut-channels"), {"pruning.tasks": list(TASKS)}, start)
    return dense, cut


@pytest.fixture
def runs(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(delivery, "TIMING", {"threads": 1, "repeats": 4, "rounds": 2, "warmup": 1})
    dense, cut = cells()
    for one, width in ((dense, 16), (cut, 4)):
        (tmp_path / one.id).mkdir()
        model(tmp_path / one.id, width)
    return tmp_path


@pytest.mark.slow
def test_files_of_all_runtimes_and_precisions(runs):
    pytest.importorskip("executorch.runtime")
    dense, cut = cells()
    found = deliver(cut, dense, runs, int8=True)
    kinds = {(f.runtime, f.precision) for f in found.forms}
    floats = {("PyTorch", "fp32"), ("ONNX Runtime", "fp32"), ("ExecuTorch", "fp32")}
    assert kinds == floats | {("ONNX Runtime", "int8"), ("ExecuTorch", "int8")}
    for form in found.forms:
        assert form.latency_low <= form.latency_ratio <= form.latency_high and form.latency_ms > 0
        assert form.bytes > 0 and form.peak_bytes > form.bytes
        assert bool(form.metrics) == (form.precision == "int8")
    sizes = {(f.runtime, f.precision): f.bytes for f in found.forms}
    assert sizes["ONNX Runtime", "int8"] < 0.4 * sizes["ONNX Runtime", "fp32"]
    assert {k.split("/")[0] for f in found.forms for k in f.metrics} == set(TASKS)
    itself = deliver(dense, dense, runs, int8=False)
    assert all(f.latency_ratio == 1 for f in itself.forms)


def test_what_is_there_is_not_made_again_and_a_wrong_file_is_refused(runs, monkeypatch):
    _, cut = cells()
    data = Rooms(tasks=TASKS)
    monkeypatch.setattr(delivery, "export_executorch", lambda network, to, *a, **k: to.write_bytes(b""))
    monkeypatch.setattr(delivery, "_same", lambda *a: None)
    found = files(runs / cut.id / "compact", TASKS, data, int8=False)
    assert set(found) == {"PyTorch-fp32", "onnx-fp32", "pte-fp32"}
    before = found["onnx-fp32"].stat().st_mtime_ns
    assert files(runs / cut.id / "compact", TASKS, data, int8=False) == found
    assert found["onnx-fp32"].stat().st_mtime_ns == before
    monkeypatch.undo()
    other = checkpoint.load(runs / cells()[0].id / "compact")
    with pytest.raises(ValueError, match="differs by"):
        delivery._same(found["onnx-fp32"], other, data.score_batches(1, 1)[0]["image"])
    assert not found["onnx-fp32"].exists()


def test_a_run_without_a_model_is_named(tmp_path):
    dense, cut = cells()
    with pytest.raises(ValueError, match=f"no compact model of {cut.id.replace('+', '.')}"):
        deliver(cut, dense, tmp_path, int8=False)


def test_the_command_measures_what_has_no_delivery(tmp_path, monkeypatch, capsys):
    dense, cut = cells()
    grid = Grid("edge", "Edge", (Row("dense-longer", ((dense,),)), Row("cut-channels", ((cut,),))))
    monkeypatch.setattr(delivery, "GRIDS", {"edge": lambda: grid})
    asked = []

    def stub(cell, reference, runs, int8):
        if cell.method == "cut-channels":
            raise ValueError("its file is damaged")
        asked.append((cell.id, reference.id, int8))
        return delivery.Delivery(cell.id, reference.id, (), 1, 0.0, {})

    monkeypatch.setattr(delivery, "deliver", stub)
    line = ["edge", "--runs", str(tmp_path), "--out", str(tmp_path / "out"), "--busy"]
    assert main(line) == 1 and "its file is damaged" in capsys.readouterr().out
    assert asked == [(dense.id, dense.id, True)]
    assert json.loads((tmp_path / "out" / f"{dense.id}.json").read_text())["reference"] == dense.id
    assert main(line) == 1 and len(asked) == 1, "measured once"
    assert main(["nonsense"]) == 2
