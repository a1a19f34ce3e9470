"""Figures show the records' numbers; what no record can fill is left out and named."""

import math

import pandas as pd
import pytest
from PIL import Image

from experiments import figures, grids, plots
from experiments.grid import Grid, Row
from experiments.results import tidy
from tests.experiments.grid_records import by_id, cell, dense_cell, record

SEEDS = (1, 2)
LEVELS = (0.5, 0.9)
FACTORS = {"cut": 1.03, "disparse": 1.06, "random": 3.0}


def row(method, target, variant=None, seeds=SEEDS, **settings):
    return Row(method, tuple((cell(method, target, s, **settings),) for s in seeds), variant or {})


ROOMS = Grid(
    "rooms",
    "Rooms",
    (Row("dense", tuple((dense_cell(s),) for s in SEEDS)), *(row(m, t) for t in LEVELS for m in FACTORS)),
)
HISTORY = [
    {"epoch": 0, "step": 5, "train/loss": 1.0},
    {"epoch": 1, "step": 10, "test/seg/miou": 0.3, "test/edge/l1": 9.0, "test/loss": 1.0},
    {"epoch": 2, "step": 20, "test/seg/miou": 0.4},
]


def made():
    runs = [record(dense_cell(s)) for s in SEEDS]
    for method, factor in FACTORS.items():
        for target in LEVELS:
            worse = {"depth/rel": 1 + target * (factor - 1)}
            runs += [record(cell(method, target, s), worse, history=HISTORY if s == 1 else []) for s in SEEDS]
    return by_id(*runs)


def lines(axes):
    """Label to the points of a panel's curves."""
    return {c.get_label(): c[0].get_xydata() for c in axes.containers}


def test_delta_against_sparsity_marks_what_is_clipped():
    frame = tidy(ROOMS, made())
    (axes,) = plots.against(frame, "sparsity").axes
    found = lines(axes)
    assert list(found) == ["cut", "disparse", "random"]
    # x is the share of weights left; a third of the change of the one metric that changes
    assert found["cut"].tolist() == [pytest.approx([50, -0.5]), pytest.approx([10, -0.9])]
    bottom = plots.floor(frame["delta_m"].tolist())
    assert bottom > -10 and found["random"][:, 1].tolist() == [bottom, bottom]
    assert [t.get_text() for t in axes.texts] == ["-33", "-60"]
    colours = [c[0].get_color() for c in axes.containers]
    layers = plots.layers({m: [record(cell(m))] for m in FACTORS}).axes[0]
    assert colours == [x.get_color() for x in layers.lines]  # a method has one colour


def test_an_axis_without_clipping_reaches_every_value():
    frame = tidy(ROOMS, made())
    (axes,) = plots.against(frame, "sparsity", clip=False).axes
    of_random = frame.loc[frame["method"] == "random", "delta_m"]
    assert lines(axes)["random"][:, 1].tolist() == pytest.approx(sorted(of_random, reverse=True)) and not axes.texts


def test_values_of_two_clipped_curves_do_not_lie_on_each_other():
    frame = tidy(ROOMS, made())
    low = frame[frame["method"] == "random"]
    (axes,) = plots.against(pd.concat([frame, frame, low.assign(method="worse")]), "sparsity").axes
    places = [(*t.xy, *t.xyann) for t in axes.texts]
    assert len(set(places)) == len(places) >= 4
    assert len({t.get_color() for t in axes.texts}) == 2  # a value has the colour of its curve


def test_delta_against_size_is_over_millions():
    (axes,) = plots.against(tidy(ROOMS, made()), "nonzero").axes
    assert set(lines(axes)["cut"][:, 0]) == {0.08} and axes.get_xscale() == "log"
    assert axes.xaxis_inverted()


def test_each_set_of_tasks_has_a_panel_but_the_dense_model_none_of_its_own():
    of = Grid("x", "X", (*ROOMS.rows, row("cut", 0.9, tasks=["seg", "depth"])))
    records = made() | by_id(*(record(c) for (c,) in of.rows[-1].runs))
    titles = [a.get_title() for a in plots.against(tidy(of, records), "sparsity").axes]
    assert titles == ["seg, normal, depth; mobilenetv2_100", "seg, depth; mobilenetv2_100"]


def test_the_floor_keeps_what_is_near_and_drops_what_is_far():
    assert plots.floor([0, -1, -2, -3]) == -3
    assert plots.floor([0, -1, -2, -3, -60]) == -3
    assert plots.floor([-60]) == -60


def test_labels_name_the_variant_but_not_what_is_absent():
    frame = tidy(Grid("x", "X", (row("cut", 0.9, {"floor": 0.05}), row("snip", 0.9, {"steps": 5}))), {})
    assert plots.labels(frame) == ["cut (floor 0.05)", "snip (steps 5)"]


def test_layers_are_means_over_seeds_in_network_order():
    runs = [record(cell(seed=s)) for s in SEEDS]
    runs[0].layer_sparsity["backbone.b.weight"] = 0.5
    runs[0].layer_component["heads.extra.weight"] = "dropped"
    runs[0].layer_sparsity["heads.extra.weight"] = 0.1
    (axes,) = plots.layers({"cut": runs}).axes
    assert axes.lines[0].get_ydata().tolist() == pytest.approx([90, 70, 90, 90, 90])
    assert [t.get_text() for t in axes.texts] == ["backbone", "seg", "normal", "depth"]


