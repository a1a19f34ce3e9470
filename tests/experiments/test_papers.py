"""Papers: the recipes are the published ones, all methods share them, and small grids are small."""

import json
from collections import Counter

import pytest
import yaml

from cut.budget import KeepRatio
from cut.pruning import Pruning
from experiments import papers
from experiments.cell import CONFIGS
from experiments.papers import METHODS, RECIPES, SETS, grid, half
from experiments.recipe import floor
from experiments.rooms.layouts import write_layout
from experiments.run import _config, parsed
from tests.experiments.layout_rooms import write_source

CASES = [(name, recipe, small) for name in SETS for recipe in RECIPES for small in (False, True)]
GRIDS = {case: grid(case[0], case[1], stand_in=case[2], small=case[2]) for case in CASES}
# The published numbers: batch, iterations, weight decay, step, gamma; after the cut: iterations, rate, step, gamma.
PUBLISHED = {
    "nyuv2": ((16, 20_000, 1e-4, 4000, 0.7), (1000, 1e-5, 1000, 0.7)),
    "cityscapes": ((64, 20_000, 5e-4, 4000, 0.7), (1000, 1e-5, 1000, 0.7)),
    "taskonomy": ((16, 100_000, 5e-4, 12_000, 0.5), (200, 1e-6, 100, 0.5)),
}


def dense_cell(name, recipe="paper", small=False):
    return papers.dense(name, recipe, small=small)


@pytest.mark.parametrize("name", SETS)
def test_the_dense_recipe_is_the_published_one(name):
    batch, steps, decay, every, gamma = PUBLISHED[name][0]
    config = dense_cell(name).config
    model = config["model"]["init_args"]
    assert config["trainer"]["max_steps"] == steps and config["data"]["init_args"]["batch_size"] == batch
    assert model["optimizer"]["class_path"] == "torch.optim.Adam"
    assert model["optimizer"]["init_args"] == {"lr": 1e-4, "weight_decay": decay}
    assert model["scheduler"]["init_args"] == {"step_size": every, "gamma": gamma}
    assert model["network"] == {
        "backbone": "resnet34",
        "output_stride": 8,
        "head": "aspp",
        "head_width": 1024,
        "dropout": 0.5,
    }
    assert model["families"] == ["legacy"] and config["data"]["init_args"]["legacy"] is True


@pytest.mark.parametrize("name", SETS)
def test_the_recovery_is_the_published_one_for_every_method(name):
    steps, rate, every, gamma = PUBLISHED[name][1]
    for cell in GRIDS[name, "paper", False].cells():
        if cell.start is None:
            continue
        config = cell.config
        assert config["trainer"]["max_steps"] == steps
        assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == rate
        assert config["model"]["init_args"]["scheduler"]["init_args"] == {"step_size": every, "gamma": gamma}
        assert (
            config["pruning"]["batches"] == 50 and config["pruning"]["floor"] == 0 and not config["pruning"]["silence"]
        )


@pytest.mark.parametrize("name", SETS)
def test_the_crop_is_the_published_one(name):
    content = yaml.safe_load((CONFIGS / f"data/{name}.yaml").read_text())["data"]["init_args"]
    assert content["augmentation"]["crop"] == [SETS[name].crop] * 2
    assert content["augmentation"]["scale"] == [0.5, 1.5] and content["augmentation"]["pad"]
    assert content["tasks"] == list(SETS[name].tasks)


@pytest.mark.parametrize("name", SETS)
def test_the_authors_rule_has_their_ratios_and_both_kinds_of_votes(name):
    rows = [r for r in GRIDS[name, "paper", False].rows if r.method == "cut-reference"]
    seen = Counter()
    for row in rows:
        (cell,) = row.runs[0]
        budget = cell.config["pruning"]["budget"]["init_args"]
        assert budget["ratio"] == SETS[name].ratios[row.level]
        assert budget["votes"] == (2 if row.variant["rule"] == "2 votes" else half(cell.tasks))
        seen[tuple(cell.tasks), row.level] += 1
    for (tasks, _), count in seen.items():
        assert count == (1 if half(tasks) == 2 else 2), "the hard rule, and at least half where that is another one"
    assert {t for t, _ in seen} == set(SETS[name].selections) and {s for _, s in seen} == set(papers.SPARSITIES)


def test_the_keep_ratios_are_those_of_the_authors_files():
    assert SETS["nyuv2"].ratios == {0.3: 0.675, 0.5: 0.46, 0.7: 0.257, 0.9: 0.08}
    assert SETS["cityscapes"].ratios == {0.3: 0.71, 0.5: 0.51, 0.7: 0.3, 0.9: 0.095}
    assert SETS["taskonomy"].ratios == {0.3: 0.675, 0.5: 0.5, 0.7: 0.257, 0.9: 0.1}


