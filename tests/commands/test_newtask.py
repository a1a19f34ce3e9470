"""``cut newtask``: fill a library from a dense model's tasks, then cut the model for a task that it does not know."""

import json

import pytest
import torch

from cut import checkpoint
from cut.cli import main
from cut.decomposition import prunable
from cut.library import Library
from cut.network import MultiTaskNet, NetworkConfig
from cut.stub import TaskSubset
from tests.commands.own_model import Net

OWN = "tests.commands.own_model:setup"


def told(capsys, *line):
    """What a command printed as JSON, after it worked."""
    assert main([*map(str, line), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def refused(capsys, said, *line):
    assert main([*map(str, line)]) == 2
    assert said in capsys.readouterr().err


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A YAML of small pictures, and a dense network of ours for two of its tasks."""
    folder = tmp_path_factory.mktemp("newtask")
    (folder / "data.yaml").write_text(
        "class_path: cut.data.synthetic.Synthetic\ninit_args: {size: [32, 32], num: 16, batch_size: 4}\n"
    )
    torch.manual_seed(0)
    config = NetworkConfig("test_resnet", head_width=8)
    network = MultiTaskNet({"seg": 8, "depth": 1, "edge": 1}, [], config).eval()
    checkpoint.save(network, folder / "dense")
    return folder


@pytest.fixture(scope="module")
def library(small):
    line = ["newtask", small / "dense", "--data", small / "data.yaml", "--library", small / "library", "--fill"]
    assert main([*map(str, line), "--sparsity", "0.8", "--batches", "2", "--quiet"]) == 0
    return small / "library"


def line_of(small, library, *more):
    return ["newtask", small / "dense", "--data", small / "data.yaml", "--library", library, "--task", "normal", *more]


def test_filling_adds_a_mask_and_ranks_of_every_task(library):
    entries = Library(library).entries()
    assert sorted(e.task for e in entries) == ["depth", "edge", "seg"]
    assert all(e.ranks is not None and e.units == "weights" and 0 < e.density < 1 for e in entries)
    assert all(n.startswith("backbone.") for e in entries for n in e.mask)


def test_new_task_gets_a_head_and_the_sparsity_asked_for(small, library, capsys, tmp_path):
    out = tmp_path / "normal"
    facts = told(capsys, *line_of(small, library, "--sparsity", 0.9, "--steps", 3, "--k", 2, "--out", out))
    assert facts["tasks"] == ["normal"] and facts["sparsity"]["kept"] == pytest.approx(0.9, abs=1e-3)
    assert len(facts["neighbours"]) == 2 and sum(facts["neighbours"].values()) == pytest.approx(1)
    assert set(facts["similarity"]["values"]) == set(Library(library).names())
    network = checkpoint.load(out)
    assert list(network(torch.zeros(1, 3, 32, 32))) == ["normal"]
    assert checkpoint.read_metadata(out)["cut"]["neighbours"] == facts["neighbours"]
    assert main(["compact", str(out), "--data", str(small / "data.yaml"), "--out", str(tmp_path / "s"), "-q"]) == 0
    assert set(checkpoint.load(tmp_path / "s").heads) == {"normal"}


def test_without_steps_the_weights_left_are_the_pretrained_ones(small, library, capsys, tmp_path):
    told(capsys, *line_of(small, library, "--sparsity", 0.7, "--steps", 0, "--out", tmp_path / "o"))
    dense, found = prunable(checkpoint.load(small / "dense")), prunable(checkpoint.load(tmp_path / "o"))
    shared = [n for n in dense if n.startswith("backbone.")]
    assert all(torch.equal(found[n], dense[n] * (found[n] != 0)) for n in shared)


@pytest.mark.parametrize("options", [["--similarity", "all"], ["--similarity", "cka"], ["--similarity", "gradient"]])
def test_other_similarities_work(options, small, library, capsys, tmp_path):
    more = ["--sparsity", 0.8, "--steps", 0, "--k", 1, "--soft", "--tie", "taylor", "--out", tmp_path / "o"]
    facts = told(capsys, *line_of(small, library, *more, *options))
    assert len(facts["neighbours"]) == (3 if "all" in options else 1)


def test_channels_to_a_number_of_bytes(small, capsys, tmp_path):
    base = ["newtask", small / "dense", "--data", small / "data.yaml", "--library", tmp_path / "library"]
    more = ["--units", "channels", "--batches", 1]
    told(capsys, *base, "--fill", "--budget", "macs=0.5", *more)
    assert {e.units for e in Library(tmp_path / "library").entries()} == {"channels"}
    limit = 250_000
    new = ["--task", "normal", "--budget", f"bytes={limit}", "--steps", 1, "--out", tmp_path / "o"]
    told(capsys, *base, *new, *more)
    small_one = tmp_path / "small"
    facts = told(capsys, "compact", tmp_path / "o", "--data", small / "data.yaml", "--out", small_one)
    assert 0.8 * limit < facts["after"]["bytes"] <= limit


def test_ones_own_model(capsys, tmp_path):
    base = ["newtask", OWN, "--library", tmp_path / "library"]
    told(capsys, *base, "--fill", "--sparsity", 0.6, "--batches", 2)
    line = [*base, "--task", "count", "--sparsity", 0.7, "--steps", 2, "--k", 2, "--out", tmp_path / "o"]
    facts = told(capsys, *line)
    network = checkpoint.load(tmp_path / "o", Net)
    assert isinstance(network, TaskSubset) and list(network.tasks) == ["count"]
    assert facts["sparsity"]["kept"] == pytest.approx(0.7, abs=0.01)
    refused(capsys, "unknown task 'colour'", *[v if v != "count" else "colour" for v in line])


def test_what_is_wrong_is_told_in_one_line(small, library, capsys, tmp_path):
    out = ["--out", tmp_path / "o", "--steps", 0]
    plain = ["--sparsity", 0.9, *out]
    refused(capsys, "is empty", *line_of(small, tmp_path / "none", *plain))
    refused(capsys, "has this task already", *[v if v != "normal" else "seg" for v in line_of(small, library, *plain)])
    refused(capsys, "how much to cut", *line_of(small, library, *out))
    refused(capsys, "--out is missing", *line_of(small, library, "--sparsity", 0.9))
    refused(capsys, "floor", *line_of(small, library, *plain, "--floor", 0.3))
    refused(capsys, "latency", *line_of(small, library, *out, "--units", "channels", "--budget", "latency=1ms"))
    refused(capsys, "allowed: whole numbers", *line_of(small, library, *plain, "--similarity", "leep"))
    refused(capsys, "out of reach", *line_of(small, library, *out, "--units", "channels", "--budget", "macs=0.001"))
    torch.manual_seed(1)
    other = MultiTaskNet({"seg": 8, "depth": 1}, [], NetworkConfig("test_resnet", head_width=8)).eval()
    checkpoint.save(other, tmp_path / "other")
    line = [v if v != small / "dense" else tmp_path / "other" for v in line_of(small, library, *plain)]
    refused(capsys, "another pre-trained model", *line)
    assert not (tmp_path / "o").exists()
