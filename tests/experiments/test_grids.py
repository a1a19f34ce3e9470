"""Grids: every cell's command line means what the cell says, and methods are compared under one recipe."""

import json
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
import yaml

from cut import schedules
from cut.data.rooms import Rooms
from cut.decomposition import prunable
from cut.distillation import Distillation
from cut.fusion import FallingVote, Ranking
from cut.model import MultiTaskModel
from cut.network import NetworkConfig
from experiments import edge, grids, recipe
from experiments.cell import CONFIGS, Cell
from experiments.edge import BACKBONE_RATE
from experiments.grids import GRIDS
from experiments.recipe import FLOOR, FOLLOW_SEED, FOLLOW_TARGET, RATES, SEEDS, VARIES, dense, floor, pruned, rate_of
from experiments.results import tidy
from experiments.run import CLI, _config, parsed
from tests.experiments.grid_records import by_id, record

ALL = {name: make() for name, make in GRIDS.items()}
# The tables of the benchmark on Rooms; those of new tasks and other data have tests of their own.
BENCHMARK = [name for name, grid in ALL.items() if grid.folder == "rooms"]
CELLS = {c.id: c for grid in ALL.values() for c in grid.cells()}
LR = "model.init_args.optimizer.init_args.lr"


def pruned_cells(name):
    return [c for c in ALL[name].cells() if c.start is not None]


def flat(config, start=""):
    """Dotted name to value, as JSON."""
    found = {}
    for key, value in config.items():
        found |= flat(value, f"{start}{key}.") if isinstance(value, dict) else {f"{start}{key}": json.dumps(value)}
    return found


def different(cells):
    """Names of the settings, the method's own ones left out, in which cells differ, with the values seen."""
    configs = [flat(c.config) for c in cells]
    shared = ("pruning.floor", "pruning.batches", "pruning.tasks")
    names = {n for c in configs for n in c if n != "method" and (not n.startswith("pruning.") or n in shared)}
    values = {n: {c.get(n) for c in configs} for n in sorted(names)}
    return {n: v for n, v in values.items() if len(v) > 1}


# Structure.


@pytest.mark.parametrize("name", BENCHMARK)
def test_dense_cells_come_first_and_nothing_twice(name):
    grid = ALL[name]
    assert grid.name == name and grid.rows
    ids = [c.id for c in grid.cells()]
    assert len(set(ids)) == len(ids)
    for i, cell in enumerate(grid.cells()):
        if cell.start is not None:
            assert cell.start.id in ids[:i]
            assert set(cell.tasks) <= set(cell.start.tasks)
            assert cell.start.start is None and cell.start.method == "dense"
        else:
            assert cell.method in (("width", "dense") if cell.id in grid.against else ("dense",))


@pytest.mark.parametrize("name", ALL)
def test_no_two_rows_are_the_same(name):
    """Same method, level and variant would be one line of the table twice."""
    lines = [
        (r.method, json.dumps(r.variant), r.level, r.runs[0][0].configs[2], r.runs[0][0].target, *r.runs[0][0].tasks)
        for r in ALL[name].rows
    ]
    assert not [line for line, count in Counter(lines).items() if count > 1]
    for row in ALL[name].rows:
        assert len({len(run) for run in row.runs}) == 1
        seeds = [{c.seed for c in run} for run in row.runs]
        assert all(len(s) == 1 for s in seeds) and len(set(map(frozenset, seeds))) == len(seeds), "a run is one seed's"


@pytest.mark.parametrize("name", BENCHMARK)
def test_longer_training_starts_from_the_runs_own_dense_model(name):
    grid = ALL[name]
    starts = {c.start.id for c in pruned_cells(name)}
    for start, cell in grid.longer.items():
        assert start in starts and cell.start.id == start and cell.method == "dense-longer" and cell.target is None
        others = [c for c in pruned_cells(name) if c.start.id == start and c.tasks == cell.tasks]
        assert set(different([cell, *others])) <= {*CHANGED[name], "pruning.floor", LR}  # nothing is cut


@pytest.mark.parametrize("name", ["rooms", "recovery", "methods", "fusion", "subsets", "changes", "rates", "backbones"])
def test_every_row_can_be_compared_with_longer_training(name):
    """The longer model is there for each dense one, with at least the row's tasks."""
    grid = ALL[name]
    for cell in pruned_cells(name):
        longer = grid.longer[cell.start.id]
        assert set(cell.tasks) <= set(longer.tasks)
        assert longer.config["trainer"]["max_epochs"] * grids.PART == 200
    made = by_id(
        *(record(c, {"seg/miou": 1.1} if c.id in {x.id for x in grid.longer.values()} else None) for c in grid.cells())
    )
    if name not in ("rates", "changes"):  # of validation, which these records have not
        found = tidy(replace(grid, by_latency=False), made)["delta_m_vs_longer"]  # these records have no latencies
        assert found.notna().all() and (found <= 0).all()


