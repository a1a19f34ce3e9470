"""The table of models cut to latencies: its cells, and how its rows are told by runtime and precision."""

import dataclasses
import itertools
import json
import math
import re

import numpy as np
import pytest

from cut.records import machine
from experiments import delivery, devices, edge, figures, plots, tables, targets
from experiments.delivery import Delivery, Form
from experiments.grid import Grid, Row
from experiments.recipe import RECOVERY
from experiments.results import collect, tidy
from tests.experiments.grid_records import by_id, cell, dense_cell, record

SHARES = {
    "mobilenetv2": {
        "seg+depth": {
            "cut-channels": {0.75: 0.6, 0.5: 0.35, 0.35: 0.2},
            "group-norm": {0.5: 0.3},
            "width": {0.5: 0.55},
        }
    }
}


@pytest.fixture
def grid(monkeypatch):
    monkeypatch.setattr(edge, "shares", lambda: SHARES)
    return edge.edge_grid()


def of(grid, method, latency, tasks="seg+depth", model="mobilenetv2"):
    """The row's cells, one a seed."""
    rows = [r for r in grid.rows if r.method == method and r.variant["latency"] == latency]
    (row,) = [r for r in rows if "+".join(r.runs[0][0].tasks) == tasks and r.runs[0][0].configs[2] == f"model/{model}"]
    return [run[0] for run in row.runs]


def test_cells_have_the_shares_that_were_measured(grid):
    for latency, share in SHARES["mobilenetv2"]["seg+depth"]["cut-channels"].items():
        cells = of(grid, "cut-channels", latency)
        assert [c.seed for c in cells] == [1, 2]
        for one in cells:
            assert one.config["pruning"]["budget"] == {
                "class_path": "cut.limits.MACs",
                "init_args": {"target": share},
            }
            assert one.config["pruning"]["rounding"] == edge.ROUNDING
    assert of(grid, "group-norm", 0.5)[0].target == 0.3


def test_shapes_without_a_measurement_are_counted_not_shown(grid):
    planned = sum(len(edge.latencies(tasks)) for _, tasks, _ in edge.wanted())
    shown = sum(r.variant["latency"] < 1 for r in grid.rows)
    assert shown == 8 and f"{planned - 8} shapes are not measured" in grid.note


def test_a_method_that_takes_anothers_shares_is_cut_to_them(grid):
    for method, other in edge.SHARES_OF.items():
        for latency, share in SHARES["mobilenetv2"]["seg+depth"][other].items():
            assert {c.target for c in of(grid, method, latency)} == {share}


def test_every_selection_has_all_rivals_but_the_one_with_a_task_more():
    found = {}
    for model, tasks, method in edge.wanted():
        found.setdefault((model, tasks), set()).add(method)
    rivals = {"group-taylor", "group-norm", "width"}
    for (model, tasks), methods in found.items():
        assert {"cut-channels", "cut-channels-plus"} <= methods
        assert (rivals <= methods) == ("scene" not in tasks) and ("scene" not in tasks or model == "vit_small")
    assert {t for m, t in found if m == "vit_small"} == {*edge.SELECTIONS, (*edge.KEPT, "scene")}
    for tasks in edge.selections("vit_small"):
        assert edge.latencies(tasks) == ((0.5,) if "scene" in tasks else (0.75, 0.5, 0.35))


@pytest.mark.parametrize("model", edge.MODELS)
def test_all_networks_of_a_model_are_the_same_but_for_what_is_cut(model):
    cells = [edge.kept(model, edge.KEPT, 1), *(edge.cut(m, 0.5, model, edge.KEPT, 1) for m in edge.METHODS)]
    begun, narrow = edge.start(model, 1), edge.scaled(0.5, model, edge.KEPT, 1)
    network = begun.config["model"]["init_args"]["network"]
    for one in cells:
        assert one.config["model"]["init_args"]["network"] == network and one.start.id == begun.id
    assert narrow.config["model"]["init_args"]["network"] == {**network, "weights": None}
    assert model == "vit_small" or network["output_stride"] == 16


def test_rivals_have_the_recipe_of_cut(grid):
    ours, rival = of(grid, "cut-channels", 0.5)[0].config, of(grid, "group-norm", 0.5)[0].config
    for part in ("trainer", "data", "model", "seed_everything"):
        assert ours[part] == rival[part]
    for option in ("floor", "rounding", "batches", "tasks"):
        assert ours["pruning"].get(option) == rival["pruning"].get(option)


