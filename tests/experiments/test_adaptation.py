"""Adaptation: a fresh head over a frozen backbone, the clock and the curve of a run for a task its start never saw."""

import copy
import json

import pytest
import torch

from cut import checkpoint
from cut.data.labelgroups import find, groups
from cut.library import Library
from cut.network import MultiTaskNet, NetworkConfig
from cut.newcomer import Newcomer
from cut.records import read
from cut.similarity import LEEP, GradientCosine
from experiments.adaptation import Adaptation, load_backbone
from experiments.experts import EXPERTS, LIBRARY, WithExperts, any_loss
from experiments.probe import fit_head
from experiments.run import run
from tests.data.idx_files import write_sets
from tests.test_configs import line

TINY = {"backbone": "test_efficientnet", "weights": None, "output_stride": None, "head": "light", "head_width": 8}
LIBRARIES = {"class_path": "experiments.experts.FillLibrary", "init_args": {"batches": 1}}


def arguments(folder, name, tasks, *more):
    return [
        *line("trainer/default", "data/synthetic", "model/mobilenetv2", *more[:1], "logger/none"),
        "--data.init_args.num=16",
        f"--data.init_args.tasks={json.dumps(tasks)}",
        f"--model.init_args.network={json.dumps(TINY)}",
        "--trainer.num_sanity_val_steps=0",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--export=false",
        f"--out={folder / name}",
        f"--records={folder / 'records'}",
        *more[1:],
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dense run of two tasks with its libraries."""
    folder = tmp_path_factory.mktemp("adaptation")
    more = ["--trainer.max_epochs=1", f"--trainer.callbacks={json.dumps([LIBRARIES])}"]
    run(arguments(folder, "dense", ["seg", "normal"], "pruning/dense", *more))
    return folder


def adapted(folder, method, name, *more):
    callback = {"class_path": "experiments.adaptation.Adaptation", "init_args": {"at": [0, 1, 4], "head_steps": 2}}
    options = ["--trainer.max_epochs=2", "--trainer.limit_train_batches=2", "--trainer.check_val_every_n_epoch=100"]
    options += [f"--trainer.callbacks={json.dumps([callback])}", f"--init={folder / 'dense'}", "--pruning.batches=1"]
    return read(run(arguments(folder, name, ["edge"], method, *options, *more)))


def test_the_head_is_fitted_and_nothing_else_changes():
    torch.manual_seed(0)
    network = MultiTaskNet({"a": 3, "b": 2}, ["a"], NetworkConfig("test_efficientnet"))
    network.train()
    before = copy.deepcopy(network.state_dict())
    batches = [{"image": torch.randn(8, 3, 32, 32), "a": torch.arange(8) % 3} for _ in range(2)]

    def loss(out, batch):
        return torch.nn.functional.cross_entropy(out, batch["a"])

    with torch.no_grad():
        network.eval()
        first = sum(float(loss(network(b["image"])["a"], b)) for b in batches)
        network.train()
    fit_head(network, "a", batches, loss, 30, 1e-2)
    after = network.state_dict()
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed == {n for n in before if n.startswith("heads.a.")}
    assert all(m.training for m in network.modules()) and all(p.grad is None for p in network.parameters())
    with torch.no_grad():
        network.eval()
        assert sum(float(loss(network(b["image"])["a"], b)) for b in batches) < first


def test_a_dense_run_leaves_a_library_of_each_kind(folder):
    for units in ("weights", "channels"):
        entries = Library(folder / "dense" / LIBRARY / units).entries()
        assert sorted(e.task for e in entries) == ["normal", "seg"] and all(e.units == units for e in entries)
        assert all(0 < e.density < 1 and e.ranks is not None for e in entries)


def test_a_dense_run_on_label_groups_leaves_a_classifier_and_a_mask_of_each_group(tmp_path):
    write_sets(tmp_path / "sets", 4)
    options = {"batches": 1, "steps": 2, "batch_size": 8}
    callbacks = [{"class_path": "experiments.experts.GroupLibrary", "init_args": options}]
    of = find("fashion-base")
    run(
        [
            *line("trainer/default", "data/labelgroups", "model/small_cnn", "pruning/dense", "logger/none"),
            f"--data.init_args.group={of.name}",
            f"--data.init_args.root={tmp_path / 'sets'}",
            "--data.init_args.per_class=8",
            "--data.init_args.held_per_class=2",
            f"--model.init_args.network={json.dumps(TINY)}",
            f"--pruning.tasks=[{of.name}]",
            f"--trainer.callbacks={json.dumps(callbacks)}",
            "--trainer.max_epochs=1",
            "--trainer.num_sanity_val_steps=0",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
            "--export=false",
            f"--out={tmp_path / 'dense'}",
            f"--records={tmp_path / 'records'}",
        ]
    )
    expected = {g.name: len(g.classes) for g in groups("fashion-mnist").library}
    entries = Library(tmp_path / "dense" / LIBRARY / "weights").entries()
    assert {e.task for e in entries} == set(expected) and len(entries) == len(expected)
    assert all(0 < e.density < 1 and e.ranks is None for e in entries)
    assert len({e.digest for e in entries}) > 1  # each group was scored for itself
    experts, dense = (checkpoint.load(tmp_path / "dense" / part).state_dict() for part in (EXPERTS, "compact"))
    shared = [n for n in dense if n.startswith("backbone.")]
    assert shared and all(torch.equal(experts[n], dense[n]) for n in shared)
    for name, classes in expected.items():
        head = [v for n, v in experts.items() if n.startswith(f"heads.{name}.") and n.endswith("bias")]
        assert head[-1].shape == (classes,)


@pytest.mark.parametrize("units", ["weights", "channels"])
def test_neighbours_prune_for_a_task_that_the_start_never_saw(units, folder):
    more = [f"--pruning.scorer.init_args.library={LIBRARY}/{units}", "--pruning.scorer.init_args.k=1"]
    if units == "channels":
        budget = {"class_path": "cut.limits.Bytes", "init_args": {"target": 0.5}}
        more += ["--pruning.units=channels", f"--pruning.budget={json.dumps(budget)}"]
    record = adapted(folder, "pruning/similar-tasks", units, *more)
    facts = record.newtask
    assert record.tasks == ["edge"] == [facts["task"]] and record.start
    assert [p["step"] for p in facts["curve"]] == [0, 1, 4]
    assert {k: v for k, v in facts["curve"][-1].items() if k == "test/edge/l1"} == {
        "test/edge/l1": pytest.approx(record.metrics["test"]["edge/l1"], abs=1e-6)
    }
    assert 0 < facts["head_seconds"] <= facts["ready_seconds"] and facts["ready_memory"] >= 0
    names = set(Library(folder / "dense" / LIBRARY / units).names())
    assert set(facts["similarities"]) == names and len(facts["neighbours"]) == 1
    if units == "weights":
        assert record.sparsity["kept"] == pytest.approx(0.9, abs=1e-4)
    else:
        assert record.cost["compact"]["bytes"] <= 0.5 * record.cost["kept_heads"]["bytes"]


def test_the_unpruned_model_has_a_curve_too_and_a_killed_run_goes_on(folder):
    record = adapted(folder, "pruning/dense", "whole")
    assert [p["step"] for p in record.newtask["curve"]] == [0, 1, 4] and "neighbours" not in record.newtask
    first, second = Adaptation(), Adaptation()
    first.facts = {"task": "edge", "head_seconds": 1.0, "ready_seconds": 2.0, "curve": [{"step": 0}]}
    second.load_state_dict(first.state_dict())
    assert second.told({"edge/l1": 0.5}, 100)["curve"] == [{"step": 0}, {"step": 100, "test/edge/l1": 0.5}]


def test_another_backbone_and_bad_numbers_are_refused(folder):
    from cut.data.synthetic import Synthetic
    from cut.model import MultiTaskModel

    model = MultiTaskModel(Synthetic(tasks=["edge"]).tasks, NetworkConfig("test_resnet", head_width=8))
    with pytest.raises(ValueError, match="another backbone"):
        load_backbone(model, folder / "dense")
    for options in ({"at": [20, 0]}, {"head_steps": -1}, {"head_batches": 0}):
        with pytest.raises(ValueError, match=next(iter(options)).replace("at", "steps", 1)[:5]):
            Adaptation(**options)


def test_measures_that_need_classifiers_find_them_beside_the_library(tmp_path):
    from cut import checkpoint

    torch.manual_seed(0)
    experts = MultiTaskNet({"x": 3, "y": 2}, ["x", "y"], NetworkConfig("test_efficientnet")).eval()
    checkpoint.save(experts, tmp_path / EXPERTS)
    model = MultiTaskNet({"new": 2}, ["new"], NetworkConfig("test_efficientnet")).eval()
    model.backbone.load_state_dict(experts.backbone.state_dict())
    batches = [{"image": torch.randn(4, 3, 32, 32), "new": torch.tensor([0, 1, 0, 1])}]
    names = ["backbone.conv_stem.weight"]
    mask = {n: torch.ones_like(p, dtype=torch.bool) for n, p in experts.named_parameters() if n in names}
    library = Library(tmp_path / "library")
    for task in ("x", "y"):
        library.add(mask, {"task": task, "units": "weights", "base": "0" * 16})
    losses = {"new": lambda out, batch: torch.nn.functional.cross_entropy(out, batch["new"])}
    newcomer = Newcomer(model, batches, losses, "new", library.entries())
    before = copy.deepcopy(model.state_dict())
    found = WithExperts(LEEP(), str(tmp_path / EXPERTS))(newcomer)
    assert found == pytest.approx(LEEP(experts)(newcomer))
    cosines = WithExperts(GradientCosine(), str(tmp_path / EXPERTS))(newcomer)
    assert set(cosines) == set(found) and all(-1 <= v <= 1 for v in cosines.values())
    assert list(model.heads) == ["new"] and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert any_loss(torch.ones(2, 3), None) == 1