def test_the_references_rule_stands_at_both_sparsities_with_a_ratio_of_its_own():
    rows = [r for r in ALL["methods"].rows if r.method == "cut-reference"]
    assert [r.level for r in rows] == [0.7, 0.9]
    for row in rows:
        budget = row.runs[0][0].config["pruning"]["budget"]
        assert budget["class_path"] == "cut.budget.KeepRatio" and row.runs[0][0].target is None
        assert budget["init_args"] == {"ratio": grids.KEEP_RATIO[row.level], "votes": 2}
    assert grids.KEEP_RATIO[0.7] > grids.KEEP_RATIO[0.9]


def test_the_same_run_is_shared_by_tables():
    """What two tables ask for is run once: the main table's cells appear in others."""
    rooms = {c.id for c in ALL["rooms"].cells()}
    for name in ("recovery", "methods", "subsets", "backbones"):
        assert rooms & {c.id for c in ALL[name].cells()}, name


# The recipe.

# Per grid, what cells of one seed and sparsity may differ in besides what their method is about.
CHANGED: dict[str, set[str]] = {
    "rates": {LR},
    "highrate": {LR, "trainer.callbacks"},
    "rooms": {LR},
    "methods": {LR, "trainer.callbacks"},  # distillation, soft thresholds, towers
    "subsets": {"pruning.tasks"},
    "fusion": {"pruning.floor"},
    "changes": {LR, "trainer.callbacks", "pruning.floor", "pruning.batches", "model.init_args.schedule"},
    "recovery": {
        LR,
        "pruning.floor",
        "trainer.max_epochs",
        "trainer.check_val_every_n_epoch",
        "model.init_args.schedule",
        "model.init_args.warmup",
    },
    "backbones": {LR},
    "edge": {LR, "pruning.tasks", BACKBONE_RATE},  # the ViT's is chosen on validation, for rivals too
    "edge-vit": {BACKBONE_RATE},
    "edge-width": set(),  # nothing is cut
    "channels": {LR, "pruning.floor"},
}


@pytest.mark.parametrize("name", BENCHMARK)
def test_all_methods_of_one_seed_and_sparsity_have_one_recipe(name):
    groups: dict[tuple, list[Cell]] = {}
    for cell in pruned_cells(name):
        if cell.method in ("separate", "cut-reference"):  # looked at below
            continue
        sparsity = cell.target if cell.target is not None else "none"
        groups.setdefault((cell.seed, sparsity, cell.start.id), []).append(cell)
    for key, cells in groups.items():
        assert set(different(cells)) <= CHANGED[name], key
    starts = {(c.seed, c.start.id) for c in pruned_cells(name)}
    models = {"backbones": len(grids.BACKBONES), "channels": 2, "edge": None}.get(name, 1)
    if models is None:
        models = len({c.start.configs[2] for c in pruned_cells(name)})
        starts = {s for s in starts if s[0] == 1}
    assert len(starts) == models * len({s for s, _ in starts}), "one dense model a seed"


@pytest.mark.parametrize("name", ["separate", "cut-reference"])
def test_methods_with_a_budget_of_another_kind_have_the_same_recipe_too(name):
    cells = [c for c in pruned_cells("methods") if c.method == name]
    others = [c for c in pruned_cells("methods") if c.method == "snip"]
    assert cells and set(different([*cells, *others])) <= {"pruning.floor", "pruning.tasks", LR}


@pytest.mark.parametrize("name", BENCHMARK)
def test_floor_seed_steps_and_data(name):
    for cell in ALL[name].cells():
        config = cell.config
        assert config["data"]["init_args"]["seed"] == cell.seed == config["seed_everything"]
        # A crop of the size of the picture is the whole picture.
        crop = [96, 128] if "model/vit_small" in cell.configs else [64, 96]
        assert cell.seed in SEEDS and config["data"]["init_args"]["augmentation"] == {"mirror": True, "crop": crop}
        if cell.start is None:
            continue
        assert cell.start.seed == cell.seed
        assert config["pruning"]["batches"] == 6 or name == "changes"
        assert config["trainer"]["limit_train_batches"] == grids.PART == 25
        assert config["trainer"]["max_epochs"] * grids.PART == 200 or name == "recovery"
        if (
            cell.target is not None
            and cell.target < 1
            and name in ("rates", "highrate", "rooms", "methods", "subsets", "backbones")
        ):
            assert config["pruning"]["floor"] == floor(cell.target)


