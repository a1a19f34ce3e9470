"""The tidy frame of a grid: means, spreads, references, joined runs, missing records."""

import math

import numpy as np
import pytest

from experiments.cell import Cell
from experiments.grid import Grid, Row
from experiments.results import by_run, changes, collect, costs, level, levels, tidy
from tests.experiments.grid_records import BASE, TASKS, by_id, cell, dense_cell, record
from tests.experiments.grid_records import form as made

SEEDS = (1, 2, 3)
WORSE = {1: 0.9, 2: 0.8, 3: 0.95}  # factor on seg/miou by seed


def grid(*rows, **more):
    return Grid("rooms", "Rooms", tuple(rows), **more)


def row(method="cut", variant=None, **settings):
    return Row(method, tuple((cell(method, seed=s, **settings),) for s in SEEDS), variant or {})


def runs():
    dense = [record(dense_cell(s)) for s in SEEDS]
    return by_id(*dense, *(record(cell(seed=s), {"seg/miou": WORSE[s]}) for s in SEEDS))


def only(frame):
    assert len(frame) == 1
    return frame.iloc[0]


def test_columns_and_their_order():
    frame = tidy(grid(row(variant={"steps": 5}), row("disparse", {"floor": 0.1})), runs())
    head = ["method", "sparsity", "tasks", "backbone", "steps", "floor", "seeds", "delta_m", "delta_m_std"]
    head += ["delta_m_bounded", "delta_m_vs_longer", "params", "nonzero", "macs", "bytes", "score_seconds"]
    head += ["finetune_seconds", "peak_memory"]
    head += [f"{m}{x}" for m in ("seg/miou", "seg/pixel_acc", "normal/mean", "depth/rel") for x in ("", "_std")]
    assert list(frame.columns) == head


def test_means_and_sample_deviations_over_seeds():
    found = only(tidy(grid(row()), runs()))
    # Of three tasks only seg changes, and of its two metrics only one: a sixth of that metric's change.
    deltas = [100 * (WORSE[s] - 1) / 2 / 3 for s in SEEDS]
    assert found["delta_m"] == pytest.approx(np.mean(deltas))
    assert found["delta_m_std"] == pytest.approx(np.std(deltas, ddof=1))
    assert found["delta_m_bounded"] == pytest.approx(found["delta_m"])
    assert found["seg/miou"] == pytest.approx(0.4 * np.mean(list(WORSE.values())))
    assert found["seg/miou_std"] == pytest.approx(0.4 * np.std(list(WORSE.values()), ddof=1))
    assert (found["seeds"], found["sparsity"], found["tasks"]) == (3, 0.9, "seg+normal+depth")
    assert (found["params"], found["nonzero"], found["macs"], found["bytes"]) == (600_000, 80_000, 6_000_000, 320_000)
    assert found["backbone"] == "mobilenetv2_100" and math.isnan(found["delta_m_vs_longer"])


def test_each_seed_is_compared_with_its_own_dense_model():
    records = runs()
    records[dense_cell(2).id].metrics["test"]["seg/miou"] *= 0.5
    deltas = [100 * (WORSE[s] / (0.5 if s == 2 else 1) - 1) / 6 for s in SEEDS]
    assert only(tidy(grid(row()), records))["delta_m"] == pytest.approx(np.mean(deltas))


def test_the_bounded_change_is_at_most_100_percent_per_metric():
    records = by_id(record(dense_cell()), record(cell(), {"normal/mean": 4.0}))
    found = only(tidy(grid(Row("cut", ((cell(),),))), records))
    assert found["delta_m"] == pytest.approx(-100) and found["delta_m_bounded"] == pytest.approx(-100 / 3)


def test_dense_rows_are_zero_and_cost_what_their_heads_cost():
    all_heads, three = dense_cell(), dense_cell(**{"pruning.tasks": TASKS})
    frame = tidy(
        grid(Row("dense", ((all_heads,),)), Row("three", ((three,),))), by_id(*map(record, (all_heads, three)))
    )
    assert frame["delta_m"].tolist() == [0, 0] and frame["sparsity"].tolist() == [0, 0]
    assert frame["params"].tolist() == [1_000_000, 900_000]


