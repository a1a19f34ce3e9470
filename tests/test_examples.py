"""The worked example: short, and it does what it says."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cut
from cut import speed
from cut.cost import cost
from cut.search import Reading

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples/half_latency.py"


def check(folder):
    """The folder holds a compact model with the two tasks, smaller than the dense one, and its file in ONNX."""
    pytest.importorskip("onnxruntime")
    from cut.export import parity

    script = runpy.run_path(str(SCRIPT))
    dense, image = script["Net"]().eval(), script["pictures"](99)["image"]
    small = cut.load(folder, script["Net"])
    assert set(small(image)) == {"seg", "depth"}
    assert cost(small, image).macs < 0.75 * cost(dense, image).macs
    assert max(parity(folder / "half.onnx", small, [image]).values()) < 1e-3
    return small, script


def test_it_has_at_most_60_lines_and_knows_nothing_of_lightning():
    text = SCRIPT.read_text()
    assert len(text.splitlines()) <= 60
    assert "lightning" not in text.lower() and "torch_pruning" not in text


def test_it_cuts_to_half_by_a_clock_that_counts(tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(speed, "clock", lambda build, dense, target, **_: lambda d: Reading(d, d, d))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(tmp_path / "half"), "2"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    said = re.search(r"half.onnx takes (0\.\d+) of", capsys.readouterr().out)
    assert 0.4 < float(said[1]) <= 0.5
    check(tmp_path / "half")


@pytest.mark.slow
def test_it_really_takes_half_the_time_and_still_works(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(SCRIPT), str(tmp_path / "half")], check=True, env=environment)
    small, script = check(tmp_path / "half")
    batch = script["pictures"](1234, 32)
    with torch.no_grad():
        outputs = small(batch["image"])
    wall = float((batch["seg"] == 0).float().mean())
    assert float((outputs["seg"].argmax(1) == batch["seg"]).float().mean()) > wall
    guess = float((batch["depth"] - batch["depth"].median()).abs().mean())
    assert float((outputs["depth"] - batch["depth"]).abs().mean()) < guess
    assert json.loads((tmp_path / "half/model.json").read_text())["tasks"] is not None