def test_the_recovery_grid_is_about_steps_floor_and_rate():
    seen = {}
    for row in ALL["recovery"].rows:
        for run in row.runs:
            (cell,) = run
            config = cell.config
            lr = config["model"]["init_args"]["optimizer"]["init_args"]["lr"]
            assert config["trainer"]["max_epochs"] * grids.PART == row.variant["steps"]
            assert config["pruning"]["floor"] == row.variant["floor"]
            if row.variant["steps"]:  # without one all rates are the same run
                assert (lr == grids.LOW_RATE) == (row.variant["rate"] == "low")
                assert (config["model"]["init_args"]["schedule"] == "constant") == (row.variant["rate"] == "low")
            seen.setdefault((cell.method, cell.target, cell.seed), set()).add(cell.id)
    seen = {key: len(ids) for key, ids in seen.items()}
    assert {c for m, t, s in seen if s == 1 for c in [seen[m, t, s]]} == {2 * (1 + 2 * (len(grids.STEPS) - 1))}


def following(config, keys):
    for key, value in config.items():
        if isinstance(value, dict):
            yield from following(value, keys)
        elif key in keys:
            yield key, value


@pytest.mark.parametrize("name", ALL)
def test_options_that_follow_the_budget_or_the_seed_do(name):
    for cell in pruned_cells(name):
        pruning = cell.config["pruning"]
        assert all(v == cell.seed for _, v in following(pruning, FOLLOW_SEED)), cell.id
        assert all(v == cell.target for _, v in following(pruning, FOLLOW_TARGET)), cell.id
    if name == "rooms":
        found = {k for c in pruned_cells(name) for k, _ in following(c.config["pruning"], FOLLOW_TARGET + FOLLOW_SEED)}
        assert found == {*FOLLOW_TARGET, *FOLLOW_SEED}, "there is something to follow"


def test_every_method_runs_at_its_own_rate_and_the_rates_grid_at_all():
    for row in ALL["rates"].rows:
        assert row.runs[0][0].config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == row.variant["rate"]
    counts = Counter((r.method, r.runs[0][0].target) for r in ALL["rates"].rows)
    assert set(counts.values()) == {len(RATES)} and len(counts) == 3 * 13 + 1
    for cell in pruned_cells("rooms"):
        assert cell.config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == rate_of(cell.method, cell.target)


def test_higher_rates_are_beside_the_highest_and_chosen_by_nothing():
    rows = {(r.method, r.runs[0][0].target, r.variant["rate"]): r.runs[0][0] for r in ALL["highrate"].rows}
    for method in ("magnitude", "snip", "disparse", "cut", "cut-plus"):
        for sparsity in (0.9, 0.95):
            assert {r for m, s, r in rows if (m, s) == (method, sparsity)} == {3e-3, 1e-2}
    for method in ("rigl", "adapmtl", "disparse-dynamic"):
        assert {(s, r) for m, s, r in rows if m == method} == {(0.9, r) for r in RATES}
    rated, others = ({c.id for c in pruned_cells(n)} for n in ("rates", "methods"))
    assert 1e-2 not in RATES and {r.variant["rate"] for r in ALL["rates"].rows} == set(RATES)
    for (method, sparsity, rate), cell in rows.items():
        assert cell.config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == rate
        if rate == 3e-3 and method in {r.method for r in ALL["rates"].rows}:
            assert cell.id in rated, "the run that the choice was made from"
        if method in grids.INHERITED and rate == rate_of(method, sparsity):
            assert cell.id in others, "the run of the inherited rate"


def test_rules_that_are_the_same_are_run_once_and_at_one_rate():
    """What is shown under two names is the same but for the name, and the grid says so."""
    for name, shown in grids.SAME.items():
        mine, other = (Cell((f"pruning/{m}",)).config for m in (name, shown))
        if name != "cut-majority":  # the same with three tasks only
            assert {**mine, "method": shown} == other
        assert [rate_of(name, s) for s in (0.7, 0.9)] == [rate_of(shown, s) for s in (0.7, 0.9)]
        assert not any(c.method == name for c in CELLS.values())
        rows = [r for n in ("rooms", "methods") for r in ALL[n].rows if r.method == name]
        assert rows and all(c.method == shown for r in rows for run in r.runs for c in run)
    assert VARIES["fisher-per-task"] == VARIES["cut-squared"] == "cut"


