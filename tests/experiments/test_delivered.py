"""The report's table of delivered files holds the numbers of the deliveries, a row per model, runtime and precision."""

import json

import numpy as np
import pytest

from experiments import devices
from experiments.report import delivered as report
from experiments.report.table import Source
from tests.experiments.test_edge import delivered, form, small

SOURCE = Source("Edge", "records/here", lambda run, again: f"make {run}{' again' * again}")
INT8 = {"seg/miou": 0.2, "seg/pixel_acc": 0.8, "depth/rel": 0.2}


@pytest.fixture
def parts():
    grid, cells, records = small()
    deliveries = {
        cells[0].id: delivered(cells[0], form(latency=4.0, share=0.4), form("ExecuTorch", "int8", metrics=INT8)),
        cells[1].id: delivered(cells[1], form(latency=6.0, share=0.6)),
    }
    return grid, records, deliveries


def test_no_delivery_no_table(parts):
    grid, records, _ = parts
    assert report.table(grid, records, {}, SOURCE) is None


def test_a_row_per_runtime_and_precision_with_the_means_of_its_seeds(parts):
    grid, records, deliveries = parts
    found = report.table(grid, records, deliveries, SOURCE)
    full, int8 = found["rows"]
    assert [full["cells"][k]["t"] for k in ("runtime", "precision", "seeds")] == ["ONNX Runtime", "fp32", "2"]
    assert [int8["cells"][k]["t"] for k in ("runtime", "precision", "seeds")] == ["ExecuTorch", "int8", "1"]
    assert full["cells"]["latency_ms"]["v"] == pytest.approx(np.mean([4.0, 6.0]))
    assert full["cells"]["latency_ratio"]["v"] == pytest.approx(np.mean([0.4, 0.6]))
    assert full["cells"]["file_bytes"]["t"] == "2.00" and full["cells"]["peak_bytes"]["t"] == "100"
    assert (full["y"], int8["y"]) == pytest.approx((-2.5, -12.5))
    assert full["std"] == pytest.approx(0.0) and int8["std"] is None
    assert full["label"] != int8["label"]


def test_rows_are_those_of_the_table_on_paper(parts):
    grid, records, deliveries = parts
    frame = devices.by_file(grid, records, deliveries)
    rows = report.table(grid, records, deliveries, SOURCE)["rows"]
    for row, (_, line) in zip(rows, frame.iterrows(), strict=True):
        for key, (_, scale, _) in report.SHOWN.items():
            assert row["cells"][key]["v"] == pytest.approx(scale * line[key], rel=1e-3)


def test_a_row_opens_to_its_runs_and_says_what_makes_them(parts):
    grid, records, deliveries = parts
    full, _ = report.table(grid, records, deliveries, SOURCE)["rows"]
    assert [r["seed"] for r in full["runs"]] == [1, 2]
    for run, name in zip(full["runs"], deliveries, strict=True):
        assert run["records"][0]["id"] == name and run["commands"] == [f"make {name} again"]


def test_every_row_has_a_cell_in_every_column_and_ends_as_plain_json(parts):
    found = report.table(*parts, SOURCE)
    for row in found["rows"]:
        assert {c["key"] for c in found["columns"]} <= set(row["cells"])
    assert json.loads(json.dumps(found, allow_nan=False)) == found
