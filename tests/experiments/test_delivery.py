"""Delivered files: made once, equal to their model, timed against the dense one, judged."""

import json

import pytest
import torch

from cut import checkpoint, export
from cut.compact import compact, keep_tasks
from cut.data.rooms import Rooms
from cut.limits import MACs
from cut.masks import apply_mask
from cut.network import MultiTaskNet, NetworkConfig
from cut.scores import Magnitude
from cut.structured import make_unit_mask
from experiments import delivery
from experiments.cell import Cell
from experiments.delivery import deliver, files, main
from experiments.grid import Grid, Row
from experiments.run import parsed

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


TINY = {"backbone": "test_efficientnet", "weights": None, "output_stride": None, "head": "light", "head_width": 16}
TINY_VIT = {"backbone": "test_vit", "weights": None, "img_size": [96, 128], "head": "light", "head_width": 16}


def finished(runs, kind, network):
    """What a run that cut whole units, and its dense one, leave: random weights, the four tasks of the benchmark."""
    torch.manual_seed(0)
    configs, settings = ("trainer/default", "data/rooms", f"model/{kind}"), {"model.init_args.network": network}
    start = Cell((*configs, "pruning/dense"), settings)
    options = {**settings, "pruning.tasks": list(TASKS)}
    dense = Cell((*configs, "pruning/dense-longer"), options, start)
    cell = Cell((*configs, "pruning/cut-channels"), options, start)
    cli = parsed([*cell.argv(runs / "records", runs), "--trainer.enable_progress_bar=false", "--trainer.logger=false"])
    whole, losses, data = cli.model.network.eval(), cli.model.losses, cli.datamodule
    batch = data.score_batches(1, 2)[0]
    meta = export.metadata([t for t in data.tasks if t.name in TASKS], data.mean, data.std, (96, 128))
    checkpoint.save(keep_tasks(whole, TASKS, batch), runs / dense.id / "compact", metadata=meta)
    scores = Magnitude()(whole, [batch], losses, list(TASKS))
    mask = make_unit_mask(whole, scores, batch, losses, list(TASKS), budget=MACs(0.5))
    apply_mask(whole, mask)
    checkpoint.save(compact(whole, TASKS, mask, batch), runs / cell.id / "compact", metadata=meta)
    torch.save({"state_dict": cli.model.state_dict(), "record": cell.id}, runs / cell.id / "last.ckpt")
    return dense, cell


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """A folder of runs; few calls are timed, and there are no ExecuTorch programs, which need an extra."""
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(delivery, "TIMING", {"threads": 1, "repeats": 4, "rounds": 2, "warmup": 1})
    real, same = delivery.files, delivery._same
    monkeypatch.setattr(delivery, "export_executorch", lambda network, to, *a, **k: to.write_bytes(b""))
    monkeypatch.setattr(delivery, "_same", lambda path, *a: None if path.suffix == ".pte" else same(path, *a))
    monkeypatch.setattr(delivery, "files", lambda *a: {n: p for n, p in real(*a).items() if not n.startswith("pte")})
    return tmp_path


def test_a_masked_model_has_the_dense_shape_and_the_compact_models_outputs(quick):
    dense, cell = finished(quick, "mobilenetv2", TINY)
    assert delivery.masked(cell, quick) == quick / cell.id / "masked/model"
    masked, small = (checkpoint.load(quick / cell.id / n) for n in ("masked/model", "compact"))
    whole = checkpoint.load(quick / dense.id / "compact")
    assert [p.shape for p in masked.parameters()] == [p.shape for p in whole.parameters()]
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in masked.parameters())
    image = Rooms(tasks=TASKS).score_batches(1, 2)[0]["image"]
    for task, out in small(image).items():
        torch.testing.assert_close(out, masked(image)[task], rtol=1e-3, atol=1e-4)
    (quick / cell.id / "last.ckpt").unlink()
    assert delivery.masked(cell, quick).is_dir(), "made once"


