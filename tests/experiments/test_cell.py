"""Cells: an id that depends on what is run and on nothing else, and a command line that says the same."""

import json
from pathlib import Path

import pytest

from experiments import cell as module
from experiments.cell import CONFIGS, Cell
from experiments.run import CLI, _config, parsed

NAMES = ("trainer/default", "data/synthetic", "model/mobilenetv2", "pruning/cut", "logger/none")
DENSE = ("trainer/default", "data/synthetic", "model/mobilenetv2", "pruning/dense", "logger/none")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of configs of one's own."""
    monkeypatch.setattr(module, "CONFIGS", tmp_path)
    module._content.cache_clear()
    yield tmp_path
    module._content.cache_clear()


def write(folder: Path, **files: str) -> None:
    module._content.cache_clear()
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_comments_layout_and_order_do_not_change_the_id(folder):
    write(folder, a="data: {init_args: {tasks: [seg], size: 3}}\nmethod: cut\n")
    one = Cell(("a",), {"x.y": 1, "x.z": 2}).id
    write(
        folder, a="# Another comment.\nmethod: cut\ndata:\n  init_args:\n    size: 3  # three\n    tasks:\n    - seg\n"
    )
    two = Cell(("a",), {"x.z": 2, "x.y": 1}).id
    assert one == two
    write(folder, a="data: {init_args: {tasks: [seg], size: 4}}\nmethod: cut\n")
    assert Cell(("a",), {"x.z": 2, "x.y": 1}).id != one


def test_the_same_content_from_other_files_is_the_same_cell(folder):
    write(folder, a="data: {init_args: {tasks: [seg]}}\n", b="method: cut\n")
    write(folder, both="method: cut\ndata: {init_args: {tasks: [seg]}}\n")
    assert Cell(("a", "b")).id == Cell(("b", "a")).id == Cell(("both",)).id == Cell(("a",), {"method": "cut"}).id


def test_settings_start_and_configs_change_the_id():
    start = Cell(DENSE, {"seed_everything": 1})
    cells = [
        Cell(NAMES),
        Cell(NAMES, {"seed_everything": 2}),
        Cell(NAMES, {"pruning.floor": 0.01}),
        Cell(NAMES, {"pruning.floor": 0.010001}),
        Cell(NAMES, {}, start),
        Cell(NAMES, {}, Cell(DENSE, {"seed_everything": 2})),
        Cell((*NAMES[:3], "pruning/magnitude", NAMES[4])),
        Cell((NAMES[0], "data/rooms", *NAMES[2:])),
    ]
    assert len({c.id for c in cells}) == len(cells)
    assert Cell(NAMES, {}, start).id == Cell(NAMES, {}, Cell(DENSE, {"seed_everything": 1})).id


def test_the_id_is_readable():
    settings = {"seed_everything": 3, "pruning.tasks": ["seg", "depth"], "pruning.budget.init_args.target": 0.95}
    cell = Cell(NAMES, settings, Cell(DENSE))
    assert (cell.method, cell.seed, cell.tasks, cell.target) == ("cut", 3, ["seg", "depth"], 0.95)
    assert cell.id.startswith("cut-0.95-seg+depth-3-")
    assert cell.start.id.startswith("dense-seg+normal+depth+edge-1-") and cell.start.target is None


def test_later_configs_win_entry_by_entry(folder):
    write(folder, a="data: {x: 1, deep: {y: 2, z: [1, 2]}}\n", b="data: {deep: {y: 3, z: [4]}}\n", c="{}\n")
    assert Cell(("a", "b", "c")).config == {"data": {"x": 1, "deep": {"y": 3, "z": [4]}}}
    assert Cell(("b", "a")).config == {"data": {"x": 1, "deep": {"y": 2, "z": [1, 2]}}}


def test_a_new_class_replaces_the_old_one_with_its_arguments(folder):
    write(folder, a="p: {class_path: A, init_args: {x: 1}}\n")
    write(folder, same="p: {class_path: A, init_args: {y: 2}}\n", other="p: {class_path: B, init_args: {y: 2}}\n")
    write(folder, bare="p: {init_args: {y: 2}}\n", plain="p: {class_path: B}\n", none="p: null\n")
    both = {"class_path": "A", "init_args": {"x": 1, "y": 2}}
    assert Cell(("a", "same")).config["p"] == Cell(("a", "bare")).config["p"] == both
    assert Cell(("a", "other")).config["p"] == {"class_path": "B", "init_args": {"y": 2}}
    assert Cell(("a", "plain")).config["p"] == {"class_path": "B"}
    assert Cell(("a", "none")).config["p"] is None
    assert Cell(("none", "a")).config["p"] == {"class_path": "A", "init_args": {"x": 1}}


