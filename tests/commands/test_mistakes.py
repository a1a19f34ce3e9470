"""Mistakes in the code that a user names: one line that says where, exit code 2; and numbers that are not finite."""

import json
import math
import textwrap

import pytest
import torch

from cut import checkpoint
from cut.cli import main
from cut.compact import compact
from tests.commands.own_model import Net, pictures

GOOD = """
import torch
from torch import nn
from tests.commands.own_model import Net, pictures

def loss(output, batch):
    return nn.functional.l1_loss(output, batch[1]["depth"])

def parts(**changed):
    torch.manual_seed(0)
    tasks = {"seg": lambda o, b: nn.functional.cross_entropy(o, b[1]["seg"]), "depth": loss,
             "count": lambda o, b: nn.functional.cross_entropy(o, b[1]["count"])}
    tasks |= changed.get("tasks", {})
    batches = pictures(0)
    return changed.get("model", Net(8)), changed.get("loader", batches), tasks, changed.get("example", batches[0][0])
"""

MISTAKES = {
    "key": ('def setup():\n    return parts(tasks={"depth": lambda o, b: b[1]["dept"].mean()})', "KeyError: 'dept'"),
    "raises": ('def setup():\n    raise RuntimeError("no disk")', "RuntimeError: no disk"),
    "argument": ("def setup(width):\n    return parts()", "needs width"),
    "loader": ("def setup():\n    return parts(loader=3)", "the loader is int"),
    "once": (
        "def setup():\n    return parts(loader=iter(pictures(0)))",
        "a loader of batches that can be gone",
    ),
    "empty": ("def setup():\n    return parts(loader=[])", "the loader gives no batches"),
    "nothing to judge on": ("def setup():\n    return *parts(), []", "the test loader gives no batches"),
    "channels": ("def setup():\n    return parts(example=torch.zeros(2, 1, 32, 32))", "RuntimeError"),
    "picture": (
        'def setup():\n    return parts(tasks={"depth": lambda o, b: (o - b[1]["depth"]).abs()})',
        "the loss of task 'depth' gives a tensor [",
    ),
    "float": (
        'def setup():\n    return parts(tasks={"depth": lambda o, b: 1.0})',
        "the loss of task 'depth' gives float",
    ),
    "metric": (
        'def setup():\n    return parts(tasks={"depth": (loss, {"all": lambda o, b: o})})',
        "metric 'all' of task 'depth' gives no number",
    ),
}


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes a module of the user's and goes to its folder; returns its name."""

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(GOOD + textwrap.dedent(text) + "\n")
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        return f"{name}:setup"

    return write


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_one_line(mistake, written, tmp_path, capsys):
    text, message = MISTAKES[mistake]
    source = written(f"mistake_{mistake.replace(' ', '_')}", text)
    assert main(["fit", source, "--steps", "2", "--out", str(tmp_path / "out"), "--quiet"]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1
    assert "Error" not in error or ".py, line" in error
    assert not (tmp_path / "out").exists()


def test_a_module_that_cannot_be_read_is_told(written, capsys):
    source = written("mistake_syntax", "def setup(:")
    assert main(["info", source]) == 2
    assert "'mistake_syntax' cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "out", "message"),
    [
        (["fit", "m:f"], "taken", "is not a folder"),
        (["prune", "m:f", "--sparsity", "0.5"], "taken", "is not a folder"),
        (["compact", "m:f"], "taken/below", "is not a folder"),
        (["export", "m:f"], "folder.onnx", "is not a file"),
        (["export", "m:f"], "taken/small.onnx", "is not a folder"),
    ],
)
def test_a_place_that_cannot_be_written_is_told_before_any_work(command, out, message, tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(SystemExit) as stop:
        main([*command, "--out", str(tmp_path / out)])
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.onnx", "taken"]


def test_a_fault_of_ours_is_seen_whole(monkeypatch):
    monkeypatch.setattr("cut.commands.info.run", None)
    with pytest.raises(TypeError):
        main(["info", "tests.commands.own_model:setup"])


def test_a_metric_that_is_not_finite_loses_nothing(written, tmp_path, capsys):
    text = 'def setup():\n    return parts(tasks={"depth": (loss, {"iou": lambda o, b: float("nan")})})'
    source, out = written("mistake_nan", text), tmp_path / "cut"
    line = ["prune", source, "--sparsity", "0.5", "--steps", "1", "--batches", "1", "--out", str(out), "--json"]
    assert main(line) == 0
    told = json.loads(capsys.readouterr().out)["metrics"]["pruned"]
    assert told["depth/iou"] is None and math.isfinite(told["depth/loss"])
    assert checkpoint.read_metadata(out)["cut"]["metrics"]["dense"]["depth/iou"] is None
    assert main(["fit", source, "--steps", "1", "--out", str(tmp_path / "fit"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["depth/iou"] is None


def test_a_model_with_a_single_head_left_is_cut_by_channels(written, tmp_path, capsys):
    source = written("mistake_none", "def setup():\n    return parts()")
    torch.manual_seed(0)
    model = Net(8).eval()
    mask = {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters()}
    checkpoint.save(compact(model, ["seg"], mask, pictures(0)[0][0][:2]), tmp_path / "seg")
    line = ["prune", source, "--weights", str(tmp_path / "seg"), "--units", "channels", "--budget", "macs=0.5"]
    assert main([*line, "--steps", "1", "--batches", "1", "--out", str(tmp_path / "half"), "--quiet"]) == 0
    assert (tmp_path / "half/model.json").is_file()
