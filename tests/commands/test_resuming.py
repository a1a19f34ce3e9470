"""A command that was stopped goes on: same weights as without, nothing left over, never by mistake."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from cut import checkpoint, recovery
from cut.cli import main
from cut.commands.terminal import Terminal
from cut.snapshot import Snapshot
from tests.commands.own_model import Net

OWN = "tests.commands.own_model:setup"
FIT = ["fit", OWN, "--steps", "9", "--lr", "0.01"]
PRUNE = ["prune", OWN, "--tasks", "seg", "depth", "--sparsity", "0.5", "--batches", "2", "--steps", "9", "--lr", "0.01"]
CHANNELS = [*PRUNE, "--units", "channels", "--budget", "macs=0.6"]
FITTED = [*CHANNELS, "--rounds", "2", "--reconstruct", "2"]
COMMANDS = {"fit": FIT, "prune": PRUNE, "channels": CHANNELS, "fitted": FITTED}


class KilledError(BaseException):
    """Nothing that a command would catch."""


@pytest.fixture(autouse=True)
def _kept_at_every_step(monkeypatch):
    monkeypatch.setattr(recovery, "SECONDS", 0.0)


def stop_at(monkeypatch, what: str, count: int, error=KilledError):
    """Raise when the command takes its ``count``-th item of a kind of work."""
    track = Terminal.track

    def tracked(self, items, label):
        for i, item in enumerate(track(self, items, label)):
            if label.endswith(what) and i == count:
                raise error
            yield item

    monkeypatch.setattr(Terminal, "track", tracked)


def run(line, out) -> int:
    return main([*line, "--out", str(out), "--quiet"])


def left(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def same(one, two) -> bool:
    a, b = (checkpoint.load(folder, Net).state_dict() for folder in (one, two))
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


WHERE = [
    ("fit", "training", 4),
    ("fit", "evaluating", 1),
    ("prune", "dense model", 1),
    ("prune", "scoring", 1),
    ("prune", "tuning", 0),
    ("prune", "tuning", 6),
    ("prune", "pruned model", 1),
    ("channels", "tuning", 4),
    ("fitted", "fitting", 1),
    ("fitted", "tuning", 0),
    ("fitted", "tuning", 4),
]


@pytest.mark.parametrize(("command", "what", "count"), WHERE)
def test_killed_command_ends_as_if_it_had_not_been(command, what, count, tmp_path, monkeypatch, capsys):
    line = COMMANDS[command]
    assert run(line, tmp_path / "straight") == 0
    with monkeypatch.context() as patch:
        patch.setattr(recovery, "SECONDS", 0.0)
        stop_at(patch, what, count)
        with pytest.raises(KilledError):
            run(line, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    assert main([*line, "--out", str(tmp_path / "m"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert left(tmp_path) == ["m", "straight"] and same(tmp_path / "m", tmp_path / "straight")
    facts = [checkpoint.read_metadata(tmp_path / n).get("cut") for n in ("m", "straight")]
    assert facts[0] == facts[1]
    assert told.get("seconds", told.get("finetune_seconds")) >= 0


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, "tuning", 6)
        with pytest.raises(KilledError):
            run(PRUNE, tmp_path / "m")
    done = []
    track = Terminal.track

    def counted(self, items, label):
        for item in track(self, items, label):
            done.append(label)
            yield item

    monkeypatch.setattr(Terminal, "track", counted)
    assert run(PRUNE, tmp_path / "m") == 0
    assert done.count("fine-tuning") == 3 and "scoring" not in done and "dense model" not in done


def test_found_latency_is_kept(tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxscript")
    from cut import speed
    from cut.search import Reading

    monkeypatch.setattr(speed, "clock", lambda build, dense, target, **_: lambda d: Reading(d, 0.9 * d, 1.1 * d))
    line = [*PRUNE[:4], "depth", "--steps", "3", "--units", "channels", "--budget", "latency=0.5x"]
    with monkeypatch.context() as patch:
        stop_at(patch, "tuning", 2)
        with pytest.raises(KilledError):
            run(line, tmp_path / "m")
    (tmp_path / "m.latency.json").unlink()
    monkeypatch.setattr(speed, "clock", None)  # no model is timed any more
    assert main([*line, "--out", str(tmp_path / "m"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["latency"]
    assert 0.4 < found["reading"]["value"] <= 0.5 and len(found["readings"]) > 1


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (["--lr", "0.02"], "--lr was 0.01, now it is 0.02"),
        (["--sparsity", "0.6"], "--sparsity was 0.5"),
        (["--seed", "1"], "--seed was 0"),
        (["--floor", "0.1"], "--floor was None"),
    ],
)
def test_other_options_are_refused_until_one_restarts(other, words, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_at(patch, "tuning", 4)
        with pytest.raises(KilledError):
            run(PRUNE, tmp_path / "m")
    content = (tmp_path / "m.resume.pt").read_bytes()
    assert run([*PRUNE, *other], tmp_path / "m") == 2
    err = capsys.readouterr().err
    assert words in err and "--restart" in err and len(err.splitlines()) == 1
    assert left(tmp_path) == ["m.resume.pt"] and (tmp_path / "m.resume.pt").read_bytes() == content
    assert run([*PRUNE, *other, "--restart"], tmp_path / "m") == 0
    assert run([*PRUNE, *other], tmp_path / "straight") == 0
    assert left(tmp_path) == ["m", "straight"] and same(tmp_path / "m", tmp_path / "straight")


def test_another_model_is_refused(tmp_path, monkeypatch, capsys):
    assert run([*FIT[:2], "--steps", "2"], tmp_path / "other") == 0
    with monkeypatch.context() as patch:
        stop_at(patch, "training", 4)
        with pytest.raises(KilledError):
            run([*FIT, "--weights", str(tmp_path / "other")], tmp_path / "m")
    assert run([*FIT[:2], "--steps", "3"], tmp_path / "other") == 0
    assert run([*FIT, "--weights", str(tmp_path / "other")], tmp_path / "m") == 2
    assert "weights of the model was" in capsys.readouterr().err


@pytest.mark.parametrize("size", [0, 100, 3000])
def test_damaged_file_is_told_of_and_the_command_begins_anew(size, tmp_path, monkeypatch, caplog):
    assert run(FIT, tmp_path / "straight") == 0
    with monkeypatch.context() as patch:
        stop_at(patch, "training", 4)
        with pytest.raises(KilledError):
            run(FIT, tmp_path / "m")
    content = (tmp_path / "m.resume.pt").read_bytes()
    (tmp_path / "m.resume.pt").write_bytes(content[:size])
    assert run(FIT, tmp_path / "m") == 0
    assert len(caplog.records) == 1 and "m.resume.pt is damaged" in caplog.text
    assert left(tmp_path) == ["m", "straight"] and same(tmp_path / "m", tmp_path / "straight")


def test_interrupt_says_that_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recovery, "SECONDS", 1e9)  # it is kept because of the interrupt
    with monkeypatch.context() as patch:
        track = Terminal.track

        def tracked(self, items, label):
            for i, item in enumerate(track(self, items, label)):
                if i == 4:
                    signal.raise_signal(signal.SIGINT)
                yield item

        patch.setattr(Terminal, "track", tracked)
        assert run(FIT, tmp_path / "m") == 130
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "the same command goes on" in err and "--restart" in err
    assert main([*FIT, "--out", str(tmp_path / "m")]) == 0
    assert "5 of 9 steps" in capsys.readouterr().err
    assert run(FIT, tmp_path / "straight") == 0 and same(tmp_path / "m", tmp_path / "straight")


def test_interrupt_before_anything_is_kept_promises_nothing(tmp_path, monkeypatch, capsys):
    stop_at(monkeypatch, "dense model", 0, KeyboardInterrupt)
    assert run(PRUNE, tmp_path / "m") == 130
    assert capsys.readouterr().err == "cut: stopped\n" and not left(tmp_path)


def test_bad_input_after_training_began_keeps_what_was_trained(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, "evaluating", 0, ValueError)
        assert run(FIT, tmp_path / "m") == 2
    assert left(tmp_path) == ["m.resume.pt"]


def test_help_says_it_once(capsys):
    for name in ("fit", "prune"):
        with pytest.raises(SystemExit):
            main([name, "--help"])
        assert capsys.readouterr().out.count("same command goes on") == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill", "interrupt"])
def test_killed_process_goes_on(number, tmp_path):
    (tmp_path / "slow.py").write_text(
        "import sys, time\nfrom cut import recovery\nfrom cut.cli import main\n"
        "recovery.SECONDS, total = 0.0, recovery._total\n"
        "recovery._total = lambda *a: (time.sleep(0.05), total(*a))[1]\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    line = [*PRUNE[:-3], "60", "--lr", "0.01"]
    command = [sys.executable, str(tmp_path / "slow.py"), *line, "--quiet", "--out"]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, str(tmp_path / "out/m")], env=environment, stderr=subprocess.PIPE, text=True)
    file = tmp_path / "out/m.resume.pt"
    for _ in itertools.takewhile(lambda _: process.poll() is None, range(600)):
        if file.exists() and file.stat().st_size > 30_000:  # training has begun
            break
        time.sleep(0.1)
    process.send_signal(number)
    err = process.communicate()[1]
    assert process.returncode == (130 if number == signal.SIGINT else -number), err
    assert (number != signal.SIGINT) or ("goes on" in err and len(err.splitlines()) == 1)
    stopped = Snapshot.__new__(Snapshot)
    stopped.path = file
    assert 0 < len(stopped._read()["sections"]["training"]["history"]) < 60
    assert subprocess.run([*command, str(tmp_path / "out/m")], env=environment).returncode == 0
    assert run(line, tmp_path / "straight") == 0
    assert left(tmp_path / "out") == ["m"] and same(tmp_path / "out/m", tmp_path / "straight")
