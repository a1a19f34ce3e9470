"""The page's data are the results' numbers; the page is one well-formed file that asks the network for nothing."""

import base64
import io
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from cut import drawing
from cut.records import Record
from experiments import plots, render
from experiments.grid import Grid, Row
from experiments.report import __main__ as command
from experiments.report import comparison, page, pictures, table
from experiments.report.table import STAYS, Source, of_grid
from experiments.results import tidy
from experiments.summary import against_dense, print_table, rows
from tests.experiments.grid_records import by_id, cell, dense_cell
from tests.experiments.grid_records import record as grid_record

TASKS = ["seg", "depth", "edge"]
DENSE = {"seg/miou": 0.5, "seg/pixel_acc": 0.8, "depth/abs": 0.2, "depth/delta1": 0.9, "edge/l1": 0.04}
BETTER = {"seg/miou": True, "seg/pixel_acc": True, "depth/abs": False, "depth/delta1": True, "edge/l1": False}
CLASSES = ("wall", "floor", "dining_table")
SOURCE = Source("Rooms", "records/here", lambda run, again: f"make {run}{' again' * again}")
SEEDS = (1, 2)
LEVELS = (0.5, 0.9)
GRID = Grid(
    "rooms",
    "A grid",
    (
        Row("dense", tuple((dense_cell(s),) for s in SEEDS)),
        *(Row(m, tuple((cell(m, x, s),) for s in SEEDS)) for x in LEVELS for m in ("magnitude", "cut", "snip")),
    ),
)


def made():
    """Records of the grid: cut loses little, magnitude more, snip has one of its seeds at 0.5 and none at 0.9."""
    found = [grid_record(dense_cell(s)) for s in SEEDS]
    for x in LEVELS:
        for s in SEEDS:
            found.append(grid_record(cell("magnitude", x, s), {"seg/miou": 1 - x / 2 - 0.01 * s}))
            found.append(grid_record(cell("cut", x, s), {"seg/miou": 1 - x / 10 - 0.01 * s}))
    return by_id(*found, grid_record(cell("snip", 0.5, 1), {"seg/miou": 0.9}))


@pytest.fixture(scope="module")
def found():
    return of_grid(GRID, made(), SOURCE)


def test_numbers_are_those_of_the_results(found):
    frame = tidy(GRID, made())
    assert len(found["rows"]) == len(frame) == len(GRID.rows)
    for row, (_, line) in zip(found["rows"], frame.iterrows(), strict=True):
        assert (row["method"], row["tasks"]) == (line["method"], line["tasks"])
        for value, expected in ((row["y"], line["delta_m"]), (row["std"], line["delta_m_std"])):
            assert value is None if math.isnan(expected) else value == pytest.approx(expected, abs=1e-6)
        for key, scale in (("params", 1e-6), ("bytes", 1e-6), ("macs", 1e-6), ("nonzero", 1e-6)):
            value = row["x"][key]
            assert value is None if math.isnan(line[key]) else value == pytest.approx(scale * line[key])
        assert row["x"][STAYS] is None or row["x"][STAYS] == pytest.approx(100 * (1 - line["sparsity"]))


def test_texts_and_bold_are_those_of_the_tables(found):
    frame = tidy(GRID, made())
    for level in (0.0, *LEVELS):
        shown = render.details(GRID, frame, level)
        mine = [r for r in found["rows"] if r["level"] == level]
        labels = {c["label"]: c["key"] for c in found["columns"]}
        for row, line in zip(mine, shown.body, strict=True):
            for head, text in zip(shown.head, line, strict=True):
                if head in ("method", "seeds"):
                    assert row["cells"][head]["t"] == text.text
                else:
                    one = row["cells"][labels[head]]
                    assert (one["t"], one.get("b", False)) == (text.text, text.bold)
    assert any(c.get("b") for r in found["rows"] for c in r["cells"].values())


def test_a_run_has_its_own_number_and_the_row_their_mean(found):
    for row in found["rows"]:
        values = [run["y"] for run in row["runs"] if run["y"] is not None]
        assert row["y"] is None if not values else row["y"] == pytest.approx(np.mean(values), abs=1e-5)
        assert len(values) == row["cells"]["seeds"]["v"]


