"""The command's front door: help, completion, exit codes, and one line for every bad value."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from cut.cli import COMMANDS, main, parser

OWN = "tests.commands.own_model:setup"
NAMES = [c.__name__.rpartition(".")[2] for c in COMMANDS]


@pytest.mark.parametrize("name", [n for n in NAMES if n != "data"])
def test_help_has_examples_that_parse(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    lines = [line.strip() for line in out.partition("examples:")[2].splitlines() if line.strip()]
    assert lines and all(line.startswith(f"cut {name} ") for line in lines)
    for line in lines:
        args = parser().parse_args(line.partition("     ")[0].split()[1:])
        assert args.command.startswith(name.split("_")[0])


def test_the_command_line_is_read_without_waiting_for_pytorch():
    code = "import sys; from cut.cli import parser; parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_examples_of_the_top_help_parse(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    lines = [x.strip() for x in capsys.readouterr().out.splitlines() if x.startswith("  cut ")]
    assert len(lines) >= 5
    for line in lines:
        parser().parse_args(line.split()[1:])


PRUNE = ["prune", OWN, "--out", "x"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ([], "which command"),
        (["melt"], "melt"),
        (["prune", OWN], "--out"),
        ([*PRUNE, "--sparsity", "1"], "0 <= sparsity < 1"),
        ([*PRUNE, "--sparsity", "much"], "'much'"),
        ([*PRUNE, "--sparsity", "nan"], "'nan'"),
        ([*PRUNE, "--share", "1.5"], "0 to 1"),
        ([*PRUNE, "--floor", "-0.1"], "0 to 1"),
        ([*PRUNE, "--batches", "0"], "at least 1"),
        ([*PRUNE, "--steps", "-1"], "at least 0"),
        ([*PRUNE, "--steps", "1.5"], "whole numbers"),
        ([*PRUNE, "--lr", "0"], "above 0"),
        ([*PRUNE, "--seed", "-3"], "at least 0"),
        ([*PRUNE, "--units", "atoms"], "atoms"),
        ([*PRUNE, "--reduce", "max"], "max"),
        ([*PRUNE, "--rounding", "0"], "at least 1"),
        ([*PRUNE, "--cap", "0"], "above 0"),
        ([*PRUNE, "--inside", "1"], "0 <= sparsity < 1"),
        ([*PRUNE, "--runtime", "tflite"], "tflite"),
        ([*PRUNE, "--threads", "0"], "at least 1"),
        ([*PRUNE, "--budget", "watts=3"], "params, macs, bytes, latency"),
        ([*PRUNE, "--budget", "params"], "a number"),
        ([*PRUNE, "--budget", "params=0"], "above 0"),
        ([*PRUNE, "--budget", "params=1e400"], "finite"),
        ([*PRUNE, "--budget", "macs=0.0005k"], "above 1"),
        ([*PRUNE, "--budget", "params=2e6ms"], "a number, then"),
        ([*PRUNE, "--budget", "macs=1.5x"], "a share"),
        ([*PRUNE, "--budget", "latency=20"], "ms, s"),
        ([*PRUNE, "--budget", "latency=0ms"], "above 0"),
        (["info", OWN, "--depth", "-1"], "at least 0"),
        (["bench", OWN, "--threads", "0"], "at least 1"),
        (["bench", OWN, "--repeats", "0"], "at least 1"),
        (["fit", OWN, "--out", "x", "--lr", "-1"], "above 0"),
        (["export", OWN, "--out", "x.onnx", "--batches", "0"], "at least 1"),
        (["--print-completion", "fish"], "fish"),
    ],
)
def test_bad_value_is_refused_while_reading_the_line(line, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(line)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert not out and message in err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (PRUNE, "how much to cut"),
        ([*PRUNE, "--sparsity", "0.9", "--floor", "0.2"], "--floor up to 0.1"),
        ([*PRUNE, "--sparsity", "0.9", "--tasks", "pose"], "unknown task 'pose'"),
        ([*PRUNE, "--sparsity", "0.9", "--tasks", "seg", "seg"], "selected twice"),
        ([*PRUNE, "--budget", "params=2", "--budget", "params=3"], "given twice"),
        ([*PRUNE, "--budget", "params=2"], "out of reach"),
        ([*PRUNE, "--sparsity", "0.5", "--threads", "2"], "only with --budget latency"),
        ([*PRUNE, "--units", "channels", "--sparsity", "0.5", "--cap", "0.3", "--floor", "0.6"], "floor up to the cap"),
        ([*PRUNE, "--units", "channels", "--budget", "bytes=1kB"], "a budget of 1000 bytes is out of reach"),
        ([*PRUNE, "--budget", "macs=0.5"], "use --units channels"),
        ([*PRUNE, "--budget", "bytes=4MB"], "use --units channels"),
        ([*PRUNE, "--budget", "latency=0.5x"], "use --units channels"),
        ([*PRUNE, "--sparsity", "0.5", "--cap", "0.5"], "only with --units channels"),
        ([*PRUNE, "--units", "channels", "--budget", "macs=0.001"], "out of reach"),
        (["bench", "missing"], "no model"),
        ([*PRUNE, "--sparsity", "0.9", "--data", "cut.data.rooms.Rooms"], "brings its own data"),
        ([*PRUNE, "--sparsity", "0.9", "--weights", "nowhere"], "nowhere holds no model"),
        ([*PRUNE, "--sparsity", "0.9", "--device", "abacus"], "--device abacus"),
        (["info", "nowhere"], "no model 'nowhere'"),
        (["info", "tests"], "tests holds no model"),
        (["info", "pyproject.toml"], "no model 'pyproject.toml'"),
        (["info", "nomodule:setup"], "no module 'nomodule'"),
        (["info", "tests.commands.own_model:nothing"], "no function 'nothing'"),
        (["info", "tests.commands.own_model:number"], "is int"),
        (["info", "tests.commands.own_model:short"], "it must return (model, loader, tasks, example)"),
        (["info", "tests.commands.own_model:untold"], "no loss for task"),
        (["info", "tests.commands.own_model:odd"], "task 'depth'"),
        (["info", "tests.commands.own_model:misdescribed"], "kind 'depth'; allowed for its output"),
        (["info", "tests.commands.own_model:described_too_much"], "no loss for task 'pose'"),
        (["predict", OWN, "docs/images/none.jpg"], "docs/images/none.jpg"),
        (["predict", "nowhere", "docs/images/room.jpg"], "no model 'nowhere'"),
        (["predict", OWN, "docs/images/room.jpg", "--weights", "nowhere"], "nowhere holds no model"),
        (["predict", "x.onnx", "docs/images/room.jpg", "--weights", "nowhere"], "allowed only for module:function"),
        (["fit", "tests.commands.own_model:exploding", "--steps", "2", "--out", "x"], "'depth' is nan at step 0"),
        (["fit", "no_such_backbone", "--out", "x"], "a timm name"),
        (
            ["fit", "levit_128s", "--data", "cut.data.synthetic.Synthetic", "--out", "x"],
            "takes no pictures of",
        ),
        (["export", OWN, "--out", "x.tflite"], "allowed"),
        (["compact", OWN, "--tasks", "pose", "--out", "x"], "unknown task 'pose'"),
        (["bench", "missing.onnx"], "missing.onnx"),
        (["bench", "docs", "--weights", "nowhere"], "--weights nowhere: allowed only for module:function"),
        (["bench", OWN, OWN, "--weights", "nowhere"], "allowed: 2 times"),
        (["bench", "x", "--builder", "mine"], "--builder mine; allowed: module:function"),
        (["bench", "x", "--builder", "nomodule:setup"], "no module 'nomodule'"),
        (["bench", OWN, "--data", "nowhere.yaml"], "--data nowhere.yaml"),
        (["bench", OWN, "--data", "tests.commands.own_model:short"], "it must return"),
    ],
)
def test_bad_request_is_one_line_and_exit_code_2_and_leaves_nothing(line, message, capsys, tmp_path, monkeypatch):
    line = [str(tmp_path / p) if p == "x" else p for p in line]
    assert main(line) == 2
    out, err = capsys.readouterr()
    assert not out and message in err and err.startswith("cut: ") and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_stopping_is_exit_code_130(monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("cut.commands.opening.open_source", stop)
    assert main(["info", "anything"]) == 130
    assert "stopped" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_every_command_and_option(shell, capsys):
    pytest.importorskip("shtab")
    assert main(["--print-completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in NAMES) and (shell == "tcsh" or "--sparsity" in script)


@pytest.fixture(scope="module")
def bash(tmp_path_factory):
    """A folder with some files and the completion script of bash."""
    pytest.importorskip("shtab")
    folder = tmp_path_factory.mktemp("bash")
    script = subprocess.run([sys.executable, "-m", "cut", "--print-completion", "bash"], capture_output=True, text=True)
    (folder / "complete").write_text(script.stdout)
    for name in ("own.onnx", "own.yaml", "room.jpg"):
        (folder / name).write_text("")
    (folder / "own-runs").mkdir()
    return folder


def completed(line: str, folder) -> set[str]:
    """What bash offers when the tab key is pressed at the end of a line."""
    words = line.split(" ")
    ask = """source complete; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
        _shtab_cut cut "${COMP_WORDS[-1]}" "${COMP_WORDS[-2]}"; printf '%s\\n' "${COMPREPLY[@]}" """
    found = subprocess.run(["bash", "-c", ask, "bash", *words], cwd=folder, capture_output=True, text=True)
    assert not found.stderr.strip()
    return set(found.stdout.split())


OWNS = {"own.onnx", "own.yaml", "own-runs"}


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("cut pru", {"prune"}),
        ("cut prune own --spars", {"--sparsity"}),
        ("cut predict own", OWNS),
        ("cut predict own.onnx ro", {"room.jpg"}),
        ("cut predict own.onnx room.jpg --out ro", {"room.jpg"}),
        ("cut info own", OWNS),
        ("cut bench own.onnx own", OWNS),
        ("cut prune mine:setup --weights own", {"own-runs"}),
        ("cut prune own-runs --data own", OWNS),
        ("cut prune own-runs --out own", {"own-runs"}),
        ("cut export own-runs --out own", OWNS),
        ("cut newtask own-runs --library own", {"own-runs"}),
        ("cut data check own", {"own-runs"}),
        ("cut prune own-runs --units ", {"weights", "channels"}),
    ],
)
def test_bash_completes_commands_options_and_paths(line, offered, bash):
    assert completed(line, bash) == offered


def test_module_and_function_are_one_word_to_bash(bash):
    ask = """COMP_WORDBREAKS=' >&:='; source complete; printf '%s' "$COMP_WORDBREAKS" """
    assert subprocess.run(["bash", "-c", ask], cwd=bash, capture_output=True, text=True).stdout == " >&="


def test_every_argument_that_is_a_path_completes():
    """An argument whose help names a file or folder, or whose value is a path."""
    shtab = pytest.importorskip("shtab")
    kinds = (shtab.FILE, shtab.DIRECTORY)

    def arguments(top):
        for action in top._actions:
            if isinstance(action, argparse._SubParsersAction):
                for one in action.choices.values():
                    yield from arguments(one)
            else:
                yield action

    found = list(arguments(parser()))
    paths = [a for a in found if a.type is Path or a.metavar in ("MODEL", "PATH", "FOLDER", "DATA", "PICTURE")]
    assert len(paths) > 20
    assert [a.dest for a in paths if getattr(a, "complete", None) not in kinds] == []