def test_a_falling_share_is_the_union_at_the_sparsities_of_the_tables_and_moves_in_rounds():
    def votes(sparsity):
        return Ranking({"a": {"w": torch.ones(1)}}, FallingVote(1.0, 0.0).at(sparsity).share).votes_needed(3)

    assert [votes(s) for s in (0.7, 0.9, 0.95)] == [1, 1, 1]
    assert "cut-falling" in ALL["methods"].note
    rounds = [votes(1 - 0.05 ** (i / 8)) for i in range(1, 9)]
    assert sorted(rounds, reverse=True) == rounds and set(rounds) == {3, 2, 1}
    by_change = {r.variant["change"]: r.runs[0][0].config["pruning"] for r in ALL["changes"].rows}
    for change, rule in [("cut-plus, falling vote share", "cut-plus"), ("gradual, falling vote share", "cut-gradual")]:
        plain = dict(pruned(rule, 0.95, 1).config["pruning"])
        found = dict(by_change[change])
        assert found.pop("fusion") == grids.FALLING and plain.pop("fusion") != grids.FALLING and found == plain


def test_distillation_is_tried_in_its_parts():
    changes = {r.variant["change"]: r.runs[0][0].config for r in ALL["changes"].rows}
    parts = {}
    for part in ("", " of outputs", " of features"):
        config = changes[f"distillation{part}"]
        (spec,) = config["trainer"]["callbacks"]
        made = Distillation(**spec.get("init_args", {}))
        parts[part] = (made.weight > 0, made.features > 0)
        assert config["pruning"] == changes["nothing"]["pruning"]
    assert parts == {"": (True, True), " of outputs": (True, False), " of features": (False, True)}


def test_magnitude_plus_is_cut_plus_with_another_score():
    mine, ours = (Cell((f"pruning/{m}",)).config["pruning"] for m in ("magnitude-plus", "cut-plus"))
    assert mine == {**ours, "scorer": Cell(("pruning/magnitude",)).config["pruning"]["scorer"]}
    assert {r.runs[0][0].target for r in ALL["methods"].rows if r.method == "magnitude-plus"} == {0.7, 0.9}
    changed = {r.variant["change"]: r.runs[0][0] for r in ALL["changes"].rows}
    assert changed["magnitude, reconstruction in 8 rounds"].method == "magnitude-plus"


def test_a_rate_is_that_of_the_next_lower_sparsity_and_of_the_method_that_is_varied(monkeypatch):
    monkeypatch.setattr(recipe, "rates", lambda: {"magnitude": {0.7: 1.0, 0.9: 2.0}, "dense-longer": {0.0: 3.0}})
    assert [rate_of("magnitude", s) for s in (0.5, 0.7, 0.8, 0.9, 0.98)] == [1, 1, 1, 2, 2]
    assert rate_of("magnitude-uniform", 0.95) == 2 and rate_of("dense-longer", None) == 3
    assert rate_of("snip", 0.9) == RATES[1]


def test_what_varies_a_method_is_a_method_without_runs_of_its_own_in_the_rates_grid():
    names = {p.stem for p in (CONFIGS / "pruning").glob("*.yaml")}
    chosen = {r.method for r in ALL["rates"].rows}
    assert set(VARIES) <= names and set(VARIES.values()) <= chosen and not set(VARIES) & chosen
    assert set(VARIES) | chosen | {"dense"} == names


# Configs that stand in no grid, and why.
IN_NO_GRID = {
    "cut-channels-weights": "an example of two budgets in one cut: neither a sparsity nor a latency is its own",
}


def test_every_config_stands_in_a_grid_or_says_why_not():
    """A method without a row is one that nobody has compared."""
    names = {p.stem for p in (CONFIGS / "pruning").glob("*.yaml")}
    used = {n.removeprefix("pruning/") for c in CELLS.values() for n in c.configs if n.startswith("pruning/")}
    used |= set(grids.SAME)  # shown by the run of the rule that they are
    used |= {m for _, _, m in edge.wanted()} & names  # cells of the grid edge as soon as their shapes are measured
    assert names - used == set(IN_NO_GRID)


# Budgets and schedules that can be met.


@pytest.mark.parametrize("name", ALL)
def test_every_schedule_ends_before_the_training(name):
    for cell in pruned_cells(name):
        schedule = cell.config["pruning"].get("schedule")
        epochs = cell.config["trainer"]["max_epochs"]
        if schedule is None or cell.config["pruning"].get("budget") is None:
            continue
        kind = getattr(schedules, schedule["class_path"].rpartition(".")[2])
        assert max(kind(**schedule.get("init_args", {})).steps()) < max(1, epochs), cell.id