@pytest.mark.slow
def test_dense_masked_and_compact_are_timed_side_by_side(quick):
    dense, cell = finished(quick, "mobilenetv2", TINY)
    found = deliver(cell, dense, quick, int8=False, beside=True)
    assert set(found.beside) == {"dense", "masked"}
    assert all(f.latency_ratio == 1 for f in found.beside["dense"])
    assert [f.runtime for f in found.beside["masked"]] == [f.runtime for f in found.forms]
    by = {side: {f.runtime: f.bytes for f in forms} for side, forms in found.beside.items()}
    mine = {f.runtime: f.bytes for f in found.forms}
    assert by["masked"]["ONNX Runtime"] == pytest.approx(by["dense"]["ONNX Runtime"], rel=0.01)
    assert mine["ONNX Runtime"] < 0.9 * by["masked"]["ONNX Runtime"]
    assert delivery.read(found.write(quick / "out")) == found
    assert not deliver(cell, dense, quick, int8=False).beside


def test_weights_that_are_not_those_of_the_compact_model_are_refused(quick):
    _, cell = finished(quick, "mobilenetv2", TINY)
    path = quick / cell.id / "last.ckpt"
    state = torch.load(path, weights_only=True)
    state["state_dict"] = {n: t + 0.1 if t.is_floating_point() else t for n, t in state["state_dict"].items()}
    torch.save(state, path)
    with pytest.raises(ValueError, match="differs by"):
        delivery.masked(cell, quick)
    assert (quick / cell.id / "compact").is_dir()
    path.unlink()
    with pytest.raises(ValueError, match="no weights"):
        delivery.masked(cell, quick)


@pytest.mark.slow
def test_a_vit_cut_by_units_is_delivered_in_int8_too(quick):
    dense, cell = finished(quick, "small_vit", TINY_VIT)
    small, whole = (checkpoint.load(quick / one.id / "compact") for one in (cell, dense))
    widths = [[m.in_features for n, m in network.named_modules() if n.endswith("fc1")] for network in (small, whole)]
    assert max(widths[0]) < min(widths[1]), "the embedding is narrower"
    found = deliver(cell, dense, quick, int8=True, beside=True)
    forms = {(f.runtime, f.precision): f for f in found.forms}
    assert {("PyTorch", "fp32"), ("ONNX Runtime", "fp32"), ("ONNX Runtime", "int8")} <= set(forms)
    int8 = forms["ONNX Runtime", "int8"]
    assert {k.split("/")[0] for k in int8.metrics} == set(TASKS)
    assert int8.bytes < 0.6 * forms["ONNX Runtime", "fp32"].bytes, "a network this small is half graph"
    image = Rooms(tasks=TASKS).score_batches(1, 4)[0]["image"]
    for task, worst in export.parity(quick / cell.id / "int8.onnx", small, [image]).items():
        assert worst < 0.1 * small(image)[task].abs().max(), task


@pytest.mark.slow
def test_a_vit_cut_by_units_is_an_executorch_program_in_both_precisions(tmp_path, monkeypatch):
    pytest.importorskip("executorch.runtime")
    monkeypatch.setattr(delivery, "TIMING", {"threads": 1, "repeats": 4, "rounds": 2, "warmup": 1})
    dense, cell = finished(tmp_path, "small_vit", TINY_VIT)
    found = deliver(cell, dense, tmp_path, int8=True, beside=True)
    forms = {f.precision: f for f in found.forms if f.runtime == "ExecuTorch"}
    assert forms["int8"].bytes < 0.6 * forms["fp32"].bytes and forms["int8"].metrics
    assert {f.runtime for f in found.beside["masked"]} == {"PyTorch", "ONNX Runtime", "ExecuTorch"}


def test_one_cell_a_dense_model_is_timed_masked_too():
    start = [Cell((*CONFIGS, "pruning/dense"), {"seed_everything": s}) for s in (1, 2)]

    def row(method, latency, tasks):
        options = {"pruning.tasks": list(tasks), "pruning.budget.init_args.target": latency}
        runs = [(Cell((*CONFIGS, f"pruning/{method}"), {**options, "seed_everything": s.seed}, s),) for s in start]
        return Row(method, tuple(runs), {"latency": latency})

    some = [("cut-channels", 0.75), ("cut-channels", 0.5), ("group-norm", 0.5)]
    rows = [row(*kind, tasks) for tasks in (TASKS, ("seg", "normal", "depth")) for kind in some]
    assert delivery.shown(Grid("edge", "Edge", tuple(rows))) == [rows[1].runs[0][0]]