def test_only_the_vits_units_are_reduced_otherwise_and_only_by_cut():
    for model, method in itertools.product(edge.MODELS, edge.METHODS):
        units = edge.cut(method, 0.5, model, edge.KEPT, 1).config["pruning"]["units"]["init_args"]
        assert units["reduce"] == ("per_mac" if model == "vit_small" and method in edge.OURS else "sum")


def test_the_vits_rates_are_those_best_on_validation_and_more_pictures_fit_better():
    grid = edge.edge_vit_grid()
    frame = tidy(grid, collect(grid, tables.ROOT / "experiments/records" / grid.folder))
    assert set(frame["method"]) == set(edge.METHODS) and grid.split == "val"
    for method, rows in frame[frame["fitted_on"] < edge.FITTED_VIT].groupby("method"):
        assert list(rows["backbone_rate"]) == list(edge.BACKBONE_RATES)
        assert rows["delta_m"].notna().all()
        own = edge.CHOSEN.get((edge.VIT, method), {}).get(edge.BACKBONE_RATE, RECOVERY[edge.VIT][edge.BACKBONE_RATE])
        assert own == rows["backbone_rate"][rows["delta_m"].idxmax()], method
    fits = frame[(frame["method"] == "cut-channels-plus") & (frame["backbone_rate"] == 0.03)].set_index("fitted_on")
    assert fits["delta_m"][edge.FITTED_VIT] > fits["delta_m"][edge.FITTED]


def test_a_narrow_networks_rate_is_the_best_on_validation_of_those_tried_for_its_model():
    grid = edge.edge_width_grid()
    frame = tidy(grid, collect(grid, tables.ROOT / "experiments/records" / grid.folder))
    whole, frame = frame[frame["method"] == "dense"], frame[frame["method"] == edge.WIDTH]
    assert grid.split == "val" and len(frame) == sum(map(len, edge.WIDTH_RATES.values()))
    for model, tried in edge.WIDTH_RATES.items():
        rows = frame[frame["backbone"] == edge.start(model, 1).config["model"]["init_args"]["network"]["backbone"]]
        assert list(rows["learning_rate"]) == sorted(tried) and rows["delta_m"].notna().all()
        best = rows["learning_rate"][rows["delta_m"].idxmax()]
        assert best == tried[0] and min(tried) < best < max(tried), "the best is chosen, and not at the border"
    for model, rates in edge.DENSE_RATES.items():
        rows = whole[whole["backbone"] == edge.start(model, 1).config["model"]["init_args"]["network"]["backbone"]]
        assert rows["learning_rate"][rows["delta_m"].idxmax()] == rates[0] and len(rows) == len(rates)
    starts = {grid.against[cell.id].configs[2] for row in grid.rows for (cell,) in row.runs}
    assert starts == {f"model/{model}" for model in edge.MODELS}


def test_a_narrow_network_has_all_steps_and_only_the_kept_tasks(grid):
    one = of(grid, "width", 0.5)[0]
    begun = edge.start("mobilenetv2", 1)
    per_epoch = edge.PICTURES // edge.BATCH
    steps = one.config["trainer"]["max_epochs"] * per_epoch
    total = begun.config["trainer"]["max_epochs"] * per_epoch + edge.STEPS
    assert total <= steps < total + per_epoch
    assert one.start is None and one.tasks == ["seg", "depth"]
    assert one.config["model"]["init_args"]["width"] == 0.55
    assert one.config["model"]["init_args"]["network"]["weights"] is None
    assert grid.against[one.id].id == begun.id
    own, dense = (c.config["model"]["init_args"]["optimizer"] for c in (one, begun))
    rate = {"lr": edge.WIDTH_RATES["mobilenetv2"][0]}
    assert own == {**dense, "init_args": {**dense["init_args"], **rate}}


def test_every_cut_is_timed_against_the_dense_model_with_the_same_tasks(grid):
    known = delivery.references(grid)
    for name in ("cut-channels", "group-norm", "width"):
        for one in of(grid, name, 0.5):
            reference = known[one.id]
            assert reference.method == "dense-longer" and reference.tasks == one.tasks
            assert reference.seed == one.seed
    dense = of(grid, "dense-longer", 1.0)[0]
    assert known[dense.id].id == dense.id


