"""Commands on pages that take minutes, each run once in a copy of the project; README's in the order of the page."""

import subprocess
import sys

import pytest

from tests.pages import ACTIVATE, ROOT, blocks, commands, copy_of_the_project, pages, run_slowly


def long_commands(path):
    """The marked commands of a page."""
    marked = [words for b in blocks(path.read_text()) if b.run == "slow" for words in commands(b.code)]
    return {tuple(words) for words in marked if words != ACTIVATE}


README = ROOT / "README.md"
SHOWN = long_commands(README)
# What another page repeats from the README, such as make demo, runs there.
LONG = [README, *(p for p in pages() if p != README and long_commands(p) - SHOWN)]


@pytest.mark.slow
@pytest.mark.parametrize("page", LONG, ids=lambda p: p.stem)
def test_its_long_commands_run(page, tmp_path):
    assert run_slowly(page, copy_of_the_project(tmp_path)) > 0


def test_a_page_runs_in_one_shell_that_nothing_has_prepared(tmp_path, monkeypatch):
    """Also where the tests themselves run with the environment switched on."""
    monkeypatch.setenv("PATH", f"{sys.prefix}/bin", prepend=":")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "cut").symlink_to(ROOT / "cut")
    command = "```sh\ncut --print-completion bash > completion\n```\n"
    page = tmp_path / "page.md"
    page.write_text(command)
    with pytest.raises(subprocess.CalledProcessError):
        run_slowly(page, tmp_path)
    page.write_text("```sh\n. .venv/bin/activate\n```\nand then\n\n<!-- run: slow -->\n" + command)
    assert run_slowly(page, tmp_path) == 1
    assert "prune" in (tmp_path / "completion").read_text()


def test_the_readme_has_long_commands():
    assert ("make", "demo") in SHOWN and len(LONG) > 1