def test_settings_reach_into_what_is_not_there_and_replace_what_is_whole(folder):
    write(folder, a="p: {budget: null, schedule: {class_path: A, init_args: {x: 1}}}\n")
    settings = {"p.budget.init_args.target": 0.5, "p.schedule": {"class_path": "B"}, "q.r": [1]}
    assert Cell(("a",), settings).config == {
        "p": {"budget": {"init_args": {"target": 0.5}}, "schedule": {"class_path": "B"}},
        "q": {"r": [1]},
    }
    assert Cell(("a",)).config["p"]["budget"] is None, "one cell's settings do not leak into another's"


def test_an_unknown_config_is_named_with_those_there_are():
    with pytest.raises(ValueError, match=r"no config 'logger/nowhere'; logger has csv, none, tensorboard, wandb"):
        _ = Cell((*NAMES[:4], "logger/nowhere")).id


def test_the_command_line_gives_the_values_set(tmp_path, monkeypatch):
    monkeypatch.setattr(CLI, "instantiate_classes", lambda self: None)
    network = {"backbone": "test_efficientnet", "weights": None, "output_stride": None, "head_width": 8}
    settings = {
        "seed_everything": 7,
        "data.init_args.tasks": ["seg", "edge"],
        "data.init_args.num": 24,
        "pruning.tasks": ["edge"],
        "pruning.floor": 5e-05,  # JSON writes it without a point, which plain YAML would read as a word
        "pruning.budget.init_args.target": 0.975,
        "pruning.fusion": {"class_path": "cut.fusion.Weighted", "init_args": {"weights": {"seg": 1.0, "edge": 5.0}}},
        "model.init_args.network": network,
        "model.init_args.schedule": "cosine",
        "model.init_args.optimizer.init_args.lr": 3e-4,
        "model.init_args.channels_last": True,
        "trainer.max_epochs": 2,
        "trainer.callbacks": [{"class_path": "cut.distillation.Distillation"}],
    }
    cell = Cell(NAMES, settings, Cell(DENSE, {"seed_everything": 7}))
    found = _config(parsed(cell.argv(tmp_path / "records", tmp_path / "runs")))
    assert (found["id"], found["method"], found["seed_everything"]) == (cell.id, "cut", 7)
    assert found["out"] == str(tmp_path / "runs" / cell.id) and found["records"] == str(tmp_path / "records")
    assert found["init"] == str(tmp_path / "runs" / cell.start.id)
    data, model, pruning, trainer = (found[k] for k in ("data", "model", "pruning", "trainer"))
    assert data["init_args"]["tasks"] == ["seg", "edge"] and data["init_args"]["num"] == 24
    assert {k: model["init_args"]["network"][k] for k in network} == network
    assert (model["init_args"]["schedule"], model["init_args"]["channels_last"]) == ("cosine", True)
    assert model["init_args"]["optimizer"]["init_args"]["lr"] == 3e-4
    assert pruning["tasks"] == ["edge"] and pruning["floor"] == 5e-05
    assert pruning["budget"] == {"class_path": "cut.budget.Sparsity", "init_args": {"target": 0.975}}
    assert pruning["fusion"]["init_args"]["weights"] == {"seg": 1.0, "edge": 5.0}
    assert trainer["max_epochs"] == 2
    assert [c["class_path"] for c in trainer["callbacks"]] == ["cut.distillation.Distillation"]


def test_a_setting_of_none_is_none_and_leaves_the_entries_beside_it(tmp_path, monkeypatch):
    """Given as a dotted null, jsonargparse reads the text 'None' where the entry is of a dataclass."""
    monkeypatch.setattr(CLI, "instantiate_classes", lambda self: None)
    entry = "model.init_args.network"
    settings = {f"{entry}.output_stride": 8, f"{entry}.weights": None, f"{entry}.head_width": 8, "init": None}
    cell = Cell(NAMES, settings)
    found = _config(parsed(cell.argv(tmp_path, tmp_path)))
    network, given = found["model"]["init_args"]["network"], cell.config["model"]["init_args"]["network"]
    assert network["weights"] is None and found["init"] is None
    assert (network["output_stride"], network["head_width"]) == (8, 8)
    assert network["backbone"] == given["backbone"]


def test_a_dense_cell_starts_from_nothing(tmp_path):
    line = Cell(DENSE).argv(tmp_path, tmp_path)
    assert not any(part.startswith("--init") for part in line)
    assert line[:2] == ["--config", str(CONFIGS / "trainer/default.yaml")]
    assert json.loads(json.dumps(line)) == line
