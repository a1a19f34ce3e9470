"""A grid's frame as Markdown, CSV and LaTeX; the command line of the tables."""

import math

import pandas as pd
import pytest

from experiments import grids, render, tables
from experiments.cell import Cell
from experiments.grid import Grid, Row
from experiments.render import Column, best, caption, details, number, overview
from experiments.results import tidy
from experiments.typeset import Table, Text, escaped, latex, markdown
from tests.experiments.grid_records import by_id, cell, dense_cell, record

SEEDS = (1, 2)
KEPT = "Tasks seg+normal+depth (dense also seg+normal+depth+edge). "


def row(method, target, variant=None):
    return Row(method, tuple((cell(method, target, s),) for s in SEEDS), variant or {})


DENSE = Row("dense", tuple((dense_cell(s),) for s in SEEDS))
GRID = Grid("rooms", "Rooms", (DENSE, row("cut", 0.5), row("disparse", 0.5), row("cut", 0.9), row("disparse", 0.9)))


def made(changes):
    """Records of the dense model and of (method, target) to the factor on depth/rel per seed."""
    runs = [record(dense_cell(s)) for s in SEEDS]
    for (method, target), factors in changes.items():
        runs += [record(cell(method, target, s), {"depth/rel": f}) for s, f in zip(SEEDS, factors, strict=True) if f]
    return by_id(*runs)


# Of three tasks one changes, by 3 and 9, 12 and 18, ... percent.
CHANGES = {("cut", 0.5): (1.03, 1.09), ("disparse", 0.5): (1.12, 1.18), ("cut", 0.9): (1.03, 1.09)}


def free(level=0.9, seed=1):
    """A row of a rule that has no target, under a level of the table."""
    budget = {"class_path": "cut.budget.KeepRatio", "init_args": {"ratio": 0.1}}
    options = {"pruning.tasks": ["seg", "normal", "depth"], "pruning.budget": budget, "seed_everything": seed}
    of = Cell(("data/rooms", "model/mobilenetv2", "pruning/cut-reference"), options, dense_cell(seed))
    return Row("cut-reference", ((of,),), level=level)


def test_a_rule_whose_sparsity_is_what_comes_out_says_what_came_out():
    of = Grid("rooms", "Rooms", (DENSE, row("cut", 0.9), free()))
    (cell_of,) = of.rows[-1].runs[0]
    runs = made({("cut", 0.9): (1.03, 1.09)}) | by_id(record(cell_of, {"depth/rel": 1.3}, sparsity={"kept": 0.9077}))
    lines = {r[0].text: [c.text for c in r[1:]] for r in overview(of, tidy(of, runs)).body}
    assert lines["cut-reference"] == ["-", "-10.00 (at 90.8 %)"]
    assert lines["cut"] == ["-", "-2.00 ± 1.41"] and "at" not in lines["dense"][0]
    missing = overview(of, tidy(of, {})).body[-1]
    assert [c.text for c in missing] == ["cut-reference", "-", "missing"]


@pytest.mark.parametrize(
    ("means", "stds", "higher", "found"),
    [
        ([1.0, 3.0], [0.9, 1.0], True, 1),
        ([1.0, 3.0], [1.0, 1.0], True, None),  # they touch
        ([1.0, 3.0], [0.9, 1.0], False, 0),
        ([1.0, 3.0, 2.9], [0.1, 0.1, 0.1], True, None),
        ([1.0, 3.0], [0.1, math.nan], True, None),  # one seed
        ([math.nan, 3.0, 1.0], [math.nan, 0.1, 0.1], True, 1),
        ([3.0], [0.1], True, None),
        ([], [], True, None),
    ],
)
def test_best_is_what_no_spread_reaches(means, stds, higher, found):
    assert best(means, stds, higher) == found


def test_the_overview_has_a_row_per_method_and_a_column_per_level():
    records = made(CHANGES)
    table = overview(GRID, tidy(GRID, records))
    assert table.head == ["method", "dense", "50 %", "90 %"]
    lines = {r[0].text: [c.text for c in r[1:]] for r in table.body}
    # -1 and -3: mean -2, sample deviation sqrt(2)
    assert lines["cut"] == ["-", "-2.00 ± 1.41", "-2.00 ± 1.41"]
    assert lines["disparse"] == ["-", "-5.00 ± 1.41", "missing"]
    assert lines["dense"] == ["0.00 ± 0.00", "-", "-"]
    bold = {(r[0].text, i) for r in table.body for i, c in enumerate(r) if c.bold}
    assert bold == {("cut", 2)}  # 2.83 together is less than 3; alone at 90 % nothing is best


