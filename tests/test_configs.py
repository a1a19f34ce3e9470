"""Configs: every file parses, sets one group only, and names classes that exist."""

from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentError

from experiments import edge, recipe
from experiments.run import parsed

CONFIGS = Path(__file__).parent.parent / "configs"
RATES = CONFIGS / "recipe/rates.yaml"  # numbers by method and sparsity, not options
SHAPES = CONFIGS / "recipe/latency.yaml"  # numbers by model, tasks, method and latency
FILES = sorted(set(CONFIGS.rglob("*.yaml")) - {RATES, SHAPES})
GROUPS = {
    "data": {"data"},
    "model": {"model"},
    "pruning": {"method", "pruning", "trainer"},
    "trainer": {"trainer"},
    "recipe": {"trainer", "data", "model", "pruning"},
    "logger": {"trainer"},
}
SMALL = ["--data", str(CONFIGS / "data/synthetic.yaml")]


def line(*names: str) -> list[str]:
    return [part for n in names for part in ("--config", str(CONFIGS / f"{n}.yaml"))]


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_file_sets_its_folders_group_only(path):
    content = yaml.safe_load(path.read_text())
    assert set(content) <= GROUPS[path.parent.name]
    assert path.read_text().startswith("# "), "a file says in its first line what it is for"
    if path.parent.name == "logger":
        assert set(content["trainer"]) == {"logger"}
    if path.parent.name == "trainer":
        assert "logger" not in content["trainer"]
    if path.parent.name == "pruning":
        assert set(content.get("trainer", {})) <= {"callbacks"}, "a method may add callbacks, nothing else"


def test_rates_are_of_methods_and_of_the_three_values():
    found = yaml.safe_load(RATES.read_text())
    assert set(found) <= {p.stem for p in (CONFIGS / "pruning").glob("*.yaml")}
    assert {r for by_sparsity in found.values() for r in by_sparsity.values()} <= set(recipe.RATES)
    assert all(0 <= s < 1 for by_sparsity in found.values() for s in by_sparsity)


def test_shapes_are_of_methods_models_and_latencies_of_the_table():
    wanted = {(model, "+".join(tasks), method) for model, tasks, method in edge.wanted()}
    for model, by_tasks in (yaml.safe_load(SHAPES.read_text()) or {}).items():
        for tasks, by_method in by_tasks.items():
            assert {(model, tasks, method) for method in by_method} <= wanted
            for shares in by_method.values():
                assert set(shares) <= set(edge.LATENCIES) and all(0 < s <= 1 for s in shares.values())
                ordered = [shares[x] for x in sorted(shares)]
                assert ordered == sorted(ordered), "more time, more multiply-accumulates"


@pytest.mark.parametrize("name", sorted(p.stem for p in (CONFIGS / "pruning").glob("*.yaml")))
def test_every_method_builds(name, tmp_path):
    cli = parsed(
        [
            *line("trainer/default", "data/synthetic", "model/mobilenetv2", f"pruning/{name}"),
            f"--out={tmp_path}",
        ]
    )
    pruning = cli.trainer.callbacks
    assert any(type(c).__name__ == "Pruning" for c in pruning)
    assert cli.config.method == name
    assert [t for t in cli.model.tasks] == ["seg", "normal", "depth", "edge"]


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0", "vit_tiny"])
def test_every_model_builds_for_the_rooms(name, tmp_path):
    cli = parsed([*line("trainer/default", "data/rooms", f"model/{name}", "pruning/cut"), f"--out={tmp_path}"])
    batch = cli.datamodule.score_batches(1, 2)[0]
    out = cli.model.eval()(batch["image"])
    assert {t: tuple(o.shape[-2:]) for t, o in out.items()} == dict.fromkeys(cli.model.tasks, (96, 128))


def test_a_typo_fails_at_once(tmp_path):
    with pytest.raises(ArgumentError, match="batchsize"):
        parsed(
            [
                *line("trainer/default", "data/synthetic", "model/mobilenetv2", "pruning/cut"),
                "--data.init_args.batchsize=3",
            ]
        )
