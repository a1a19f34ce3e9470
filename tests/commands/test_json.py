"""With --json every command prints one JSON document on stdout and nothing else, whatever else it shows."""

import json

import pytest

from cut.cli import COMMANDS, main
from cut.commands.terminal import Terminal

OWN = "tests.commands.own_model:setup"
SMALL = ["--steps", "2", "--batches", "2"]
# Command to what follows it, where FOLDER is one with models of it.
LINES = {
    "fit": [OWN, "--steps", "2", "--out", "FOLDER/fitted"],
    "prune": [OWN, "--tasks", "depth", "--units", "channels", "--budget", "latency=0.5x", *SMALL, "--out", "FOLDER/p"],
    "newtask": [OWN, "--library", "FOLDER/library", "--fill", "--sparsity", "0.5", "--batches", "2"],
    "compact": [OWN, "--weights", "FOLDER/dense", "--tasks", "depth", "--out", "FOLDER/compact"],
    "export": [OWN, "--out", "FOLDER/exported.onnx", "--int8", "--batches", "1"],
    "predict": ["FOLDER/own.onnx", "docs/images/room.jpg", "--out", "FOLDER/seen.png"],
    "bench": ["FOLDER/own.onnx", "FOLDER/dense.onnx", "--repeats", "2", "--warmup", "1", "--data", OWN],
    "info": [OWN],
    "data": ["check", "FOLDER"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    made = tmp_path_factory.mktemp("json")
    assert main(["fit", OWN, "--steps", "1", "--out", str(made / "dense"), "--quiet"]) == 0
    for name in ("own.onnx", "dense.onnx"):
        assert main(["export", OWN, "--out", str(made / name), "--quiet"]) == 0
    return made


@pytest.fixture
def looked_at(monkeypatch):
    """Progress is shown, the machine is busy, and what would take long does not."""
    from cut import speed
    from cut.data import check
    from cut.search import Reading

    def checked(root, name, progress, legacy):
        assert list(progress([1, 2])) == [1, 2]
        return check.Report("nyuv2", "AdaShare", None, (1, 1), {}, 0, 0, warnings=["twice"])

    monkeypatch.setattr(Terminal, "shows_progress", property(lambda self: not self.quiet))
    monkeypatch.setattr("os.getloadavg", lambda: (99.0, 0, 0))
    monkeypatch.setattr(speed, "clock", lambda build, dense, target, **_: lambda d: Reading(d, 0.9 * d, 1.1 * d))
    monkeypatch.setattr(check, "check", checked)


def test_every_command_is_listed():
    assert set(LINES) == {c.__name__.rpartition(".")[2] for c in COMMANDS}


@pytest.mark.parametrize("command", LINES)
def test_stdout_is_one_json_document(command, folder, looked_at, capfd):
    line = [command, *(word.replace("FOLDER", str(folder)) for word in LINES[command])]
    assert main([*line, "--json"]) == 0
    out, err = capfd.readouterr()
    assert isinstance(json.loads(out), dict) and len(out.splitlines()) == 1
    assert ("load 99.00" in err) == (command in ("prune", "bench")), "a warning is for stderr"


@pytest.mark.parametrize("command", ["bench", "fit", "prune"])
def test_quiet_commands_show_no_progress(command, folder, looked_at, capfd):
    line = [command, *(word.replace("FOLDER", str(folder)) for word in LINES[command])]
    assert main([*line, "--quiet", *(["--restart"] if "--out" in line and command != "bench" else [])]) == 0
    assert capfd.readouterr() == ("", "")