def test_overlapping_spreads_and_single_seeds_are_not_bold():
    near = made(CHANGES | {("disparse", 0.5): (1.09, 1.15)})
    one = made({k: (v[0], None) for k, v in CHANGES.items()})
    for records in (near, one):
        assert not any(c.bold for r in overview(GRID, tidy(GRID, records)).body for c in r)
    table = overview(GRID, tidy(GRID, one))
    assert [r[2].text for r in table.body if r[0].text == "cut"] == ["-1.00 (1 of 2 seeds)"]


def test_variants_are_columns_and_equal_rows_are_all_shown():
    of = Grid(
        "x", "X", (row("cut", 0.9, {"floor": 0.05}), row("cut", 0.9, {"steps": 5}), row("cut", 0.9, {"steps": 5}))
    )
    table = overview(of, tidy(of, {}))
    assert table.head == ["method", "floor", "steps", "90 %"]
    assert [[c.text for c in r] for r in table.body] == [
        ["cut", "0.05", "", "missing"],
        ["cut", "", "5", "missing"],
        ["cut", "", "5", "missing"],
    ]


def test_a_variant_can_be_the_columns_and_the_best_is_marked_within_one_sparsity():
    rows = [
        Row(
            m,
            tuple((cell(m, s, seed, **{"trainer.max_epochs": n, "pruning.batches": b}),) for seed in SEEDS),
            {"rate": rate, "steps": n},
        )
        for s in (0.5, 0.9)
        for m in ("cut", "disparse")
        for b, rate in enumerate(("tuned", "low"), 1)
        for n in (20, 5)
    ]
    of = Grid("x", "X", tuple(rows), across="steps")
    changes = {("cut", 0.5): 0.02, ("disparse", 0.5): 0.05, ("cut", 0.9): 0.1, ("disparse", 0.9): 0.2}
    runs = [
        record(c, {"depth/rel": 1 + changes[c.method, c.target] * 3 * (1 + 0.01 * c.seed)})
        for r in rows
        for (c,) in r.runs
        if r.variant["rate"] == "tuned"
    ]
    table = overview(of, tidy(of, by_id(*(record(dense_cell(s)) for s in (1, 2)), *runs)))
    assert table.head == ["method", "sparsity", "rate", "5 steps", "20 steps"]
    lines = {tuple(c.text for c in r[:3]): r[3:] for r in table.body}
    assert len(lines) == 8 and all(c.text == "missing" for k, r in lines.items() if k[2] == "low" for c in r)
    for (method, sparsity, _), found in lines.items():
        change = -100 * changes[method, float(sparsity.rstrip(" %")) / 100]
        for text in found:
            assert text.text == "missing" or float(text.text.split()[0]) == pytest.approx(1.015 * change, abs=0.006)
            assert text.bold == (method == "cut" and text.text != "missing")


def test_tasks_are_a_column_where_pruned_models_differ_in_them():
    two = Row("cut", ((cell(tasks=["seg", "depth"]),),))
    table = overview(of := Grid("x", "X", (*GRID.rows, two)), tidy(of, {}))
    assert table.head[:2] == ["method", "tasks"] and [r[1].text for r in table.body][-1] == "seg+depth"


def test_details_show_scaled_metrics_and_sizes_of_one_level():
    frame = tidy(GRID, made(CHANGES))
    table = details(GRID, frame, 0.9)
    shown = [dict(zip(table.head, (c.text for c in r), strict=True)) for r in table.body]
    assert [s["method"] for s in shown] == ["cut", "disparse"]
    assert shown[0]["seg mIoU % ↑"] == "40.00 ± 0.00" and shown[0]["normals mean ° ↓"] == "20.00 ± 0.00"
    assert shown[0]["depth rel. error ↓"] == "0.2120 ± 0.0085" and shown[0]["seeds"] == "2"
    assert (shown[0]["params M"], shown[0]["non-zero M"]) == ("0.60", "0.080")
    assert (shown[0]["MMACs"], shown[0]["MB"]) == ("6.0", "0.32")
    assert shown[1]["Δm %"] == shown[1]["params M"] == "missing" and shown[1]["seeds"] == "0 of 2"
    assert "edge L1 ↓" not in shown[0] and "Δm vs longer %" not in shown[0]
    assert "edge L1 ↓" in details(GRID, frame, 0).head
    with pytest.raises(ValueError, match=r"no row of sparsity 0.7; it has \[0.0, 0.5, 0.9\]"):
        details(GRID, frame, 0.7)


