"""Multi-Fashion+MNIST's table: one recipe, and one row for the two rules that are one."""

import pytest

from cut import schedules
from experiments.fashion import MERGED, METHODS, RATES, SEEDS, SHARING, SPARSITIES, TASKS, UNION, fashion_grid
from experiments.grids import GRIDS

GRID = fashion_grid()
CELLS = GRID.cells()


def test_the_grid_has_every_method_at_every_sparsity_and_seed():
    rows = [(r.method, r.runs[0][0].target) for r in GRID.rows]
    assert len(rows) == len(set(rows)) == 2 + len(SHARING) + len(METHODS) * len(SPARSITIES)
    assert all([c.seed for run in r.runs for c in run] == list(SEEDS) for r in GRID.rows)
    assert {"cut", "cut-plus", "taps", "rcm", "merge-then-cut", "cut-then-merge"} <= {c.method for c in CELLS}
    assert GRIDS["fashion-mnist"]().folder == "fashion-mnist"


def test_of_two_tasks_half_is_one_so_the_union_has_no_row_of_its_own():
    cell = next(r.runs[0][0] for r in GRID.rows if r.method == UNION)
    assert cell.method == "cut" and cell.config["pruning"]["fusion"]["init_args"]["share"] == 0.5
    assert "disparse" not in METHODS and len(TASKS) == 2


def test_all_start_from_the_dense_model_of_their_seed_with_the_same_data_and_steps():
    for cell in (c for c in CELLS if c.start is not None):
        assert cell.start.seed == cell.seed and cell.start.method == "dense"
        trainer = {k: v for k, v in cell.config["trainer"].items() if k != "callbacks"}
        first = {k: v for k, v in CELLS[-1].config["trainer"].items() if k != "callbacks"}
        assert trainer == first and cell.config["data"]["class_path"].endswith("MultiFashion")
        assert cell.config["data"]["init_args"] == {**cell.start.config["data"]["init_args"]}
        lr = cell.config["model"]["init_args"]["optimizer"]["init_args"]["lr"]
        assert lr == RATES[cell.target or 0.0]


@pytest.mark.parametrize("method", MERGED)
def test_merged_models_are_cut_after_every_task_had_its_epoch(method):
    for cell in (c for c in CELLS if c.method == method):
        schedule = cell.config["pruning"]["schedule"]
        assert min(schedules.OneShot(**schedule["init_args"]).steps()) == len(TASKS)