@pytest.mark.parametrize(("name", "recipe", "small"), CASES)
def test_every_selection_has_every_method_at_every_sparsity(name, recipe, small):
    seen = Counter()
    for row in GRIDS[name, recipe, small].rows:
        (cell,) = row.runs[0]
        if cell.target is not None and cell.start is not None:
            seen[tuple(cell.tasks), cell.target, row.method] += 1
            expected = floor(cell.target) if recipe == "modern" else 0
            assert cell.config["pruning"]["floor"] == expected
    methods = [m for m in METHODS[recipe] if not small or m in papers.SMALL_METHODS[recipe]]
    selections = {s for s, _, _ in seen}
    assert selections == (
        {SETS[name].selections[0], SETS[name].selections[-1]} if small else set(SETS[name].selections)
    )
    sparsities = (papers.SMALL_SPARSITY,) if small else papers.SPARSITIES
    assert seen == Counter((s, x, m) for s in selections for x in sparsities for m in methods)
    assert {"random", "lth", "snip", "disparse", "cut"} <= set(methods)


@pytest.mark.parametrize(("name", "recipe", "small"), CASES)
def test_one_dense_model_and_one_recipe(name, recipe, small):
    cells = [c for c in GRIDS[name, recipe, small].cells() if c.start is not None]
    assert {c.start.id for c in cells} == {dense_cell(name, recipe, small).id}
    shared = [json.dumps([{**c.config["trainer"], "callbacks": 0}, c.config["data"], c.config["model"]]) for c in cells]
    assert len(set(shared)) == 1
    assert GRIDS[name, recipe, small].selection == ("best_test" if recipe == "paper" else "best_val")


@pytest.mark.parametrize(("name", "recipe"), [(n, r) for n in SETS for r in RECIPES])
def test_a_small_run_is_small_and_its_table_says_so(name, recipe):
    found = GRIDS[name, recipe, True]
    assert "reduced" in found.title and "reduced" in found.name and "Reduced run" in found.note
    assert found.title.startswith("Rooms in") and found.name.startswith("rooms-in-")
    assert len(found.cells()) <= 20
    for cell in found.cells():
        config = cell.config
        assert config["model"]["init_args"]["network"]["head_width"] <= 64
        assert config["data"]["init_args"]["augmentation"]["crop"] == [96, 96]
        assert config["trainer"]["max_steps"] <= 100
        parts = config["trainer"]["max_steps"] / config["trainer"]["limit_train_batches"]
        assert parts == config["trainer"]["max_epochs"] == config["trainer"]["check_val_every_n_epoch"]


def test_names_of_a_stand_in_are_never_the_sets():
    for name in SETS:
        for recipe in RECIPES:
            real, other = grid(name, recipe), grid(name, recipe, stand_in=True)
            assert real.name != other.name and not other.title.startswith(SETS[name].name)
            assert {c.id for c in real.cells()} == {c.id for c in other.cells()}, "nothing but the pictures differs"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a stand-in of every set."""
    path = tmp_path_factory.mktemp("sets")
    (path / "rooms").mkdir()
    source = write_source(path / "rooms", {"train": 12, "val": 12, "test": 2})
    for name in SETS:
        write_layout(name, path / name, source)
    return path


@pytest.mark.parametrize(("name", "recipe", "small"), CASES)
def test_every_kind_of_command_line_means_what_its_cell_says(name, recipe, small, folder, tmp_path):
    found = {c.method: c for c in GRIDS[name, recipe, small].cells()}
    for method in ("dense", "cut", *(("cut-reference",) if recipe == "paper" else ("cut-plus",))):
        cell = found[method]
        line = [a for a in cell.argv(tmp_path, tmp_path) if not a.startswith("--init=")]
        cli = parsed([*line, f"--data.init_args.root={folder / name}", "--trainer.precision=32-true"])
        config = _config(cli)
        assert config["trainer"]["max_steps"] == cell.config["trainer"]["max_steps"]
        assert [t.name for t in cli.datamodule.tasks] == list(SETS[name].tasks)
        (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, Pruning)]
        assert (callback.tasks or list(SETS[name].tasks)) == cell.tasks
        if method == "cut-reference":
            assert isinstance(callback.budget, KeepRatio)


def test_unknown_sets_and_recipes_are_refused():
    with pytest.raises(ValueError, match=r"'kitti'.*allowed: nyuv2, cityscapes, taskonomy"):
        grid("kitti", "paper")
    with pytest.raises(ValueError, match=r"'old'.*allowed"):
        grid("nyuv2", "old")