def test_missing_runs_are_rows_too_and_say_what_makes_them(found):
    by = {(r["method"], r["level"]): r for r in found["rows"]}
    assert by["snip", 0.9]["state"] == "missing" and by["snip", 0.9]["cells"]["delta_m"]["t"] == render.MISSING
    assert by["snip", 0.5]["state"] == "some" and by["snip", 0.5]["seeds"] == "1 of 2"
    here, gone = by["snip", 0.5]["runs"]
    assert here["missing"] == [] and gone["missing"] == [cell("snip", 0.5, 2).id] and gone["records"] == []
    assert gone["commands"] == [f"make {cell('snip', 0.5, 2).id}"]
    assert here["commands"] == [f"make {cell('snip', 0.5, 1).id} again"]
    assert here["records"][0]["id"] == cell("snip", 0.5, 1).id and here["records"][0]["commit"] == "0123456789"


def test_every_row_has_a_cell_in_every_column_and_ends_as_plain_json(found):
    keys = {c["key"] for c in found["columns"]}
    assert len(keys) == len(found["columns"])
    assert all(keys <= set(r["cells"]) for r in found["rows"])
    assert json.loads(json.dumps(found, allow_nan=False)) == json.loads(page.embedded(found))


def test_axes_are_those_that_have_numbers(found):
    assert [a["key"] for a in found["axes"]] == [STAYS, "nonzero", "params", "bytes", "macs"]
    assert found["axes"][0]["names"] == ["0", "50", "90"] and found["axes"][0]["ticks"] == [100, 50, 10]
    assert found["bottom"] == pytest.approx(plots.floor([r["y"] for r in found["rows"] if r["y"] is not None]))
    assert table.axes([]) == [] and table.bottom([]) is None


def test_layers_and_overlap_are_means_over_the_runs(found):
    assert {found["rows"][e["row"]]["method"] for e in found["layers"]} == {"magnitude", "cut", "snip"}
    for entry in found["layers"]:
        network = found["networks"][entry["network"]]
        assert len(entry["values"]) == len(network["names"]) == len(network["parts"])
        level = found["rows"][entry["row"]]["level"]
        assert entry["values"] == [level] * len(entry["values"])
    shared = found["overlaps"][0]
    assert shared["values"]["all"] == [0.8] * len(shared["names"])


def test_one_label_has_one_colour_and_pruned_ones_come_first(found):
    styles = {r["label"]: r["style"] for r in found["rows"]}
    assert styles == {"magnitude": 0, "cut": 1, "snip": 2, "dense": 3}
    assert [r["mine"] for r in found["rows"]] == [r["method"] == "cut" for r in found["rows"]]


def test_recovery_is_drawn_where_runs_looked_at_test_more_than_once():
    records = made()
    for one in records.values():
        if one.start:
            one.history = [{"step": s, "test/seg/miou": 0.4 - 0.1 / s, "test/normal/mean": 20.0} for s in (1, 2)]
    panels = of_grid(GRID, records, SOURCE)["recovery"]
    assert [p["title"] for p in panels] == ["50 % sparsity", "90 % sparsity"]
    line = next(x for x in panels[1]["lines"] if x["label"] == "cut")
    assert line["steps"] == [1, 2] and line["delta_m"] == [pytest.approx(-12.5), pytest.approx(-6.25)]
    assert of_grid(GRID, made(), SOURCE)["recovery"] == []


def form(params, nonzero, size, milliseconds):
    latency = {
        "median_ms": milliseconds,
        "p95_ms": 2 * milliseconds,
        "repeats": 30,
        "threads": 1,
        "runtime": "PyTorch",
    }
    return {"params": params, "nonzero": nonzero, "bytes": size, "macs": 10 * params, "latency": latency}


