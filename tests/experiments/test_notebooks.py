"""The notebooks: stripped in the repository, run from the first cell to the last, rendered with their pictures."""

import time
from pathlib import Path

import nbformat
import pytest

from experiments import notebooks

ROOT = Path(__file__).parents[2]
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SECONDS = 180  # of each, on two cores


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_a_notebook_is_stripped_and_begins_with_what_it_is_about(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert all(not c.outputs and c.execution_count is None for c in code)
    for cell in code:
        compile(cell.source, path.name, "exec")


def test_there_are_four():
    assert [p.name[:2] for p in PATHS] == ["1-", "2-", "3-", "4-"]


def written(folder: Path, *cells: str) -> Path:
    nodes = [nbformat.v4.new_markdown_cell("# A title"), *map(nbformat.v4.new_code_cell, cells)]
    path = folder / "small.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=nodes), path)
    return path


DRAW = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()"


def test_a_page_has_title_outputs_and_pictures(tmp_path):
    path = written(tmp_path, "from pathlib import Path\n40 + 2, Path('pyproject.toml').is_file()", DRAW)
    notebook = notebooks.execute(path)
    page = notebooks.render(notebook, path.stem, tmp_path / "docs")
    text = page.read_text()
    assert text.startswith("# A title\n") and notebooks.title(notebook) == "A title"
    assert "(42, True)" in text  # it ran in the repository's root
    (picture,) = (tmp_path / "docs/small").glob("*.png")
    assert f"](small/{picture.name})" in text and picture.read_bytes()[:4] == b"\x89PNG"
    assert not nbformat.read(path, as_version=4).cells[1].outputs  # the source stays as it was


def test_a_cell_that_fails_is_named_and_nothing_is_written(tmp_path, capsys):
    written(tmp_path, "1 / 0")
    assert notebooks.main(["--folder", str(tmp_path), "--out", str(tmp_path / "docs")]) == 1
    error = capsys.readouterr().err
    assert "small.ipynb failed" in error and "ZeroDivisionError" in error
    assert not (tmp_path / "docs").exists()


def test_an_unknown_notebook_is_refused_with_the_names_there_are(capsys):
    assert notebooks.main(["--only", "9"]) == 2
    assert "3-reading-the-tables" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_a_notebook_runs_on_the_committed_records_in_three_minutes(path, tmp_path):
    start = time.perf_counter()
    notebook = notebooks.execute(path)
    assert time.perf_counter() - start < SECONDS
    page = notebooks.render(notebook, path.stem, tmp_path)
    assert "Traceback" not in page.read_text() and str(notebooks.ROOT) not in page.read_text()
    assert not [o for c in notebook.cells for o in c.get("outputs", ()) if o.get("name") == "stderr"], "warnings"


def test_a_page_says_nothing_of_widgets_that_are_not_there(tmp_path):
    notebook = notebooks.execute(written(tmp_path, "import timm\nfrom tqdm.auto import tqdm\nprint('done')"))
    assert [o.name for c in notebook.cells for o in c.get("outputs", ())] == ["stdout"]