def test_the_longer_dense_model_is_the_second_reference():
    longer = dense_cell(**{"trainer.max_epochs": 99})
    of = grid(Row("cut", ((cell(),),)), Row("dense", ((dense_cell(),),)), longer={dense_cell().id: longer})
    records = by_id(record(dense_cell()), record(longer, {"seg/miou": 1.25}), record(cell()))
    frame = tidy(of, records)
    assert frame["delta_m"].tolist() == [0, 0]
    # Cut keeps three tasks, the dense model has four: one of seg's two metrics is a fifth below the longer model's.
    assert frame["delta_m_vs_longer"].tolist() == pytest.approx([-20 / 2 / 3, -20 / 2 / 4])


def test_a_dense_model_of_more_tasks_is_compared_with_the_longer_one_on_those_it_has():
    longer = dense_cell(**{"pruning.tasks": ["seg", "depth"], "trainer.max_epochs": 99})
    of = grid(Row("dense", ((dense_cell(),),)), longer={dense_cell().id: longer})
    records = by_id(record(dense_cell()), record(longer, {"depth/rel": 0.5}))
    assert only(tidy(of, records))["delta_m_vs_longer"] == pytest.approx(-100 / 2)
    assert math.isnan(only(tidy(of, by_id(record(dense_cell()))))["delta_m_vs_longer"])


def test_one_run_of_several_models_is_their_sum():
    seg, depth = (cell(tasks=(t,), target=x) for t, x in (("seg", 0.9), ("depth", 0.6)))
    big, small = ({"dense_all_heads": {}, "kept_heads": {"params": n}} for n in (300, 100))
    big["compact"] = {"params": 30, "nonzero": 20, "macs": 7, "bytes": 5}
    small["compact"] = {"params": 3, "nonzero": 2, "macs": 1, "bytes": 4}
    records = by_id(
        record(dense_cell()),
        record(seg, {"seg/miou": 0.5, "seg/pixel_acc": 0.5}, cost=big, peak_memory=5, score_seconds=1.0),
        record(depth, {"depth/rel": 2.0}, cost=small, peak_memory=9, score_seconds=2.0),
    )
    of = grid(Row("single", ((seg, depth),)))
    frame = tidy(of, records)
    found = only(frame)
    assert found["tasks"] == "seg+depth" and found["sparsity"] == pytest.approx(1 - (300 * 0.1 + 100 * 0.4) / 400)
    assert [found[k] for k in ("params", "nonzero", "macs", "bytes")] == [33, 22, 8, 9]
    assert (found["peak_memory"], found["score_seconds"], found["finetune_seconds"]) == (9, 3.0, 120.0)
    assert found["delta_m"] == pytest.approx((-50 - 100) / 2)
    assert (found["seg/miou"], found["depth/rel"]) == pytest.approx((0.2, 0.4))
    assert levels(of, frame) == [pytest.approx(0.825)]
    del records[depth.id]
    assert only(tidy(of, records))["seeds"] == 0


def test_missing_records_leave_what_is_there():
    records = runs()
    del records[cell(seed=2).id]
    found = only(tidy(grid(row()), records))
    kept = [WORSE[1], WORSE[3]]
    assert found["seeds"] == 2 and found["seg/miou_std"] == pytest.approx(0.4 * np.std(kept, ddof=1))
    del records[cell(seed=3).id]
    one = only(tidy(grid(row()), records))
    assert one["seeds"] == 1 and math.isnan(one["delta_m_std"]) and one["delta_m"] == pytest.approx(-10 / 6)


def test_a_row_without_records_stays_with_empty_cells():
    frame = tidy(grid(row(), row("disparse")), runs())
    empty = frame.iloc[1]
    assert (empty["method"], empty["tasks"], empty["backbone"]) == ("disparse", "seg+normal+depth", "mobilenetv2_100")
    assert empty["seeds"] == 0 and empty[["sparsity", "delta_m", "params", "seg/miou"]].isna().all()
    assert levels(grid(row(), row("disparse")), frame) == [0.9, 0.9]
    assert len(tidy(grid(row()), {})) == 1


def test_a_seed_without_its_dense_record_has_no_delta():
    records = runs()
    del records[dense_cell(3).id]
    found = only(tidy(grid(row()), records))
    assert found["seeds"] == 3 and math.isnan(found["delta_m"]) and found["seg/miou"] > 0


