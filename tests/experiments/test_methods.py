"""Every method of configs/pruning end to end: from one dense run, in three parts, to its exact budget."""

import json
import math

import pytest
import torch
import yaml

from cut.records import read
from experiments.cell import CONFIGS
from experiments.run import run
from tests.test_configs import line

# Depthwise and grouped convolutions, residual adds, batch norm: what pruning has to cope with, at 0.1 M weights.
TINY = {"backbone": "test_efficientnet", "weights": None, "output_stride": None, "head": "light", "head_width": 8}
METHODS = sorted(p.stem for p in (CONFIGS / "pruning").glob("*.yaml"))
TASKS = ["seg", "normal", "edge"]


def arguments(method, folder, epochs, *more):
    return [
        *line("trainer/default", "data/synthetic", "model/mobilenetv2", f"pruning/{method}", "logger/none"),
        "--data.init_args.num=16",
        f"--model.init_args.network={json.dumps(TINY)}",
        f"--trainer.max_epochs={epochs}",
        f"--trainer.check_val_every_n_epoch={epochs}",
        "--trainer.num_sanity_val_steps=0",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--export=false",
        f"--out={folder / method}",
        f"--records={folder / 'records'}",
        *more,
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    library = {"class_path": "experiments.experts.FillLibrary", "init_args": {"batches": 1, "share": None}}
    run(arguments("dense", folder, 1, "--snapshots=[0]", f"--trainer.callbacks={json.dumps([library])}"))
    snapshot = folder / "dense/epoch-0.ckpt"
    snapshot.with_name("epoch-5.ckpt").write_bytes(snapshot.read_bytes())
    return folder


def weights_left(record, state):
    """Component to its number of weights that are not cut, and of all its weights."""
    found = {}
    for name, cut in record.layer_sparsity.items():
        size = state[f"network.{name}"].numel()
        kept, whole = found.get(record.layer_component[name], (0, 0))
        found[record.layer_component[name]] = (kept + round((1 - cut) * size), whole + size)
    return found


def share_is_cut(record, left, options):
    """Of all weights a share, to less than one weight."""
    kept, whole = (sum(x) for x in zip(*left.values(), strict=True))
    assert abs(kept - (1 - options["target"]) * whole) <= 1
    assert record.sparsity["kept"] == pytest.approx(options["target"], abs=1 / whole)


def number_is_left(record, left, options):
    """So many weights, exactly."""
    assert sum(kept for kept, _ in left.values()) == options["target"]


def votes_are_spent(record, left, options):
    """Every task has a share of its weights to give votes to; what is shared takes several, what is its own one."""
    votes = sum(int(options["ratio"] * (left["backbone"][1] + left[t][1])) for t in record.tasks)
    spent = options["votes"] * left["backbone"][0] + sum(left[t][0] for t in record.tasks)
    assert 0.5 * votes < spent <= votes


def operations_are_cut(record, left, options):
    """No more multiply-accumulates than the share of the dense model's, and no more than a unit or two fewer."""
    dense, compact = (record.cost[form]["macs"] for form in ("kept_heads", "compact"))
    assert 0.95 * options["target"] * dense <= compact <= options["target"] * dense


CHECKS = {
    "Sparsity": share_is_cut,
    "LayerSparsity": share_is_cut,
    "Weights": number_is_left,
    "KeepRatio": votes_are_spent,
    "MACs": operations_are_cut,
}


@pytest.mark.parametrize("method", [m for m in METHODS if m != "dense"])
def test_every_method_reaches_its_budget_end_to_end(method, folder):
    content = yaml.safe_load((CONFIGS / f"pruning/{method}.yaml").read_text())
    assert content["method"] == method, "a method's file is called by its name"
    tasks = TASKS[:1] if method == "separate" else TASKS
    more = [f"--pruning.tasks={json.dumps(tasks)}", "--pruning.batches=2", f"--init={folder / 'dense'}"]
    if method == "separate":
        more.append("--pruning.budget.init_args.target=9000")
    record = read(run(arguments(method, folder, 6, *more)))
    state = torch.load(folder / method / "last.ckpt", weights_only=True)["state_dict"]
    assert record.method == method and record.tasks == tasks
    assert all(math.isfinite(v) for split in record.metrics.values() for v in split.values())
    assert all(torch.isfinite(v).all() for v in state.values())
    budget = content["pruning"].get("budget")
    left = weights_left(record, state)
    if budget is None:
        assert record.sparsity["kept"] == 0
    else:
        kind, options = budget["class_path"].rpartition(".")[2], budget["init_args"]
        if method == "separate":
            options = {**options, "target": 9000}
        CHECKS[kind](record, left, options)
        named = {f"network.{n}": s for n, s in record.layer_sparsity.items()}
        zeros = {n: float((state[n] == 0).float().mean()) for n in named}
        assert all(zeros[n] >= s - 1e-6 for n, s in named.items()), "what the mask cuts is zero after the training"
