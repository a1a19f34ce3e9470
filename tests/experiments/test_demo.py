"""The demo end to end, small: files, re-use, other tasks, refusals. The real one is ``make demo``."""

import json

import numpy as np
import pytest
from PIL import Image

from cut.cli import main as cut_main
from experiments import demo, summary, timing
from experiments.tables import comparison, replaced
from tests.experiments.test_report import Page
from tests.experiments.test_run import TINY


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--tasks", "seg", "flow"], "unknown task 'flow'"),
        (["--tasks", "seg", "seg"], "twice"),
        (["--sparsity", "1"], "sparsity 1.0"),
        (["--sparsity", "-0.2"], "sparsity -0.2"),
    ],
)
def test_bad_choices_are_refused_before_training(line, message, tmp_path, capsys):
    assert demo.main([*line, "--out", str(tmp_path / "demo")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_an_unwritable_folder_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert demo.main(["--out", str(tmp_path / "file" / "demo")]) == 2
    assert "file" in capsys.readouterr().err


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A demo of a tiny network; long enough that no metric of the dense one is zero."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    common = demo._common
    small = [f"--model.init_args.network={json.dumps(TINY)}"]
    patch = pytest.MonkeyPatch()
    patch.setattr(demo, "_common", lambda *a: [*common(*a), *small])
    patch.setattr(demo, "GALLERY", 2)
    patch.setattr(timing, "ROUNDS", 3)
    line = ["--out", str(folder), "--epochs", "3", "--recover", "1", "--tasks", "seg", "normal", "depth"]
    assert demo.main(line) == 0
    first = {p: p.stat().st_mtime_ns for p in folder.rglob("*.ckpt")}
    assert demo.main(line) == 0
    assert first == {p: p.stat().st_mtime_ns for p in folder.rglob("*.ckpt")}, "what is done is not done again"
    yield folder
    patch.undo()


@pytest.mark.slow
def test_the_demo_delivers(out, tmp_path, capsys):
    rows = json.loads((out / "summary.json").read_text())
    assert [r["method"] for r in rows] == ["dense", "dense", "cut", "cut-channels", "magnitude", "disparse"]
    channels = next(r for r in rows if r["method"] == "cut-channels")
    assert channels["macs"] <= 0.5 * rows[1]["macs"] and channels["kind"] == summary.CHANNELS
    assert channels["params"] == channels["nonzero"] < rows[1]["params"]
    for row in rows[2:]:
        if row is not channels:
            assert row["kind"] == summary.WEIGHTS
            assert row["sparsity"] == pytest.approx(0.9, abs=5e-4)
        assert {k.split("/")[0] for k in row["metrics"]} == {"seg", "normal", "depth"}
    page = (out / "report.html").read_text()
    found = [a.get("src") or a.get("href") or "" for _, a in Page(page).found]
    assert "data:image" in page and not any(a.startswith("http") for a in found)
    assert len(list((out / "pictures").glob("*.png"))) == 2 * 3, "the dense model's, to be shown without its weights"
    Image.fromarray(np.full((50, 70, 3), 128, np.uint8)).save(tmp_path / "p.png")
    for model in ("cut.onnx", "cut-channels.onnx", "compact"):
        assert cut_main(["predict", str(out / model), str(tmp_path / "p.png"), "--out", str(tmp_path / "o.png")]) == 0
        assert Image.open(tmp_path / "o.png").width > 300
    assert "seg" in capsys.readouterr().out


@pytest.mark.slow
def test_its_records_make_a_table(out):
    from cut.records import read

    found = {r.method: r for r in map(read, (out / "records").glob("*.json"))}
    table = comparison(found["dense"], [found["cut"], found["magnitude"]])
    assert table.count("| `cut` |") == 1 and "dense, 3 heads" in table
    page = "a\n<!-- table:demo -->\nold\n<!-- end -->\nb"
    assert "old" not in replaced(page, "demo", table)
    with pytest.raises(ValueError, match="no part"):
        replaced("nothing", "demo", table)