def test_the_grids_rule_selects_on_both_sides():
    entry = {"epoch": 1, "step": 4, "val/loss": 1.0, "test/loss": 1.0}
    dense = record(dense_cell(), history=[entry | {"test/seg/miou": 0.5, "test/edge/l1": 0.1}])
    pruned = record(cell(tasks=("seg",)), history=[entry | {"test/seg/miou": 0.4}])
    of = grid(Row("cut", ((cell(tasks=("seg",)),),)), selection="best_val")
    assert only(tidy(of, by_id(dense, pruned)))["delta_m"] == pytest.approx(-20)


def test_levels_without_a_sparsity_target_come_from_what_was_achieved():
    ratio = Cell((*BASE, "pruning/cut-reference"), start=dense_cell())
    assert ratio.config["pruning"]["budget"]["class_path"].endswith("KeepRatio")
    by_ratio = Row("ratio", ((ratio,),))
    assert level(by_ratio, 0.7312) == 0.73 and math.isnan(level(by_ratio, math.nan))
    weights = Row("separate", ((cell("separate", target=60000, tasks=("seg",)),),))
    assert level(weights, 0.9012) == 0.9
    assert level(Row("dense", ((dense_cell(),),)), math.nan) == 0


def test_records_are_found_by_id(tmp_path):
    record(cell()).write(tmp_path)
    record(cell("random")).write(tmp_path)  # of no row
    assert set(collect(grid(row()), tmp_path)) == {cell().id}


def test_a_grid_told_by_task_and_latency_ends_with_them():
    records = runs()
    for r in records.values():
        for form in r.cost.values():
            form["latency"] = {"median_ms": 4.5}
    assert "latency_ms" not in tidy(grid(row(), by_task=True), records)
    found = only(frame := tidy(grid(row(), by_task=True, by_latency=True), records))
    assert list(frame.columns[-4:]) == ["latency_ms", "delta_m/seg", "delta_m/normal", "delta_m/depth"]
    assert found["delta_m/seg"] == pytest.approx(np.mean([100 * (WORSE[s] - 1) / 2 for s in SEEDS]))
    assert found["delta_m/normal"] == found["delta_m/depth"] == 0 and found["latency_ms"] == 4.5
    assert found["delta_m"] == pytest.approx(np.mean([found[f"delta_m/{t}"] for t in TASKS]))


def test_a_row_can_be_told_run_by_run():
    records = runs()
    del records[cell(seed=SEEDS[1]).id]
    first, second, *_ = by_run(row(), grid(row()), records)
    assert first["seg/miou"] == pytest.approx(0.4 * WORSE[SEEDS[0]]) and "delta_m" in first and second == {}


def test_changes_are_those_of_every_metric_in_every_run_positive_where_better():
    records = runs()
    dense = dense_cell(SEEDS[0])
    found = changes(row(), grid(row()), records)
    assert [c["seg/miou"] for c in found] == pytest.approx([100 * (WORSE[s] - 1) for s in SEEDS])
    records[cell(seed=SEEDS[0]).id].metrics["test"]["normal/mean"] = 22.0
    assert changes(row(), grid(row()), records)[0]["normal/mean"] == pytest.approx(-10.0)
    del records[dense.id]
    assert len(changes(row(), grid(row()), records)) == len(SEEDS) - 1
    assert changes(Row("dense", ((dense,),)), grid(row()), runs())[0]["seg/miou"] == 0


def test_a_row_can_say_its_level():
    of = Row("separate", tuple((cell(seed=s),) for s in SEEDS), level=0.7)
    assert levels(grid(of), tidy(grid(of), runs())) == [0.7]


def test_a_grid_can_report_validation():
    records = runs()
    for r in records.values():
        r.metrics["val"] = {k: 2 * v for k, v in r.metrics["test"].items()}
    found = only(tidy(grid(row(), split="val"), records))
    assert found["seg/miou"] == pytest.approx(0.8 * np.mean(list(WORSE.values())))


def test_a_run_whose_tasks_have_tensors_of_their_own_counts_all_that_is_deployed():
    forms = {"dense_all_heads": made(1_000_000), "kept_heads": made(900_000), "compact": made(2_500_000)}
    assert costs(record(dense_cell(), cost=forms))["params"] == 2_500_000
    forms["compact"] = made(900_000)
    assert costs(record(dense_cell(), cost=forms))["params"] == 1_000_000
