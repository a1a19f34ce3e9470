"""Commands on pages that take minutes, each run once in a copy of the project; README's in the order of the page."""

import pytest

from tests.pages import ROOT, blocks, commands, copy_of_the_project, pages, run_slowly


def long_commands(path):
    """The marked commands of a page."""
    return {tuple(words) for b in blocks(path.read_text()) if b.run == "slow" for words in commands(b.code)}


README = ROOT / "README.md"
SHOWN = long_commands(README)
# What another page repeats from the README, such as make demo, runs there.
LONG = [README, *(p for p in pages() if p != README and long_commands(p) - SHOWN)]


@pytest.mark.slow
@pytest.mark.parametrize("page", LONG, ids=lambda p: p.stem)
def test_its_long_commands_run(page, tmp_path):
    assert run_slowly(page, copy_of_the_project(tmp_path)) > 0


def test_the_readme_has_long_commands():
    assert ("make", "demo") in SHOWN and len(LONG) > 1