def test_the_watershed_has_a_line_per_pair_and_one_for_all():
    runs = [record(cell(seed=s)) for s in SEEDS]
    runs[0].mask_overlap["backbone.b.weight"]["all"] = 0.6
    (axes,) = plots.watershed([*runs, record(dense_cell())]).axes
    found = {x.get_label(): x.get_ydata().tolist() for x in axes.lines}
    assert list(found) == ["seg & normal", "seg & depth", "normal & depth", "all tasks"]
    assert found["all tasks"] == pytest.approx([0.8, 0.7]) and found["seg & depth"] == [0.9, 0.9]


def test_recovery_from_a_sweep_over_steps():
    rows = [
        row("cut", 0.9, {"steps": n, "floor": f, "rate": 0.1}, (1,), **{"pruning.floor": f, "trainer.max_epochs": n})
        for f in (0.0, 0.05)
        for n in (20, 10)
    ]
    of = Grid("recovery", "Recovery", tuple(rows))
    runs = [record(r.runs[0][0], {"depth/rel": 1 + 3 / r.variant["steps"]}) for r in rows]
    points = figures.swept_recovery(of, by_id(record(dense_cell()), *runs))
    panels = plots.recovery(points).axes
    assert [a.get_title() for a in panels] == ["90 % sparsity, floor 0", "90 % sparsity, floor 0.05"]
    assert lines(panels[0])["cut, rate 0.1"].tolist() == [pytest.approx([10, -10]), pytest.approx([20, -5])]
    assert figures.swept_recovery(ROOMS, made()).empty


def test_lines_of_one_method_have_one_colour():
    points = pd.DataFrame(
        [
            {"panel": "p", "method": m, "label": f"{m}, {r}", "steps": n, "delta_m": -n, "delta_m_std": math.nan}
            for m in ("cut", "magnitude")
            for r in ("tuned", "low")
            for n in (5, 20)
        ]
    )
    (axes,) = plots.recovery(points).axes
    handles, names = axes.get_legend_handles_labels()
    assert names == ["cut, tuned", "cut, low", "magnitude, tuned", "magnitude, low"]
    lines = [h.lines[0] if hasattr(h, "lines") else h for h in handles]
    colours, dashes = [x.get_color() for x in lines], [x.get_linestyle() for x in lines]
    assert colours[0] == colours[1] != colours[2] == colours[3]
    assert dashes[0] == dashes[2] != dashes[1] == dashes[3]


def test_recovery_from_the_epochs_of_the_runs():
    points = figures.tracked_recovery(ROOMS, made())
    cut = points[points["label"] == "cut"].sort_values("steps")
    # seg/miou fell from 0.4 to 0.3; edge is not kept
    assert cut["steps"].tolist() == [10, 20] and cut["delta_m"].tolist() == pytest.approx([-25, 0])
    assert all(map(math.isnan, cut["delta_m_std"])) and set(points["panel"]) == {"90 % sparsity"}
    assert figures.tracked_recovery(ROOMS, {}).empty


def test_the_command_line_draws_what_there_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "GRIDS", {"rooms": lambda: ROOMS})
    out = tmp_path / "figures"
    assert figures.main(["--records", str(tmp_path), "--out", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(figures.FIGURES) and said[0] == "skipped sparsity: no records for it; run the grid 'rooms'"
    assert said[4].endswith("run the grid 'recovery' or 'rooms'") and not out.exists()
    for r in made().values():
        r.write(tmp_path)
    assert figures.main(["--records", str(tmp_path), "--out", str(out)]) == 0
    assert {line.split(":")[0] for line in capsys.readouterr().out.splitlines()} == {
        *(f"skipped {n}" for n in ("latency", "megabytes", "newtask", "newtask-groups", "fashion-mnist"))
    }
    names = ["layers", "recovery", "size", "sparsity", "watershed"]
    assert sorted(p.name for p in out.iterdir()) == sorted(f"{n}.{k}" for n in names for k in ("svg", "png"))
    with Image.open(out / "sparsity.png") as picture:
        assert picture.size[0] > 800 and picture.convert("RGB").getpixel((1, 1)) == (255, 255, 255)
    (tmp_path / f"{cell().id}.json").write_text("{")
    assert figures.main(["--records", str(tmp_path), "--out", str(out)]) == 2
    assert "is damaged" in capsys.readouterr().err


def test_the_same_records_give_the_same_file(tmp_path):
    for name in ("a", "b"):
        figures.save(plots.against(tidy(ROOMS, made()), "sparsity"), tmp_path / name)
    for kind in ("svg", "png"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


def test_rooms_and_recovery_are_the_grids_it_asks_for():
    asked = {g for sources in figures.FIGURES.values() for g, _ in sources}
    assert asked == {"rooms", "recovery", "edge", "newtask", "newtask-groups", "fashion-mnist"} <= set(grids.GRIDS)
    assert isinstance(grids.GRIDS, dict) and isinstance(tidy(ROOMS, {}), pd.DataFrame)
