"""Shapes that are fast enough: what is searched, what is written, and that masks are those of the runs."""

import json

import pytest
import torch
import yaml
from lightning.pytorch import Trainer

from cut.limits import MACs
from cut.pruning import Pruning
from cut.search import Target, TooSlowError
from experiments import edge, idleness, shapes
from experiments.run import parsed
from experiments.shapes import main, masks, searched


def test_a_search_for_every_latency_and_one_that_cannot_be_met_left_out(monkeypatch, tmp_path, capsys):
    asked = []

    def find(method, model, tasks, seed, runs):
        asked.append((method, model, seed))

        def measure(target, options):
            assert target.unit == "x" and options["key"]["method"] == method
            if target.value < 0.4:
                raise TooSlowError("cannot be met")
            return target.value / 2

        return measure

    monkeypatch.setattr(shapes, "_cut", find)
    found = searched("cut-channels", "resnet18", ("seg", "depth"), tmp_path, tmp_path)
    assert found == {0.75: 0.375, 0.5: 0.25} and asked == [("cut-channels", "resnet18", 1)]
    assert "cannot be met" in capsys.readouterr().err


def test_what_goes_wrong_is_not_taken_for_a_latency_that_nothing_meets(monkeypatch, tmp_path):
    def measure(target, options):
        raise ValueError("no such weights")

    monkeypatch.setattr(shapes, "_width", lambda *asked: measure)
    with pytest.raises(ValueError, match="no such weights"):
        searched(edge.WIDTH, "mobilenetv2", ("seg", "depth"), tmp_path, tmp_path)


@pytest.mark.parametrize("model", edge.MODELS)
def test_every_network_of_the_table_is_narrowed(model, monkeypatch, tmp_path):
    """Built from the run's own command line, from random weights, and smaller the narrower it is."""
    sizes = []

    def fast(measure, target, **options):
        sizes.extend(measure(width) for width in (1.0, 0.5))
        return type("Found", (), {"density": 0.5})

    monkeypatch.setattr(shapes, "clock", lambda build, dense, target, **timing: lambda w: build(w).stat().st_size)
    monkeypatch.setattr(shapes, "search", fast)
    measure = shapes._width(edge.WIDTH, model, ("seg", "depth"), 1, tmp_path)
    assert measure(Target(0.5, "x"), {}) == 0.5
    assert sizes[1] < 0.5 * sizes[0]


def test_the_file_grows_by_what_was_not_known(monkeypatch, tmp_path):
    known = {"mobilenetv2": {"seg+depth": {"cut-channels": {0.5: 0.3}}}}
    monkeypatch.setattr(edge, "shares", lambda: known)
    asked = []

    def stub(method, model, tasks, *rest, **options):
        asked.append((method, model, tuple(tasks)))
        return {0.5: 0.4}

    monkeypatch.setattr(shapes, "searched", stub)
    out = tmp_path / "latency.yaml"
    assert main(["--out", str(out), "--only", "mobilenet", "--runs", str(tmp_path), "--busy"]) == 0
    written = yaml.safe_load(out.read_text())
    assert ("cut-channels", "mobilenetv2", ("seg", "depth")) not in asked
    assert {m for _, m, _ in asked} == {"mobilenetv2"}
    assert not {how for how, _, _ in asked} & set(edge.SHARES_OF), "these take another's"
    assert written["mobilenetv2"]["seg+depth"]["cut-channels"] == {0.5: 0.3}
    assert written["mobilenetv2"]["seg+normal+depth"]["width"] == {0.5: 0.4}


def test_a_busy_machine_is_refused_before_anything_is_timed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(idleness.os, "getloadavg", lambda: (100.0, 0.0, 0.0))
    monkeypatch.setattr(idleness.time, "sleep", lambda s: None)
    monkeypatch.setattr(idleness, "wait", lambda wait=idleness.wait: wait(0.0))
    monkeypatch.setattr(shapes.edge, "shares", dict)  # none found yet: the committed file has them all
    monkeypatch.setattr(shapes, "searched", lambda *a, **o: pytest.fail("timed"))
    assert main(["--out", str(tmp_path / "latency.yaml"), "--runs", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "load" in said and "allowed: at most 0.3" in said and "--busy" in said


def test_a_load_that_fades_is_waited_for(monkeypatch, capsys):
    loads = [2.0, 1.0, 0.1]
    monkeypatch.setattr(idleness, "load", lambda: loads.pop(0))
    monkeypatch.setattr(idleness.time, "sleep", lambda s: None)
    idleness.wait(60.0)
    assert not loads and capsys.readouterr().err.count("waiting") == 1


def test_readings_are_of_a_dense_run_and_of_the_methods_settings(monkeypatch):
    """Whatever changes what is cut begins a new file of readings."""
    asked = ("cut-channels", "resnet18", ("seg", "depth"))
    before = shapes.key(*asked)
    assert before["start"] == edge.start("resnet18", 1).id
    assert before["settings"]["pruning"]["floor"] == 0.05 and before["settings"]["network"]["output_stride"] == 16
    assert shapes.key(*asked) == before == json.loads(json.dumps(before)), "as it comes back from the file"
    narrow = shapes.key(edge.WIDTH, *asked[1:])
    assert narrow != before and narrow["settings"]["network"]["output_stride"] == 16
    monkeypatch.setattr(edge, "ROUNDING", 4)
    assert shapes.key(*asked) != before
    monkeypatch.undo()
    monkeypatch.setitem(edge.SETTINGS, "resnet18", {"model.init_args.network.output_stride": 8})
    assert shapes.key(*asked)["start"] != before["start"]


@pytest.mark.slow
def test_masks_of_the_search_are_those_of_the_run(tmp_path):
    cell = edge.cut("cut-channels", 0.5, "mobilenetv2", ("seg", "depth"), 1)
    line = [*cell.argv(tmp_path / "records", tmp_path), "--trainer.logger=false", "--pruning.batches=1"]
    cli = parsed(line)
    (tmp_path / cell.start.id).mkdir()
    torch.save({"state_dict": cli.model.state_dict(), "record": "x"}, tmp_path / cell.start.id / "last.ckpt")
    _, mask_of, image = masks(cell, tmp_path)
    assert image.shape[1:] == (3, 96, 128)
    pruning = next(c for c in cli.trainer.callbacks if isinstance(c, Pruning))
    assert isinstance(pruning.budget, MACs) and pruning.budget.target == 0.5
    trainer: Trainer = cli.trainer
    pruning.batches = 6
    trainer.fit_loop.max_epochs = 0
    cli.model.select(cell.tasks)
    trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
    pruning.prune(trainer, cli.model)
    mine = mask_of(0.5)
    assert set(mine) == set(pruning.mask)
    assert all(torch.equal(mine[n], pruning.mask[n].cpu()) for n in mine)
