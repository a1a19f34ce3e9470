"""New tasks: no model has seen what it is adapted to, and methods differ in the cut alone."""

import json

import pytest

from cut.data.labelgroups import find, groups
from cut.data.rooms import TASKS
from experiments import newtask
from experiments.newtask import BUDGETS, FEW, MANY, MEASURES, SCALE, SIMILAR, UNPRUNED, groups_grid, newtask_grid

GRIDS = {g.name: g for g in (newtask_grid(), groups_grid())}
CELLS = {name: [c for row in g.rows for run in row.runs for c in run] for name, g in GRIDS.items()}
# What the cut may be made by: everything under "pruning" but the tasks.
CUT = ("pruning.", "method")


def flat(config, start=""):
    found = {}
    for key, value in config.items():
        found |= flat(value, f"{start}{key}.") if isinstance(value, dict) else {f"{start}{key}": json.dumps(value)}
    return found


def test_on_rooms_each_task_is_new_once_a_seed_and_unknown_to_its_base():
    for row in GRIDS["newtask"].rows:
        assert len(row.runs) == len(newtask.SEEDS)
        for run in row.runs:
            assert [c.tasks for c in run] == [[t] for t in TASKS]
            assert len({c.seed for c in run}) == 1
            for cell in run:
                assert set(cell.start.tasks) == set(TASKS) - set(cell.tasks) and cell.start.seed == cell.seed
                assert cell.config["data"]["init_args"]["tasks"] == cell.tasks


def test_new_groups_share_no_class_with_base_or_library():
    found = groups()
    known = {c for g in (*found.library, found.base) for c in g.classes}
    assert 15 <= len(found.library) <= 20
    for row in GRIDS["newtask-groups"].rows:
        for run in row.runs:
            assert len(run) == len(found.unseen) == 5
            for cell in run:
                assert not known & set(find(cell.tasks[0]).classes)
                assert cell.config["data"]["init_args"]["group"] == cell.tasks[0]
                assert cell.start.config["data"]["init_args"]["group"] == found.base.name


@pytest.mark.parametrize("name", GRIDS)
def test_methods_on_one_task_differ_in_the_cut_alone(name):
    shared: dict[str, set] = {}
    for cell in CELLS[name]:
        plain = {k: v for k, v in flat(cell.config).items() if not k.startswith(CUT) or k == "pruning.tasks"}
        shared.setdefault((cell.start.id, *cell.tasks), set()).add(json.dumps(plain, sort_keys=True))
    assert all(len(found) == 1 for found in shared.values())


@pytest.mark.parametrize("name", GRIDS)
def test_every_run_is_compared_with_the_unpruned_one_of_its_task_and_start(name):
    grid = GRIDS[name]
    for cell in CELLS[name]:
        whole = grid.against[cell.id]
        assert whole.method == UNPRUNED and (whole.start.id, whole.tasks) == (cell.start.id, cell.tasks)


@pytest.mark.parametrize("name", GRIDS)
def test_similarity_sees_an_eighth_of_the_scoring_pictures(name):
    assert FEW * SCALE == MANY
    for row in GRIDS[name].rows:
        for cell in (c for run in row.runs for c in run):
            batches = cell.config["pruning"]["batches"]
            many = cell.method == "cut" or row.variant.get("change") == "all scoring pictures"
            assert batches == (MANY if many else FEW)
            if cell.method.startswith(SIMILAR):
                assert cell.config["pruning"]["scorer"]["init_args"]["batches"] == batches


@pytest.mark.parametrize("name", GRIDS)
def test_every_budget_has_the_same_methods(name):
    seen: dict[tuple, list[str]] = {}
    for row in GRIDS[name].rows:
        if row.method != UNPRUNED and row.variant.get("change", "") in ("", "mask overlap"):
            seen.setdefault((row.variant.get("model"), row.variant["budget"]), []).append(row.method)
            units = row.runs[0][0].config["pruning"].get("units", "weights")
            assert (units == "channels") == (BUDGETS[row.variant["budget"]] >= 1)
    assert len({tuple(v) for v in seen.values()}) == 1
    assert len(seen) == 4


def test_every_measure_is_run_on_every_model_and_budget():
    rows = [r for r in GRIDS["newtask-groups"].rows if r.method == SIMILAR]
    assert {r.variant["change"] for r in rows} == set(MEASURES) and len(rows) == 4 * len(MEASURES)
    found = {json.dumps(r.runs[0][0].config["pruning"]["scorer"], sort_keys=True) for r in rows}
    assert len(found) == len(MEASURES)
