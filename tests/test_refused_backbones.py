"""A backbone that cannot be cut by units is refused by callback and command alike, before any training."""

import copy
import re

import lightning.pytorch as pl
import pytest
import torch

from cut import checkpoint
from cut.cli import main
from cut.data.synthetic import Synthetic
from cut.limits import MACs
from cut.model import MultiTaskModel
from cut.network import NetworkConfig
from cut.pruning import Pruning
from tests.test_pruning import fit

# What stops it: the first module of attention within windows.
STOP = r"backbone\.layers_0\.blocks\.0\.attn \(WindowAttention\)"


@pytest.fixture
def swin():
    """A Swin with two tasks, and their data."""
    pl.seed_everything(7, verbose=False)
    data = Synthetic(["seg", "depth"], size=(32, 32), num=8, batch_size=4)
    config = NetworkConfig("swin_tiny_patch4_window7_224", head_width=8, img_size=(32, 32))
    return MultiTaskModel(data.tasks, config), data


class Steps(pl.Callback):
    """Counts the batches of training and validation that were begun."""

    def __init__(self) -> None:
        self.count = 0

    def on_train_batch_start(self, *args):
        self.count += 1

    def on_validation_batch_start(self, *args):
        self.count += 1


def test_the_callback_names_the_module_that_stops_it_before_any_step(swin, tmp_path):
    model, data = swin
    before, steps = copy.deepcopy(model.state_dict()), Steps()
    with pytest.raises(ValueError, match=STOP):
        fit(model, data, [Pruning(MACs(0.5), batches=2, units="channels"), steps], tmp_path, 1)
    assert steps.count == 0
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_the_command_names_the_module_that_stops_it_before_any_work(swin, tmp_path, capsys, monkeypatch):
    def begun(*args, **options):
        raise AssertionError("work was begun")

    for place in ("cut.recovery.recover", "cut.objectives.evaluate", "cut.scores.Sensitivity.__call__"):
        monkeypatch.setattr(place, begun)
    model, _ = swin
    checkpoint.save(model.network, tmp_path / "dense")
    data = tmp_path / "data.yaml"
    data.write_text(
        "data:\n  class_path: cut.data.synthetic.Synthetic\n"
        "  init_args: {tasks: [seg, depth], size: [32, 32], num: 8, batch_size: 4}\n"
    )
    line = ["prune", tmp_path / "dense", "--data", data, "--tasks", "seg", "--units", "channels"]
    assert main([*map(str, line), "--budget", "macs=0.5", "--out", str(tmp_path / "pruned")]) == 2
    said = capsys.readouterr()
    assert re.search(f"^cut: the network cannot be cut by units: {STOP}", said.err, re.MULTILINE) and not said.out
    assert not (tmp_path / "pruned").exists()
