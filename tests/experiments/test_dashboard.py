"""Records as W&B runs, workspace and report as code; nothing is sent."""

import json
from pathlib import Path

import pytest

from experiments import dashboard, results
from experiments.grids import GRIDS
from tests.offline_runs import read_run

RECORDS = Path(__file__).parents[2] / "experiments/records/rooms"


@pytest.fixture(scope="module")
def grid():
    """The main table with two of its rows only."""
    whole = GRIDS["rooms"]()
    chosen = [r for r in whole.rows if r.method in ("dense", "cut")][:2]
    return type(whole)(whole.name, whole.title, tuple(chosen), {}, split=whole.split)


def test_records_become_runs_with_their_delta(grid, tmp_path):
    count = dashboard.send(grid, RECORDS, "cut", None, tmp_path, online=False)
    found = {r["run"].display_name: r for r in map(read_run, (tmp_path / "wandb").glob("offline-run-*"))}
    records = results.collect(grid, RECORDS)
    assert count == len(found) == len(records) > 1 and set(found) == set(records)
    frame = results.tidy(grid, records)
    shown = frame[frame["method"] == "cut"].iloc[0]
    deltas = [r["summary"][dashboard.DELTA] for name, r in found.items() if records[name].method == "cut"]
    assert sum(deltas) / len(deltas) == pytest.approx(shown["delta_m"], abs=1e-6)
    for name, one in found.items():
        assert one["run"].run_group == "rooms"
        assert one["run"].job_type == ("dense" if records[name].method == "dense" else "prune")
        assert len([h for h in one["history"] if "train/loss" in h]) == len(records[name].history)
        assert {a.type for a in one["artifacts"] if a.type != "run_table"} == {"record"}


def panels(specification: dict) -> dict[str, list[dict]]:
    sections = specification["spec"]["section"]["panelBankConfig"]["sections"]
    return {s["name"]: s["panels"] for s in sections}


def test_the_workspace_has_the_trade_off_and_every_tasks_metrics(grid, tmp_path):
    pytest.importorskip("wandb_workspaces")
    out = tmp_path / "workspace.json"
    assert dashboard.main(["workspace", "--entity", "me", "--out", str(out)]) == 0
    found = panels(json.loads(out.read_text()))
    axes = {p["config"]["xAxis"] for p in found["Trade-off"]}
    assert axes == {f"summary:{x}" for x, _, _ in dashboard.AXES}
    assert all(p["config"]["yAxis"] == f"summary:{dashboard.DELTA}" for p in found["Trade-off"])
    wanted = dashboard.metrics(list(results.collect(GRIDS["rooms"](), RECORDS).values()))
    for task, names in wanted.items():
        assert [p["config"]["metrics"] for p in found[f"Task: {task}"]] == [[f"val/{n}"] for n in names]
    assert {"Layers and overlap", "Predictions", "Cost", "Runs side by side"} <= set(found)


def test_every_summary_key_of_a_panel_is_one_that_runs_have(grid):
    from experiments.tracking import summary

    record = next(r for r in dashboard.runs(grid, RECORDS) if r.method == "cut")
    assert {dashboard.DELTA, *(x for x, _, _ in dashboard.AXES)} <= set(summary(record))


def test_the_report_filters_runs_by_table(tmp_path):
    pytest.importorskip("wandb_workspaces")
    out = tmp_path / "report.json"
    assert dashboard.main(["report", "rooms", "recovery", "--entity", "me", "--out", str(out)]) == 0
    text = out.read_text()
    grids = [b for b in json.loads(text)["spec"]["blocks"] if b["type"] == "panel-grid"]
    groups = [g["metadata"]["runSets"][0]["filters"]["filters"][0]["value"] for g in grids]
    assert groups[:2] == ["rooms", "recovery"]
    assert GRIDS["recovery"]().title in text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["runs", "nothing"], "no grid 'nothing'; allowed: rates"),
        (["workspace"], "give --entity"),
        (["report", "--entity", "me"], "no key"),
    ],
)
def test_what_cannot_be_done_is_said(line, message, capsys, monkeypatch, tmp_path):
    pytest.importorskip("wandb_workspaces")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert dashboard.main(line) == 2
    assert message in capsys.readouterr().err