def test_a_run_without_a_model_is_named(tmp_path):
    dense, cut = cells()
    with pytest.raises(ValueError, match=f"no compact model of {cut.id.replace('+', '.')}"):
        deliver(cut, dense, tmp_path, int8=False)


def test_the_command_measures_what_has_no_delivery(tmp_path, monkeypatch, capsys):
    dense, cut = cells()
    grid = Grid("edge", "Edge", (Row("dense-longer", ((dense,),)), Row("cut-channels", ((cut,),))))
    monkeypatch.setattr(delivery, "GRIDS", {"edge": lambda: grid})
    asked = []

    def stub(cell, reference, runs, int8, beside):
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
    assert main([*line, "--workers", "0"]) == 2 and "at least 1" in capsys.readouterr().err


def test_one_with_the_layers_of_a_measured_one_is_not_measured_unless_in_int8(tmp_path, monkeypatch):
    dense, cut = cells()
    other = Cell(cut.configs, {**cut.settings, "model.init_args.optimizer.init_args.lr": 3e-4}, cut.start)
    rows = (Row("dense-longer", ((dense,),)), Row("cut-channels", ((other,),)))
    grid = Grid("edge", "Edge", rows, alike={other.id: (cut,)})
    monkeypatch.setattr(delivery, "GRIDS", {"edge": lambda: grid})
    asked = []

    def stub(cell, reference, *_):
        asked.append(cell.id)
        return delivery.Delivery(cell.id, reference.id, (), 1, 0.0, {})

    monkeypatch.setattr(delivery, "deliver", stub)
    stub(cut, dense).write(tmp_path)
    assert delivery.collect(grid, tmp_path)[other.id].run == cut.id
    line = ["edge", "--runs", str(tmp_path), "--out", str(tmp_path), "--busy"]
    assert main([*line, "--int8", "dense-longer"]) == 0 and asked == [cut.id, dense.id]
    assert main(line) == 0 and asked == [cut.id, dense.id, other.id], "accuracy in int8 is its own weights'"
    assert delivery.collect(grid, tmp_path)[other.id].run == other.id


def test_of_several_seeds_the_first_is_measured_unless_all_are_wanted(tmp_path, monkeypatch):
    start = [Cell((*CONFIGS, "pruning/dense"), {"seed_everything": s}) for s in (1, 2)]
    dense = [Cell((*CONFIGS, "pruning/dense-longer"), {"seed_everything": s.seed}, s) for s in start]
    grid = Grid("edge", "Edge", (Row("dense-longer", tuple((c,) for c in dense)),))
    monkeypatch.setattr(delivery, "GRIDS", {"edge": lambda: grid})
    monkeypatch.setattr(delivery, "deliver", lambda c, r, *_: delivery.Delivery(c.id, r.id, (), 1, 0.0, {}))
    line = ["edge", "--runs", str(tmp_path), "--out", str(tmp_path / "out"), "--busy"]
    assert main(line) == 0 and [p.stem for p in (tmp_path / "out").iterdir()] == [dense[0].id]
    assert main([*line, "--every-seed"]) == 0
    assert {p.stem for p in (tmp_path / "out").iterdir()} == {c.id for c in dense}


@pytest.mark.slow
def test_files_made_ahead_by_several_processes_are_those_that_are_timed(tmp_path):
    """ExecuTorch, which needs an extra, comes second: without it the first file is there all the same."""
    dense, cell = finished(tmp_path, "mobilenetv2", TINY)
    nobody = cells()[1]
    delivery.ahead([(cell, dense, tmp_path, False, False), (nobody, dense, tmp_path, False, False)], 2)
    assert (tmp_path / cell.id / "compact.onnx").is_file() and not (tmp_path / nobody.id).exists()