def record(method, tasks, target, changes=None, **more):
    """A hand-made record of the demo."""
    layers = {
        "backbone.a.weight": "backbone",
        "backbone.b.weight": "backbone",
        **{f"heads.{t}.weight": t for t in tasks},
    }
    test = {k: v + (changes or {}).get(k, 0.0) for k, v in DENSE.items() if k.split("/")[0] in tasks}
    shared = {"seg & depth": 0.25, "all": 0.25}
    entries = {
        "method": method,
        "data": {"name": "rooms", "seed": 1, "splits": {"train": 40, "val": 5, "test": 5}},
        "backbone": "mobilenetv2_100",
        "weights_source": "random",
        "tasks": list(tasks),
        "dropped_tasks": [t for t in TASKS if t not in tasks],
        "seed": 1,
        "config": {"method": method},
        "metrics": {"val": {}, "test": test},
        "higher_is_better": {k: v for k, v in BETTER.items() if k in test},
        "budget": {"target": target, "achieved": target or 0.0},
        "sparsity": {"backbone": target or 0.0, **dict.fromkeys(tasks, target or 0.0), "kept": target or 0.0},
        "layer_sparsity": dict.fromkeys(layers, target or 0.0),
        "layer_component": layers,
        "mask_overlap": {"backbone.a.weight": shared, "backbone.b.weight": {"seg & depth": 0.75}} if target else {},
        "cost": {
            "dense_all_heads": form(1000, 990, 4000, 9.0),
            "kept_heads": form(800, 790, 3200, 7.0),
            "compact": form(600, 80, 700, 5.0) if target else form(1000, 990, 4000, 9.0),
        },
        "score_seconds": 1.5,
        "finetune_seconds": 60.0,
        "peak_memory": 10**9,
        "machine": {"processor": "abacus", "cores": 2, "python": "3.11", "torch": "2", "lightning": "2", "timm": "1"},
        "commit": "0123456789abcdef",
        "dirty": False,
        "checkpoint": method,
    }
    return Record(**(entries | more))


@pytest.fixture()
def dense():
    return record("dense", TASKS, None)


@pytest.fixture()
def pruned():
    worse = {"seg/miou": -0.05, "depth/abs": 0.02}
    return [record("cut", TASKS[:2], 0.9, worse), record("magnitude", TASKS[:2], 0.9, {"seg/miou": -0.2})]


@pytest.fixture()
def gallery():
    rng = np.random.default_rng(0)
    seg = drawing.classes(rng.integers(0, 3, (12, 16)))
    metres = drawing.depth(rng.uniform(1, 5, (12, 16)), 0.5, 6)
    columns = ("label", "dense", "cut", "magnitude")
    rooms = {
        "seg": dict.fromkeys(columns, seg),
        "depth": dict.fromkeys(columns, metres),
        "scene": dict.fromkeys(columns, "kitchen"),
    }
    return [
        {"id": f"room{i}", "picture": rng.integers(0, 255, (12, 16, 3), np.uint8), "tasks": rooms} for i in range(2)
    ]


def html(dense, pruned, gallery=(), **more):
    """The demo's page, with a stand-in for the plotting library."""
    found = page.one_comparison(dense, pruned)
    return page.render(found, pictures.gallery(gallery), library=lambda: "const Plotly = {};", **more)


class Page(HTMLParser):
    """Elements of a page, and a check that they are nested as they should be."""

    VOID = ("meta", "img", "br", "input", "link")

    def __init__(self, text):
        super().__init__()
        self.open, self.found = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag):
        return [attrs for name, attrs in self.found if name == tag]


@pytest.fixture()
def text(dense, pruned, gallery):
    return html(dense, pruned, gallery, classes=CLASSES, files={"cut.onnx": "ONNX file"})