# What is told.


def form(runtime="ONNX Runtime", precision="fp32", latency=5.0, share=0.5, metrics=None):
    return Form(
        runtime, precision, 2_000_000, latency, 1.2 * latency, share, share - 0.1, share + 0.1, 10**8, metrics or {}
    )


def delivered(of, *forms):
    return Delivery(of.id, "reference", tuple(forms), 1, 0.1, machine())


def small():
    cells = [cell("cut-channels", target=0.4, seed=s, tasks=("seg", "depth")) for s in (1, 2)]
    rows = (Row("cut-channels", tuple((c,) for c in cells), {"latency": 0.5}),)
    records = by_id(*(record(dense_cell(s)) for s in (1, 2)), *(record(c, {"seg/miou": 0.9}) for c in cells))
    return Grid("edge", "Edge", rows, by_file=True), cells, records


NETWORKS = {"mobilenetv2": "mobilenetv2_100", "resnet18": "resnet18", "vit_small": "vit_small_patch14_dinov2"}
WORSE = dict(zip((*edge.METHODS, edge.WIDTH), (0.02, 0.01, 0.05, 0.08, 0.3), strict=True))


def whole(monkeypatch):
    """The table with all shapes measured, its records and its deliveries, all made up."""
    of = {x: 0.8 * x for x in edge.LATENCIES}
    found = {}
    for model, tasks, method in edge.wanted():
        found.setdefault(model, {}).setdefault("+".join(tasks), {})[method] = of
    monkeypatch.setattr(edge, "shares", lambda: found)
    grid = edge.edge_grid()
    records, deliveries = {}, {}
    for row in grid.rows:
        for one in (run[0] for run in row.runs):
            backbone = NETWORKS[one.configs[2].removeprefix("model/")]
            start = grid.against.get(one.id, one.start)
            latency = row.variant["latency"]
            loss = WORSE.get(row.method, 0.01) * (1.2 - latency) * (1 + 0.2 * one.seed)
            worse = {"seg/miou": 1 - loss, "depth/rel": 1 + loss, "normal/mean": 1 + loss}
            records |= by_id(record(start, backbone=backbone), record(one, worse, backbone=backbone))
            ms = (20 if "vit" in backbone else 8) * latency
            size = dataclasses.replace(form(latency=ms, share=latency), bytes=int(8e6 * latency**2))
            deliveries[one.id] = delivered(one, size, form("PyTorch", share=latency))
    return grid, records, deliveries


def test_a_line_per_runtime_and_precision_with_means_over_seeds():
    grid, cells, records = small()
    own = {"seg/miou": 0.2, "seg/pixel_acc": 0.8, "depth/rel": 0.2}
    deliveries = {
        cells[0].id: delivered(cells[0], form(latency=4.0, share=0.4), form("ExecuTorch", "int8", metrics=own)),
        cells[1].id: delivered(cells[1], form(latency=6.0, share=0.6)),
    }
    found = devices.by_file(grid, records, deliveries)
    assert list(zip(found["runtime"], found["precision"], strict=True)) == [
        ("ONNX Runtime", "fp32"),
        ("ExecuTorch", "int8"),
    ]
    first, second = found.iloc[0], found.iloc[1]
    assert first["latency_ms"] == pytest.approx(5.0) and first["latency_ratio"] == pytest.approx(0.5)
    assert first["latency_p95_ms"] == pytest.approx(6.0) and first["seeds"] == 2
    # seg/miou at 0.9 of the dense one: a quarter of that change, of two metrics and two tasks.
    assert first["delta_m"] == pytest.approx(-10 / 2 / 2)
    # The int8 file's own numbers: seg/miou 0.2 of 0.4.
    assert second["delta_m"] == pytest.approx(-50 / 2 / 2) and second["seeds"] == 1
    assert second["seg/miou"] == 0.2 and math.isnan(second["delta_m_std"])
    # Less what the same seed's model has; fp32 files are that model.
    assert second["delta_m_from_fp32"] == pytest.approx(-12.5 + 2.5) and math.isnan(first["delta_m_from_fp32"])


def test_a_row_that_was_not_delivered_has_one_line_without_a_runtime():
    grid, _, records = small()
    found = devices.by_file(grid, records, {})
    assert len(found) == 1 and found["runtime"].isna().all() and np.isfinite(found["delta_m"].iloc[0])