@pytest.mark.parametrize("name", ALL)
def test_every_sparsity_leaves_room_for_the_floor(name):
    for cell in pruned_cells(name):
        if cell.target is not None and cell.target < 1:
            assert cell.config["pruning"]["floor"] <= 1 - cell.target, cell.id


@pytest.fixture(scope="module")
def sizes():
    """Weights of the layers of the benchmark's model, by component."""
    cell = dense(1)
    data = Rooms(tasks=cell.config["data"]["init_args"]["tasks"])
    network = NetworkConfig(**{**cell.config["model"]["init_args"]["network"], "weights": None})
    model = MultiTaskModel(data.tasks, network)
    found: dict[str, list[int]] = {}
    for name, weight in prunable(model.network).items():
        part = name.split(".")[1] if name.startswith("heads.") else "backbone"
        found.setdefault(part, []).append(weight.numel())
    return found


@pytest.mark.parametrize("sparsity", [0.7, 0.9])
def test_separate_models_share_the_joint_models_budget(sparsity, sizes):
    assert sum(sizes["backbone"]) == grids.BACKBONE_WEIGHTS
    assert {t: sum(sizes[t]) for t in grids.HEAD_WEIGHTS} == grids.HEAD_WEIGHTS
    cells = grids.separate(sparsity, 1)
    assert [c.tasks for c in cells] == [["seg"], ["normal"], ["depth"]]
    whole = grids.BACKBONE_WEIGHTS + sum(grids.HEAD_WEIGHTS.values())
    assert sum(c.target for c in cells) == pytest.approx((1 - sparsity) * whole, abs=3)


@pytest.mark.parametrize("sparsity", [0.7, 0.9])
def test_separate_models_leave_room_for_the_floor(sparsity, sizes):
    for cell in grids.separate(sparsity, 1):
        share = cell.config["pruning"].get("floor", FLOOR)
        layers = [*sizes["backbone"], *sizes[cell.tasks[0]]]
        least = sum(max(1, math.ceil(share * n - 1e-9)) for n in layers)
        assert least <= cell.target, f"the floor {share} keeps {least} weights, the budget {cell.target}"


def test_subsets_are_all_there_once():
    found = grids.subsets()
    assert len(found) == len(set(found)) == 2 ** len(grids.FOUR) - 1
    rows = ALL["subsets"].rows
    assert {(tuple(r.runs[0][0].tasks), r.variant["scored"]) for r in rows} == {
        (s, v) for s in found for v in ("kept tasks", "all tasks") if (s, v) != (grids.FOUR, "all tasks")
    }
    for row in rows:
        voters = row.runs[0][0].config["pruning"].get("voters")
        assert voters == (list(grids.FOUR) if row.variant["scored"] == "all tasks" else None)


# The command lines.


def representatives():
    """Few cells that together have every method, every model, every setting and every value that has a structure."""
    seen: set[object] = set()
    for cell in CELLS.values():
        new: set[object] = {cell.method, cell.configs[2]}
        for key, value in cell.settings.items():
            plain = not isinstance(value, (dict, list)) or "tasks" in key
            new.add((key, None if plain else json.dumps(value)))
        if new - seen:
            seen |= new
            yield cell


SOME = {c.id: c for c in representatives()}


def test_the_representatives_have_every_method():
    assert {c.method for c in SOME.values()} == {c.method for c in CELLS.values()}


def settled(config):
    """A config without empty ``init_args``, which mean what none mean."""
    if isinstance(config, dict):
        return {k: settled(v) for k, v in config.items() if (k, v) != ("init_args", {})}
    return [settled(v) for v in config] if isinstance(config, list) else config


@pytest.mark.parametrize("name", SOME)
def test_the_command_line_means_what_the_cell_says(name, tmp_path, monkeypatch):
    """The files and options of the line are resolved as the cell merges them, so that its id stands for the run."""
    monkeypatch.setattr(CLI, "instantiate_classes", lambda self: None)
    cell = CELLS[name]
    merged = tmp_path / "merged.yaml"
    merged.write_text(yaml.safe_dump(cell.config))
    line = cell.argv(tmp_path / "records", tmp_path / "runs")
    rest = [part for part in line if part.startswith(("--init=", "--id=", "--out=", "--records="))]
    found, expected = _config(parsed(line)), _config(parsed(["--config", str(merged), *rest]))
    for config in (found, expected):
        config.pop("config", None)
    assert settled(found) == settled(expected)
    assert found["method"] == cell.method and found["id"] == cell.id
    assert found["seed_everything"] == cell.seed
    assert found["init"] == (str(tmp_path / "runs" / cell.start.id) if cell.start is not None else None)