def data(text):
    """The JSON inside a page."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def test_rows_begin_with_dense_and_hold_each_model_once(dense, pruned):
    found = rows(dense, pruned)
    assert [(r["method"], r["tasks"]) for r in found] == [
        ("dense", TASKS),
        ("dense", TASKS[:2]),
        ("cut", TASKS[:2]),
        ("magnitude", TASKS[:2]),
    ]
    assert [r["sparsity"] for r in found] == [0, 0, 0.9, 0.9]
    assert [r["params"] for r in found] == [1000, 800, 600, 600]


def test_dense_row_with_kept_heads_has_its_own_cost_and_the_dense_metrics(dense, pruned):
    row = rows(dense, pruned)[1]
    assert (row["params"], row["nonzero"], row["bytes"], row["latency_ms"]) == (800, 790, 3200, 7.0)
    assert row["metrics"] == {k: v for k, v in DENSE.items() if not k.startswith("edge")}


def test_delta_m_is_the_mean_over_tasks_of_the_mean_signed_change(dense, pruned):
    seg, metres = (-10 + 0) / 2, (-10 + 0) / 2
    assert against_dense(pruned[0], dense)["delta_m"] == pytest.approx((seg + metres) / 2, abs=1e-3)
    assert rows(dense, pruned)[2]["delta_m"] == pytest.approx(-5, abs=1e-3)
    assert rows(dense, pruned)[3]["delta_m"] == pytest.approx(-40 / 2 / 2, abs=1e-3)


def test_without_dropped_heads_there_is_one_dense_row(dense):
    assert [r["method"] for r in rows(dense, [record("cut", TASKS, 0.9)])] == ["dense", "cut"]
    assert [r["method"] for r in rows(dense, [])] == ["dense"]


def test_records_of_different_selections_are_not_mixed(dense, pruned):
    with pytest.raises(ValueError, match="other tasks"):
        rows(dense, [*pruned, record("disparse", ["seg"], 0.9)])


def test_terminal_table_holds_every_method(dense, pruned, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    print_table(rows(dense, pruned), {"seg/miou": "mIoU"})
    out = capsys.readouterr().out
    assert out.count("dense") >= 2 and "magnitude" in out and "0.9" in out


def test_the_comparison_holds_every_number_of_its_rows(dense, pruned):
    found = comparison.table(dense, pruned, SOURCE)
    for shown, row in zip(found["rows"], rows(dense, pruned), strict=True):
        cells = shown["cells"]
        assert shown["y"] == cells["delta_m"]["v"] == row["delta_m"] and cells["sparsity"]["v"] == row["sparsity"]
        for key, (_, scale, digits) in comparison.SIZES.items():
            assert cells[key] == {"v": row[key] * scale, "t": f"{row[key] * scale:.{digits}f}"}
        assert cells["seg/miou"]["v"] == pytest.approx(100 * row["metrics"]["seg/miou"])
        assert "edge/l1" not in cells
    assert found["rows"][2]["cells"]["seg/miou"]["n"] == "-10.0 %"
    assert found["rows"][2]["cells"]["depth/abs"] == {
        "v": pytest.approx(0.22),
        "t": "0.220",
        "n": "-10.0 %",
        "tone": "bad",
    }
    assert [x["key"] for x in found["axes"]][-1] == "latency_ms"


def test_page_is_well_formed_and_asks_the_network_for_nothing(text):
    found = Page(text)
    addresses = [a[k] for _, a in found.found for k in ("src", "href", "xlink:href", "srcset", "data") if k in a]
    assert addresses and all(a.startswith(("data:image/", "#")) or a == "cut.onnx" for a in addresses)
    assert not re.search(r"https?://|//cdn|@import|url\(", text)
    assert not found.all("link") and all("src" not in s for s in found.all("script"))
    policy = next(m["content"] for m in found.all("meta") if "http-equiv" in m)
    assert policy.startswith("default-src 'none'") and "http" not in policy


def test_page_has_landmarks_one_headline_and_names_for_all_controls(text):
    found = Page(text)
    assert len(found.all("h1")) == len(found.all("main")) == len(found.all("header")) == len(found.all("footer")) == 1
    ids = [a["id"] for _, a in found.found if "id" in a]
    assert len(ids) == len(set(ids))
    for _, attrs in found.found:
        for key in ("aria-labelledby", "for"):
            assert key not in attrs or attrs[key] in ids
        if attrs.get("href", "").startswith("#"):
            assert attrs["href"][1:] in ids
    assert all("aria-pressed" in b or b.get("type") == "reset" for b in found.all("button"))


def test_every_picture_has_words_for_it_and_is_readable(text, gallery):
    images = Page(text).all("img")
    assert len(images) == len(gallery) * (1 + 2 * 4) and text.count("kitchen") == len(gallery) * 4
    assert all(i["alt"] for i in images) and len({i["alt"] for i in images}) == len(images)
    for image in images:
        with Image.open(io.BytesIO(base64.b64decode(image["src"].split(",", 1)[1]))) as picture:
            assert picture.size == (16, 12)


def test_page_says_what_was_done_and_how(text):
    for words in (
        "segmentation and depth",
        "edges",
        "mobilenetv2_100",
        "40 pictures",
        "abacus",
        "0123456789",
        "of 30 runs",
        "95th percentile",
        "Δm bounded",
        "dense-longer",
    ):
        assert words in text
    assert all(f"{name.replace('_', ' ')}</li>" in text for name in CLASSES)
    assert "Magnitude" in text and "DiSparse" not in text


def test_text_from_records_is_escaped_and_cannot_end_the_script(dense, pruned):
    evil = "</script><script>alert(1)</script>"
    pruned[0].commit, pruned[0].weights_source = evil, evil
    text = html(dense, pruned)
    assert "<script>alert" not in text
    Page(text)
    assert data(text)["tables"][0]["rows"][2]["runs"][0]["records"][0]["weights"] == evil


def test_page_without_gallery_or_rivals(dense):
    text = html(dense, [record("cut", TASKS, 0.9, mask_overlap={})])
    assert "What it looks like" not in text and data(text)["tables"][0]["overlaps"] == []
    Page(text)


def test_headline_is_the_plain_figure_unless_one_metric_near_zero_decides_it(dense, pruned):
    fact = comparison.facts(dense, pruned)[1]
    assert fact["value"] == f"{against_dense(pruned[0], dense)['delta_m']:+.1f} %" and "clipped" not in fact["text"]
    dense.metrics["test"]["depth/delta1"] = 1e-6
    figures = against_dense(pruned[0], dense)
    assert figures["delta_m"] > 1e4 and figures["delta_m_bounded"] < 100
    fact = comparison.facts(dense, pruned)[1]
    assert fact["value"] == f"{figures['delta_m_bounded']:+.1f} %"
    assert f"clipped to ±100 % (unclipped {figures['delta_m']:+.0f} %)" in fact["text"]


def test_page_says_that_the_cut_models_were_trained_longer(dense, pruned):
    said = "model did not get"
    assert said not in comparison.story(dense, pruned)[0]
    dense.history = [{"epoch": i} for i in range(12)]
    for one in pruned:
        one.history = [{"epoch": i} for i in range(3)]
    told = comparison.story(dense, pruned)[0]
    assert "The dense model had 12 epochs, each cut model 3 more" in told and said in told
    pruned[1].history = []
    assert said not in comparison.story(dense, pruned)[0]


def test_page_tells_how_much_the_time_of_one_and_the_same_network_varies(dense, pruned):
    for one, milliseconds in zip(pruned, (3.98, 8.82), strict=True):
        one.cost["kept_heads"]["onnx"] = {"latency": {"median_ms": milliseconds, "p95_ms": 9.0, "runtime": "R"}}
    assert "took 4.0 to 8.8 ms in 2 runs" in comparison.timing(dense, pruned)


def test_kept_pictures_of_the_dense_model_come_back_as_they_were(gallery, tmp_path):
    pictures.keep(gallery, tmp_path)
    without = [
        {**room, "tasks": {t: {k: v for k, v in p.items() if k != "dense"} for t, p in room["tasks"].items()}}
        for room in gallery
    ]
    again = pictures.kept(without, tmp_path)
    for old, new in zip(gallery, again, strict=True):
        for task in ("seg", "depth"):
            assert list(new["tasks"][task]) == ["label", "dense", "cut", "magnitude"]
            assert np.array_equal(old["tasks"][task]["dense"], new["tasks"][task]["dense"])
        assert "dense" not in new["tasks"]["scene"]
    assert pictures.kept(without, tmp_path / "none") == without


def test_benchmark_of_committed_records_names_its_tables_and_what_is_missing():
    found = page.benchmark(command.ROOT / "experiments/records")
    assert found["tables"][0]["id"] == "rooms"
    ids = [t["id"] for t in found["tables"]]
    assert len(ids) == len(set(ids)) and "demo" in ids
    assert all(any(r["state"] != "missing" for r in t["rows"]) for t in found["tables"])
    assert found["cost"]["table"] == "demo" and found["facts"][-1]["value"].isdigit()
    json.dumps(found, allow_nan=False)


def test_a_folder_without_records_gives_a_page_that_says_so(tmp_path):
    found = page.benchmark(tmp_path)
    assert found["tables"] == [] and found["facts"] == [] and found["cost"] is None
    text = page.render(found, library=lambda: "")
    Page(text)
    assert "No records" in text


def test_command_refuses_what_is_not_there(tmp_path, capsys):
    assert command.main(["--records", str(tmp_path / "none"), "--out", str(tmp_path / "a.html")]) == 2
    assert "no folder of records" in capsys.readouterr().err and not (tmp_path / "a.html").exists()


def test_without_the_library_the_page_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(page, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"the report needs plotly: pip install -e '\.\[report\]'"):
        page.plotly_source()