def test_the_page_tells_both_runtimes_and_int8(tmp_path):
    grid, cells, records = small()
    for one in records.values():
        one.write(tmp_path / "records")
    metrics = {"seg/miou": 0.2, "seg/pixel_acc": 0.8, "depth/rel": 0.2}
    delivered(
        cells[0],
        form(latency=4.0, share=0.41),
        form("ExecuTorch", share=0.37),
        form(precision="int8", metrics=metrics),
    ).write(tmp_path / "delivery")
    paths = devices.write(grid, tmp_path / "records", tmp_path / "out", tmp_path / "delivery")
    page = paths[0].read_text()
    (line,) = [x for x in page.splitlines() if x.startswith("| cut-channels")]
    cells_of = [c.strip() for c in line.strip("|").split("|")]
    assert cells_of[:4] == ["cut-channels", "0.5", "2", "-2.50 ± 0.00"]
    assert "0.41" in cells_of and "0.37" in cells_of and "-12.50" in cells_of
    head = paths[1].read_text().splitlines()[0].split(",")
    assert {"runtime", "precision", "latency_ms", "latency_p95_ms", "latency_ratio"} <= set(head)
    assert r"\toprule" in paths[2].read_text()


def test_what_is_cut_by_weights_is_told_by_its_aim_with_or_without_records(monkeypatch):
    grid, records, deliveries = whole(monkeypatch)
    for known in (records, {}):
        bodies = [t.body for t in devices.tables(grid, devices.by_file(grid, known, deliveries if known else {}))]
        rows = [[c.text for c in line] for body in bodies for line in body]
        assert [r[0] for r in rows if "weights" in r[0]] == ["cut (70% of weights)", "cut (90% of weights)"]
        assert len(rows) == len(grid.rows), "a line per row of the table"


PAGE = "a\n" + "".join(f"<!-- table:{n} -->\nold\n<!-- end -->\n" for n in ("hours", "targets", "beside")) + "b"


def judged(monkeypatch, without=()):
    """The cells of both tables of targets, by their labels; without the records of some methods."""
    grid, records, deliveries = whole(monkeypatch)
    gone = {run[0].id for row in grid.rows for run in row.runs if row.method in without}
    records = {k: v for k, v in records.items() if k not in gone}
    found = targets.lines(grid, devices.by_file(grid, records, deliveries))
    first = targets.against(found, edge.OURS, (*edge.RIVALS, edge.WIDTH))
    second = targets.dropped(found, edge.OURS, "seg+depth", "seg+normal+depth")
    return grid, records, deliveries, first, second


def test_every_latency_is_judged_against_every_rival(monkeypatch):
    grid, records, _, first, _ = judged(monkeypatch)
    assert len(first.body) == 18  # three networks, two selections, three latencies
    for name, aim, *cells in first.body:
        *values, verdict = [c.text for c in cells]
        numbers = dict(zip(first.head[2:-1], (float(v.split()[0]) for v in values), strict=True))
        assert [m for m, c in zip(numbers, cells, strict=False) if c.bold] == ["cut-channels-plus"]
        assert verdict == "cut-channels, cut-channels-plus"
        assert sorted(numbers, key=numbers.get, reverse=True) == sorted(WORSE, key=WORSE.get)
        assert {v.split()[1] for v in values} == {f"({float(aim.text):.2f})"}
        backbone, *tasks = name.text.split(", ")
        row = next(
            i
            for i, r in enumerate(grid.rows)
            if (r.method, r.variant["latency"]) == ("group-norm", float(aim.text))
            and NETWORKS[r.runs[0][0].configs[2].removeprefix("model/")] == backbone
            and r.runs[0][0].tasks == tasks
        )
        assert numbers["group-norm"] == pytest.approx(tidy(grid, records)["delta_m"].iloc[row], abs=0.006)


def test_nothing_is_judged_while_a_rival_is_missing(monkeypatch):
    *_, first, second = judged(monkeypatch, without=("width",))
    assert {row[-1].text for row in first.body} == {row[-2].text for row in first.body} == {"missing"}
    assert {sum(c.bold for c in row) for row in first.body} == {1} and second.body


def test_one_that_is_below_a_rival_is_not_named(monkeypatch):
    monkeypatch.setitem(WORSE, "cut-channels", 0.06)
    *_, first, _ = judged(monkeypatch)
    assert {row[-1].text for row in first.body} == {"cut-channels-plus"}
    monkeypatch.setitem(WORSE, "width", 0.001)
    *_, first, _ = judged(monkeypatch)
    assert {row[-1].text for row in first.body} == {"none"}


