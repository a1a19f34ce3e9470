"""Curves of adaptation: areas, spreads and paired differences are those of loops over the records."""

import dataclasses
import math

import numpy as np
import pytest

from experiments import curves, findings, plots, tables
from experiments.findings import rendered
from experiments.grids import GRIDS
from experiments.newtask import SIMILAR, UNPRUNED
from tests.experiments.grid_records import record

GRID = GRIDS["newtask"]()
STEPS = (0, 20, 60, 100)
METRIC = {"seg": "miou", "normal": "mean", "depth": "rel", "edge": "l1", "keypoint": "l1", "scene": "accuracy"}
UP = ("seg", "scene")


def level(method, step):
    """How much of the reference's quality a method has after some steps."""
    start = {"similar-tasks": -60.0, "similar-tasks-random": -80.0, "cut": -40.0, UNPRUNED: -20.0}.get(method, -150.0)
    return start * (1 - step / 100)


def made(keep=lambda cell: True):
    """Records of all cells, with curves that are known."""
    found = {}
    for row in GRID.rows:
        for cell in (c for run in row.runs for c in run):
            if not keep(cell):
                continue
            task, seed = cell.tasks[0], cell.seed
            name = f"{task}/{METRIC[task]}"
            curve = []
            for step in STEPS:
                change = (level(cell.method, step) + (seed - 1) * 2 * (step < 100)) / 100
                curve.append({"step": step, f"test/{name}": 0.5 * (1 + change if task in UP else 1 - change)})
            facts = {"head_seconds": 1.0, "ready_seconds": 2.0 + seed, "ready_memory": 2**20, "curve": curve}
            last = {name: curve[-1][f"test/{name}"]}
            found[cell.id] = record(
                cell,
                metrics=last,
                newtask=facts,
                higher_is_better={name: task in UP},
                cost={f: {"params": 1, "nonzero": 1, "macs": 1, "bytes": 4} for f in ("dense_all_heads", "compact")},
                layer_sparsity={},
                mask_overlap={},
                dropped_tasks=[],
            )
    return found


@pytest.fixture(scope="module")
def frame():
    return curves.points(GRID, made())


def test_area_is_that_of_many_small_trapezoids():
    rng = np.random.default_rng(0)
    steps, values = [0, 20, 60, 100], rng.normal(size=4).tolist()
    fine = np.linspace(0, 100, 10_001)
    assert curves.area(steps, values) == pytest.approx(np.interp(fine, steps, values).mean(), abs=1e-3)


def test_points_tell_the_clipped_change_against_the_unpruned_models_end(frame):
    some = frame[(frame["method"] == SIMILAR) & (frame["task"] == "depth") & (frame["seed"] == 1)]
    assert some["step"].tolist()[:4] == [*STEPS]
    assert some["delta_m_bounded"].tolist()[:4] == pytest.approx([-60, -48, -24, 0])
    worst = frame[(frame["method"] == "random") & (frame["step"] == 0) & (frame["seed"] == 1)]
    assert worst["delta_m_bounded"].tolist() == pytest.approx([-100.0] * len(worst))
    assert worst["delta_m"].tolist() == pytest.approx([-150.0] * len(worst))


def test_spread_is_over_tasks_of_means_over_seeds_and_pairs_are_of_task_and_seed(frame):
    found = curves.runs(frame)
    ours = curves.of_method(GRID, found, SIMILAR, {"budget": "90%"})
    theirs = curves.of_method(GRID, found, "similar-tasks-random", {"budget": "90%"})
    assert len(ours) == len(theirs) == 12
    mean, std = curves.spread(ours, "0")
    assert mean == pytest.approx(-59.0) and std == pytest.approx(0.0, abs=1e-9)
    mean, std, wins, count = curves.paired(ours, theirs)
    assert (wins, count) == (12, 12) and mean == pytest.approx(10.0) and std == pytest.approx(0.0, abs=1e-9)
    assert curves.told(mean, std, wins, count) == "+10.0 ± 0.0 (12 of 12 better)"


def test_runs_that_are_missing_are_said_to_be(tmp_path):
    for folder, keep in (("none", lambda c: False), ("some", lambda c: c.seed == 1)):
        for record_ in made(keep).values():
            record_.write(tmp_path / folder)
        (tmp_path / folder).mkdir(exist_ok=True)
        paths = tables.write(GRID, tmp_path / folder, tmp_path / "out")
        text = paths[0].read_text()
        assert ("6 of 12" in text) == (folder == "some") and ("0 of 12" in text) == (folder == "none")
        assert "missing" in text and [p.suffix for p in paths] == [".md", ".csv", ".tex"]
    assert math.isnan(curves.spread(curves.runs(curves.points(GRID, {})), "area")[0])


def test_a_template_gets_the_numbers_of_the_records(tmp_path):
    for record_ in made().values():
        record_.write(tmp_path)
    text = (
        '{{ adapted("newtask", "similar-tasks", "100", budget="90%") }}|'
        '{{ difference("newtask", "similar-tasks", "cut", budget="90%") }}|'
        '{{ gap("newtask", "similar-tasks", "similar-tasks-all", budget="90%") > 0 }}'
    )
    assert rendered(text, tmp_path) == "0.0 ± 0.0|-10.0 ± 0.0 (0 of 12 better)|True"
    assert "missing" not in rendered('{{ matters("newtask") }}{{ steps("newtask", budget="2 MB") }}', tmp_path)
    with pytest.raises(ValueError, match="0 rows of 'snap'"):
        rendered('{{ adapted("newtask", "snap", budget="90%") }}', tmp_path)


def test_the_figure_has_a_panel_per_budget_and_a_line_per_method(frame):
    drawn = curves.drawn(GRID, frame)
    figure = plots.recovery(drawn)
    assert [a.get_title() for a in figure.axes] == ["70%", "90%", "4 MB", "2 MB"]
    assert {"similar-tasks", "cut", UNPRUNED} <= set(drawn["label"])
    assert not curves.drawn(GRID, curves.points(GRID, {})).size


def test_the_committed_page_is_what_template_and_records_give():
    docs = findings.ROOT / "docs"
    text = (docs / "newtask.template.md").read_text(encoding="utf-8")
    assert (docs / "newtask.md").read_text(encoding="utf-8") == rendered(text)


def test_records_keep_what_happened_to_a_new_task():
    (found,) = made(lambda c: c.id == GRID.rows[0].runs[0][0].id).values()
    assert dataclasses.asdict(found)["newtask"]["curve"][-1]["step"] == 100
