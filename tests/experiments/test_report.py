import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from cut import drawing
from cut.records import Record
from experiments.report import write_report
from experiments.summary import against_dense, print_table, rows

TASKS = ["seg", "depth", "edge"]
DENSE = {"seg/miou": 0.5, "seg/pixel_acc": 0.8, "depth/abs": 0.2, "depth/delta1": 0.9, "edge/l1": 0.04}
BETTER = {"seg/miou": True, "seg/pixel_acc": True, "depth/abs": False, "depth/delta1": True, "edge/l1": False}
CLASSES = ("wall", "floor", "dining_table")


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
    """A hand-made record."""
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
        "machine": {
            "processor": "abacus",
            "cores": 2,
            "python": "3.11",
            "torch": "2",
            "lightning": "2",
            "timm": "1",
        },
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
    rooms = {"seg": dict.fromkeys(columns, seg), "depth": dict.fromkeys(columns, metres)}
    return [
        {"id": f"room{i}", "picture": rng.integers(0, 255, (12, 16, 3), np.uint8), "tasks": rooms} for i in range(2)
    ]


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
def text(dense, pruned, gallery, tmp_path):
    path = write_report(
        dense, pruned, gallery, tmp_path / "report.html", classes=CLASSES, files={"cut.onnx": "ONNX file"}
    )
    return path.read_text(encoding="utf-8")


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


def test_page_is_well_formed_and_asks_the_network_for_nothing(text):
    page = Page(text)
    addresses = [a[k] for _, a in page.found for k in ("src", "href", "xlink:href", "srcset", "data") if k in a]
    assert addresses and all(a.startswith("data:image/") or a == "cut.onnx" for a in addresses)
    assert not re.search(r"https?://|//cdn|@import|url\(", text)
    assert not page.all("link") and all("src" not in s for s in page.all("script"))
    assert len(text.encode()) < 4_000_000


def test_every_picture_has_words_for_it_and_is_readable(text, gallery):
    images = Page(text).all("img")
    assert len(images) == len(gallery) * (1 + 2 * 4)
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
        "median of 30 runs",
    ):
        assert words in text
    assert all(f"{name.replace('_', ' ')}</li>" in text for name in CLASSES)
    assert "Magnitude" in text and "DiSparse" not in text


def test_page_has_every_number_of_the_table(text, dense, pruned):
    for row in rows(dense, pruned):
        for value in (
            row["params"],
            row["nonzero"],
            row["bytes"],
            row["macs"],
            row["latency_ms"],
            row["delta_m"],
        ):
            assert f'data-value="{value}"' in text
        for key, value in row["metrics"].items():
            if not key.startswith("edge"):
                assert f'data-value="{value}"' in text


def test_charts_have_a_titled_bar_for_each_layer_of_the_kept_part(text):
    titles = re.findall(r"<title>([^<]*)</title>", text)
    assert sum("90.0 % cut" in t for t in titles) == 2 * 4
    assert not any("heads.edge" in t for t in titles)
    assert sum("IoU 0.75" in t for t in titles) == 1 and sum("IoU 0.25" in t for t in titles) == 2


def test_text_from_records_is_escaped(dense, pruned, tmp_path):
    pruned[0].commit = "<script>alert(1)</script>"
    text = write_report(dense, pruned, [], tmp_path / "a.html").read_text(encoding="utf-8")
    assert "<script>alert" not in text
    Page(text)


def test_page_without_gallery_overlap_or_rivals(dense, tmp_path):
    only = record("cut", TASKS, 0.9, mask_overlap={})
    text = write_report(dense, [only], [], tmp_path / "a.html").read_text(encoding="utf-8")
    assert "What it looks like" not in text and "Do the tasks want" not in text and "Results on test" in text
    Page(text)


def headline(page):
    """The figure of Delta_m at the top of the page and what is said about it."""
    return re.search(r'<b class="(?:good|bad)">([^<]+)</b><span>Δ<sub>m</sub>(.*?)</span>', page).groups()


def test_headline_is_the_plain_figure_unless_one_metric_near_zero_decides_it(dense, pruned, tmp_path):
    page = write_report(dense, pruned, [], tmp_path / "a.html").read_text(encoding="utf-8")
    assert headline(page)[0] == f"{against_dense(pruned[0], dense)['delta_m']:+.1f} %"
    assert "clipped" not in headline(page)[1]
    dense.metrics["test"]["depth/delta1"] = 1e-6
    figures = against_dense(pruned[0], dense)
    assert figures["delta_m"] > 1e4 and figures["delta_m_bounded"] < 100
    page = write_report(dense, pruned, [], tmp_path / "b.html").read_text(encoding="utf-8")
    figure, words = headline(page)
    assert figure == f"{figures['delta_m_bounded']:+.1f} %"
    assert f"clipped to ±100 % (unclipped {figures['delta_m']:+.0f} %)" in words


def test_page_says_that_the_cut_models_were_trained_longer(dense, pruned, tmp_path):
    said = "which the dense model did not get"
    assert said not in write_report(dense, pruned, [], tmp_path / "a.html").read_text(encoding="utf-8")
    dense.history = [{"epoch": i} for i in range(12)]
    for one in pruned:
        one.history = [{"epoch": i} for i in range(3)]
    page = write_report(dense, pruned, [], tmp_path / "b.html").read_text(encoding="utf-8")
    assert "The dense model had 12 epochs, each cut model 3 more" in page and said in page
    pruned[1].history = []
    assert said not in write_report(dense, pruned, [], tmp_path / "c.html").read_text(encoding="utf-8")


def test_page_tells_how_much_the_time_of_one_and_the_same_network_varies(dense, pruned, tmp_path):
    for one, milliseconds in zip(pruned, (3.98, 8.82), strict=True):
        one.cost["kept_heads"]["onnx"] = {"latency": {"median_ms": milliseconds, "p95_ms": 9.0, "runtime": "R"}}
        one.cost["compact"]["onnx"] = one.cost["kept_heads"]["onnx"]
    page = write_report(dense, pruned, [], tmp_path / "a.html").read_text(encoding="utf-8")
    assert "took 4.0 to 8.8 ms in 2 runs" in page