@pytest.mark.parametrize(
    ("share", "rival", "verdict"),
    [
        (0.5, -4.1, "ours"),  # at the aim
        (0.5, -3.9, "none"),
        (0.6, -3.1, "ours"),  # slower than ours: compared with what ours has at 0.6, which is -3
        (0.6, -2.9, "none"),
        (0.4, -7.1, "ours"),  # faster than ours at this aim; ours has -7 there
        (0.4, -6.9, "none"),
        (0.25, -11.6, "ours"),  # faster than any of ours: -11.5 on the last line
        (0.25, -11.4, "none"),
        (math.nan, -20.0, "missing"),
    ],
)
def test_ours_are_judged_at_the_latency_that_a_rival_really_takes(share, rival, verdict):
    def line(x, y):
        return {"latency_ratio": x, "delta_m": y}

    found = {
        ("net", "seg", 1.0, "dense-longer"): line(1.0, 0.0),
        ("net", "seg", 0.75, "ours"): line(0.75, -1.5),
        ("net", "seg", 0.5, "ours"): line(0.5, -4.0),
        ("net", "seg", 0.35, "ours"): line(0.3, -10.0),
        ("net", "seg", 0.5, "rival"): line(share, rival),
        ("net", "depth", 0.5, "ours"): line(0.5, 9.0),  # another selection's
    }
    (row,) = targets.against(found, ["ours"], ["rival"]).body
    assert [c.text for c in row][1:] == ["0.5", "-4.00 (0.50)", row[3].text, verdict]


def test_a_dropped_task_is_told_by_what_the_others_gain(monkeypatch):
    grid, records, _, _, second = judged(monkeypatch)
    assert len(second.body) == len(edge.MODELS) * len(edge.OURS) * len(edge.LATENCIES)
    one = [c.text for c in second.body[0]]
    assert one[:3] == ["mobilenetv2_100", "cut-channels", "0.75"]
    frame = tidy(grid, records)
    alike = [i for i, r in enumerate(grid.rows) if (r.method, r.variant["latency"]) == ("cut-channels", 0.75)]
    less, more = (
        frame.iloc[next(i for i in alike if frame["tasks"].iloc[i] == t)] for t in ("seg+depth", "seg+normal+depth")
    )
    without, with_ = ((x["delta_m/seg"] + x["delta_m/depth"]) / 2 for x in (less, more))
    assert [float(x) for x in one[3:6]] == pytest.approx([with_, without, without - with_], abs=0.006)
    assert one[6:] == ["6.0", "6.0"]


def test_hours_are_those_of_all_runs_dense_ones_included(monkeypatch):
    grid, records, _ = whole(monkeypatch)
    for one in records.values():
        one.score_seconds, one.finetune_seconds = 360.0, 1800.0
    *networks, total = [[c.text for c in row] for row in targets.hours(grid, records).body]
    ids = {c.id for c in grid.cells()}
    assert total == ["all", str(len(ids)), f"{len(ids) / 10:.1f}", f"{len(ids) / 2:.1f}"]
    assert sum(int(row[1]) for row in networks) == len(ids) and len(networks) == len(edge.MODELS)
    some = dict(list(records.items())[:3])
    assert [c.text for c in targets.hours(grid, some).body[-1]][1:] == ["3", "0.3", "1.5"]


