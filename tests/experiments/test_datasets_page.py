"""docs/datasets.md says what configs and grids hold."""

from pathlib import Path

import pytest
import yaml

from experiments import papers

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs/datasets.md").read_text()


def table(first: str) -> dict[str, list[str]]:
    """The rows, by their first cell, of the table whose first row has this first cell."""
    lines = PAGE.split(f"\n| {first} |")[1].split("\n\n")[0]
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in f"| {first} |{lines}".splitlines()]
    return {row[0]: row[1:] for row in rows}


def recipe(name: str) -> dict:
    return yaml.safe_load((ROOT / f"configs/recipe/{name}.yaml").read_text())


def numbers(text: str) -> list[float]:
    return [float(t) for t in text.replace(",", " ").split()]


@pytest.mark.parametrize(("column", "name"), enumerate(papers.SETS))
def test_the_published_recipe_is_the_configs(column, name):
    rows = {key: cells[column] for key, cells in table("tasks (channels)").items()}
    for stage, start in (("dense", f"paper-{name}"), ("after the cut", f"paper-{name}-recover")):
        config = recipe(start)
        model = config["model"]["init_args"]
        steps = config["trainer"]["max_steps"]
        optimizer, scheduler = model["optimizer"]["init_args"], model["scheduler"]["init_args"]
        assert numbers(rows[f"{stage}: StepLR every, factor"]) == [scheduler["step_size"], scheduler["gamma"]]
        if stage == "dense":
            assert numbers(rows["dense: batch, iterations"]) == [config["data"]["init_args"]["batch_size"], steps]
            assert numbers(rows["dense: Adam rate, weight decay"]) == [optimizer["lr"], optimizer["weight_decay"]]
        else:
            assert numbers(rows["after the cut: iterations"]) == [steps]
            assert numbers(rows["after the cut: Adam rate"]) == [optimizer["lr"]]
            assert numbers(rows["scoring batches"]) == [config["pruning"]["batches"]]
            looks = config["trainer"]["limit_train_batches"] * config["trainer"]["check_val_every_n_epoch"]
            assert f"every {looks}" in rows["checkpoint"]


@pytest.mark.parametrize(("column", "name"), enumerate(papers.SETS))
def test_the_sets_are_the_grids(column, name):
    rows, of = {key: cells[column] for key, cells in table("tasks (channels)").items()}, papers.SETS[name]
    assert [t.split()[0] for t in rows["tasks (channels)"].split(", ")] == list(of.tasks)
    assert rows["training crop / test size"].split()[0] == str(of.crop)
    assert numbers(rows["keep ratio at 30 / 50 / 70 / 90 %"]) == [of.ratios[s] for s in papers.SPARSITIES]


def test_the_modern_recipe_is_the_configs():
    rows = table("network")
    for column, name in enumerate(("modern", "modern-recover")):
        config = recipe(name)
        expected = [config["data"]["init_args"]["batch_size"], config["trainer"]["max_steps"]]
        assert numbers(rows["batch, iterations"][column]) == expected
        assert config["trainer"]["precision"] == "bf16-mixed" and config["model"]["init_args"]["channels_last"]


def test_every_command_on_the_page_has_its_target():
    makefile = (ROOT / "Makefile").read_text()
    assert "nyuv2 cityscapes taskonomy" in makefile and "experiments.published" in makefile
    for name in papers.SETS:
        assert f"table-{name}" in PAGE


def test_other_pages_are_there():
    assert all((ROOT / "docs" / page).is_file() for page in ("paper-scale.md", "stand-ins.md"))