def test_lower_is_better_where_it_is():
    frame = pd.DataFrame({"tasks": ["seg"] * 2, "backbone": ["x"] * 2, "seg/e": [1.0, 2.0], "seg/e_std": [0.1, 0.1]})
    for higher, expected in ((False, 0), (True, 1), (None, None)):
        shown = render._shown(frame, [0, 1], Column("seg/e", "e", higher=higher))
        assert [i for i, t in shown.items() if t.bold] == ([] if expected is None else [expected])


def test_the_caption_says_how_the_numbers_came_about():
    records = made(CHANGES)
    records[cell("cut", 0.9).id].dirty = True
    said = caption(GRID, records)
    assert said.startswith(
        f"Test set, last epoch; 2 seeds per row. {KEPT}2 of 10 runs missing. Commits 0123456789, 0123456789+."
    )
    legacy = Grid("x", "X", (DENSE,), selection="best_test", note="A note.")
    assert "legacy protocol: chosen on test" in caption(legacy, {}) and caption(legacy, {}).endswith("A note.")
    assert "lowest validation loss" in caption(Grid("x", "X", (), selection="best_val"), {})


def test_markdown_and_latex_escape_what_they_must():
    table = Table("50 % & more", ["a_b", "Δm %"], [[Text("x|y~^\\{}$#"), Text("-1.00 ± 0.20", True)]], 1)
    assert markdown(table) == "| a_b | Δm % |\n| --- | ---: |\n| x\\|y~^\\{}$# | **-1.00 ± 0.20** |\n"
    text = latex(table, "from a_b")
    assert r"\caption{50 \% \& more. from a\_b}" in text and r"\begin{tabular}{lr}" in text
    assert r"a\_b & $\Delta$m \% \\" in text and r"\textbf{$-$1.00 $\pm$ 0.20} \\" in text
    assert r"x|y\textasciitilde{}\textasciicircum{}\textbackslash{}\{\}\$\#" in text
    assert all(rule in text for rule in (r"\toprule", r"\midrule", r"\bottomrule"))
    assert escaped("dense-longer 1-2") == "dense-longer 1-2"


def test_numbers():
    assert [number(x) for x in (-0.001, 0.0, -1.005, math.nan)] == ["0.00", "0.00", f"{-1.005:.2f}", "missing"]


def write_all(folder, records):
    for r in records.values():
        r.write(folder)


def test_three_files_are_written_and_csv_is_the_frame(tmp_path):
    records = made(CHANGES)
    write_all(tmp_path / "records", records)
    paths = render.write(GRID, tmp_path / "records", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["rooms.csv", "rooms.md", "rooms.tex"]
    page, csv, tex = (p.read_text() for p in paths)
    assert page.count("| method |") == 4 and "## 90 % sparsity" in page and page.endswith("|\n")
    frame = tidy(GRID, records)
    read = pd.read_csv(paths[1])
    pd.testing.assert_frame_equal(read, frame.round(6), check_dtype=False)
    assert csv.splitlines()[0].startswith("method,sparsity,tasks,backbone,seeds,delta_m,delta_m_std")
    assert tex.count(r"\begin{table}") == 4 and "**" not in tex and "±" not in tex


def test_a_table_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    (tmp_path / "rooms.md").write_text("old")

    def refuse(*args):
        raise OSError("full")

    monkeypatch.setattr("cut.files.os.replace", refuse)
    with pytest.raises(OSError, match="full"):
        render.write(GRID, tmp_path, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["rooms.md"] and (tmp_path / "rooms.md").read_text() == "old"


def test_the_command_line_renders_one_grid(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(grids.GRIDS, "mine", lambda: GRID)
    write_all(tmp_path, made(CHANGES))
    assert tables.main(["--grid", "mine", "--records", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert "-2.00 ± 1.41" in (tmp_path / "out/rooms.md").read_text()
    assert tables.main(["--grid", "other"]) == 2
    assert "no grid 'other'; there are: " in (said := capsys.readouterr().err) and "mine" in said
    (tmp_path / f"{cell().id}.json").write_text("{")
    assert tables.main(["--grid", "mine", "--records", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