def test_the_forms_of_a_model_stand_side_by_side(monkeypatch, tmp_path):
    grid, _, deliveries = whole(monkeypatch)
    assert "Not measured yet" in devices.side_by_side(grid, deliveries)
    cells = delivery.shown(grid)
    assert [c.configs[2] for c in cells] == [f"model/{m}" for m in edge.MODELS]
    for one in cells:
        runtimes = ("ONNX Runtime", "ExecuTorch", "PyTorch")
        sides = {
            name: tuple(form(r, latency=9.0 * share, share=share) for r in runtimes)
            for name, share in {"dense": 1.0, "masked": 1.04}.items()
        }
        forms = (*(form(r, latency=4.5, share=0.52) for r in runtimes), form(precision="int8", latency=3.0))
        deliveries[one.id] = dataclasses.replace(deliveries[one.id], forms=forms, beside=sides)
    text = devices.side_by_side(grid, deliveries)
    rows = [[c.strip() for c in x.strip("|").split("|")] for x in text.splitlines() if "| dense |" in x or "ed |" in x]
    rows += [[c.strip() for c in x.strip("|").split("|")] for x in text.splitlines() if "| compact |" in x]
    assert len(rows) == 3 * len(edge.MODELS)
    for _, side, *numbers in rows:
        ms, share = {"dense": ("9.0", "1.00"), "masked": ("9.4", "1.04"), "compact": ("4.5", "0.52")}[side]
        assert numbers == [ms, share] * 3 + ["2.00"]
    told = tables.page(grid, PAGE, tmp_path / "records", tmp_path)
    assert "<!-- table:beside -->\nNot measured yet: `make table-edge` times these files.\n<!-- end -->\nb" in told
    for one in cells:
        deliveries[one.id].write(tmp_path)
    assert text in tables.page(grid, told, tmp_path / "records", tmp_path)


def test_the_committed_page_is_that_of_the_deliveries():
    text = (tables.ROOT / "docs/edge.md").read_text()
    grid = edge.edge_grid()
    assert tables.page(grid, text, tables.ROOT / "experiments/records" / grid.folder) == text


def test_the_command_that_renders_the_table_renders_the_page_beside_it(monkeypatch, tmp_path):
    grid, _, _ = small()
    monkeypatch.setattr(tables, "GRIDS", {"edge": lambda: grid})
    (tmp_path / "edge.md").write_text(PAGE)
    assert tables.main(["--grid", "edge", "--records", str(tmp_path), "--out", str(tmp_path / "tables")]) == 0
    text = (tmp_path / "edge.md").read_text()
    assert text.count("Not measured yet") == 2 and "old" not in text


def test_a_delivery_comes_back_as_it_was_and_a_damaged_one_is_named(tmp_path):
    _, cells, _ = small()
    one = delivered(cells[0], form(metrics={"seg/miou": 0.2}))
    path = one.write(tmp_path)
    assert delivery.read(path) == one
    for text in ("{", "[]", json.dumps({"run": "x"}), path.read_text().replace("latency_ms", "latency")):
        path.write_text(text)
        with pytest.raises(ValueError, match=re.escape(path.name)):
            delivery.read(path)


def test_a_figure_of_all_models_has_a_row_of_panels_per_model_and_fits_a_page(monkeypatch, tmp_path):
    grid, records, deliveries = whole(monkeypatch)
    monkeypatch.setattr(delivery, "collect", lambda grid: deliveries)
    for x in ("latency_ratio", "file_bytes"):
        figure = figures._delivered(x)(grid, records)
        width, height = figure.get_size_inches()
        assert width <= 14 and height <= 12
        panels = [a for a in figure.axes if a.axison]
        assert [a.get_title().split("\n")[1] for a in panels] == [
            *[NETWORKS["mobilenetv2"]] * 2,
            *[NETWORKS["resnet18"]] * 2,
            *[NETWORKS["vit_small"]] * 3,
        ]
        figures.save(figure, tmp_path / x)  # places everything
        legend = next(a.get_legend() for a in figure.axes if a.get_legend() is not None)
        drawn = [*(a.get_tightbbox() for a in panels), legend.get_window_extent()]
        assert not [1 for i, a in enumerate(drawn) for b in drawn[:i] if a.overlaps(b)], "panels and legend lie apart"
        assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in drawn), "nothing ends at the edge"
        assert {t.get_text() for t in legend.get_texts()} >= {*edge.METHODS, edge.WIDTH, "dense-longer"}


def test_figures_against_latency_and_size_have_a_line_per_method(monkeypatch):
    grid, cells, records = small()
    deliveries = {c.id: delivered(c, form(latency=4.0 + i, share=0.4), form("PyTorch")) for i, c in enumerate(cells)}
    monkeypatch.setattr(delivery, "collect", lambda grid: deliveries)
    for x in ("latency_ratio", "file_bytes"):
        figure = figures._delivered(x)(grid, records)
        (axes,) = figure.axes
        assert axes.get_legend_handles_labels()[1] == ["cut-channels"]
        assert axes.get_xlabel() == plots.AXES[x][0]
    monkeypatch.setattr(delivery, "collect", lambda grid: {})
    assert figures._delivered("file_bytes")(grid, records) is None
