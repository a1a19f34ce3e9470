"""Published: without a set there is advice, a stand-in is never called by the set's name, tables come from records."""

import pytest

from experiments import papers, published
from tests.experiments.grid_records import record


def call(*line):
    return published.main([str(a) for a in line])


@pytest.mark.parametrize("name", papers.SETS)
def test_without_the_set_there_is_advice_and_nothing_runs(name, tmp_path, capsys):
    assert call(name, "--records", tmp_path / "records", "--runs", tmp_path / "runs", "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert f"make table-{name} DATA=/path" in said and f"SMOKE=1 make table-{name}" in said
    assert f"'{papers.label(name, True)}', which is not {papers.SETS[name].name}" in said
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_set_is_refused_before_anything_runs(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    line = ("--records", tmp_path / "records", "--runs", tmp_path / "runs", "--out", tmp_path / "out")
    assert call("nyuv2", "--data", tmp_path / "data", *line) == 2
    assert str(tmp_path / "data") in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize("line", [("--workers", 0), ("--threads", -1)])
def test_bad_numbers_are_refused(line, tmp_path, capsys):
    assert call("nyuv2", "--data", tmp_path, *line) == 2
    assert "allowed: at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(("stand_in", "start"), [(False, "nyuv2"), (True, "rooms-in-nyuv2")])
def test_tables_say_what_the_pictures_are(stand_in, start, tmp_path):
    grids = {r: papers.grid("nyuv2", r, stand_in, small=True) for r in papers.RECIPES}
    paths = published.tables("nyuv2", stand_in, True, tmp_path / "none", tmp_path / "out")
    assert sorted(p.name for p in paths) == sorted(
        f"{start}-{r}-reduced.{kind}" for r in papers.RECIPES for kind in ("csv", "md", "tex")
    )
    for recipe, grid in grids.items():
        text = (tmp_path / f"out/{grid.name}.md").read_text()
        assert text.startswith(f"# {papers.label('nyuv2', stand_in)}, the ") and "Reduced run" in text
        assert ("quoted" in text) == (recipe == "paper"), "the literature's rows stand beside the published recipe"
        assert ("chosen on test" in text) == (recipe == "paper")


def test_tables_hold_the_records_numbers(tmp_path):
    grid = papers.grid("nyuv2", "modern", stand_in=True, small=True)
    for cell in grid.cells():
        found = record(cell)
        shown = {f"{split}/{k}": v for split, of in found.metrics.items() for k, v in of.items()}
        found.history = [{"epoch": 0, "val/loss": 1.0, **shown}]
        found.write(tmp_path / "records")
    published.tables("nyuv2", True, True, tmp_path / "records", tmp_path / "out")
    text = (tmp_path / f"out/{grid.name}.csv").read_text()
    assert len(text.splitlines()) == 1 + len(grid.rows)
    assert "missing" not in (tmp_path / f"out/{grid.name}.md").read_text().split("\n\n")[2]


def test_the_list_names_every_cell_once(capsys):
    assert call("cityscapes", "--small", "--list") == 0
    lines = capsys.readouterr().out.split()
    cells = {c.id for r in papers.RECIPES for c in papers.grid("cityscapes", r, True, small=True).cells()}
    assert sorted(lines) == sorted(cells)
