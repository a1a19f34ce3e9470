"""The pages keep their promises: their code runs, their links lead somewhere, their site builds."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from experiments import architecture
from tests.pages import ACTIVATE, BLOCK, PROGRAMS, ROOT, SHELL, blocks, commands, pages, run_page
from tests.small_networks import Cnn, trained
from tests.test_reference import LOSSES, batches

# Why a block may not be run, and how many blocks may say so.
REASONS = {
    "needs a data set on disk": 2,
    "needs a GPU or a cluster": 3,
    "needs the demo's model": 2,
    "takes hours": 4,
    "needs a key and a network": 2,
    "shows a form": 4,
}
# Figures that pages have room for and whose runs are not made yet.
FIGURES = {"docs/figures/latency.png", "docs/figures/megabytes.png"}
CREDITS = {"docs/ATTRIBUTION-ROOMS.md"}  # ships with every set that is rendered; it names the program that wrote it
PLAIN = {"", "text", "groups", "json"}  # languages of what is shown and no program
NAMES = [p.relative_to(ROOT).as_posix() for p in pages()]
TEXTS = {name: (ROOT / name).read_text() for name in NAMES}


def having(*runs: str) -> list[str]:
    """Pages with blocks that are run in one of these ways."""
    return [n for n, text in TEXTS.items() if any(b.runs and b.run in runs for b in blocks(text))]


def test_every_block_is_run_or_says_why_not():
    reasons = Counter()
    for name, text in TEXTS.items():
        assert len(re.findall(r"(?m)^```", text)) == 2 * len(BLOCK.findall(text)), (
            f"{name} has a block that is not read"
        )
        for block in blocks(text):
            if block.run.startswith("no, "):
                reasons[block.run.removeprefix("no, ")] += 1
            else:
                assert block.run in ("", "slow", "with model"), f"{name}: run: {block.run}"
            assert block.runs or block.file or block.language in PLAIN, (
                f"{name}: {block.language} is neither run nor a file"
            )
    assert set(reasons) <= set(REASONS)
    assert all(count <= REASONS[reason] for reason, count in reasons.items()), dict(reasons)


def program(words):
    """What a line calls, without the variables that are set for it."""
    return next((w for w in words if not re.match(r"\w+=", w)), "")


@pytest.mark.parametrize("name", NAMES)
def test_the_environment_is_switched_on_before_a_command_is_called_by_its_bare_name(name):
    """In blocks before the first of them, also in those that are not run; for commands within the text anywhere."""
    active = False
    for block in blocks(TEXTS[name]):
        shown = block.code if block.language in SHELL and not block.file else ""
        for words in commands(shown):
            active = active or words == ACTIVATE
            assert active or program(words) not in PROGRAMS, f"{words}: {' '.join(ACTIVATE)} comes first"
        # Commands are shown as such, so that they are seen here: in a block without a language they are not run.
        assert block.language or not re.search(rf"(?m)^({'|'.join(PROGRAMS)}) ", block.code), block.code
    inline = re.findall(rf"`((?:{'|'.join(PROGRAMS)}) [^`]+)`", BLOCK.sub("", TEXTS[name]))
    assert not inline or name in CREDITS or " ".join(ACTIVATE) in TEXTS[name], inline


@pytest.mark.parametrize("name", NAMES)
def test_no_page_installs_the_package_of_another_of_the_same_name(name):
    """``cut`` of the package index is not this project."""
    assert not re.search(r"pip install ['\"]?cut\b", TEXTS[name])


@pytest.mark.parametrize("name", [n for n in NAMES if any(b.file for b in blocks(TEXTS[n]))])
def test_every_file_on_a_page_is_used_on_it(name):
    shown = blocks(TEXTS[name])
    used = {word for b in shown if b.runs for words in commands(b.code) for word in words} if shown else set()
    for block in shown:
        stem = block.file.removesuffix(".py")
        assert not block.file or any(w in (block.file, stem) or w.startswith((f"{stem}.", f"{stem}:")) for w in used)


@pytest.mark.parametrize("kind", ["dataset", "task", "backbone", "score", "fusion", "schedule", "table"])
def test_every_page_on_adding_something_has_one_complete_file(kind):
    files = [b for b in blocks(TEXTS[f"docs/extend/{kind}.md"]) if b.file.endswith(".py")]
    assert len(files) == 1 and '__name__ == "__main__"' in files[0].code


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """A folder of one's own to work in, as a user has it; what is imported from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("name", having("", "with model"))
def test_its_code_runs(name, empty):
    torch.manual_seed(0)
    model = {"model": trained(Cnn()), "batches": batches(), "losses": LOSSES, "torch": torch, "folder": empty / "small"}
    assert run_page(ROOT / name, empty, model) > 0


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings."""
    heads = re.findall(r"(?m)^#+ (.*)$", BLOCK.sub("", text))
    plain = [re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", h)).strip().lower() for h in heads]
    return {re.sub(r"[ ]+", "-", h) for h in plain}


@pytest.mark.parametrize("name", NAMES)
def test_its_links_lead_somewhere(name):
    text = BLOCK.sub("", TEXTS[name])
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        if path.parent.name == "reference":
            assert path.stem in architecture.modules(), f"{target}: no such module"
            continue
        inside = Path(path.resolve()).relative_to(ROOT).as_posix()
        assert path.exists() or inside in FIGURES, target
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path.read_text()), f"{target}: no such heading"


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_asks_no_other_host(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", "docs/mkdocs/mkdocs.yml", "-d", str(tmp_path)]
    # As in make docs: the theme's announcement of its end of life is no warning about our pages.
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    for module in architecture.modules():
        if not module.rpartition(".")[2].startswith("_"):
            assert f'id="{module}' in (tmp_path / f"reference/{module}.html").read_text(), module
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]*src=\"([^\"]+)\"", page.read_text())
        loaded += re.findall(
            r"<link[^>]*rel=\"(?:stylesheet|preconnect|preload)\"[^>]*href=\"([^\"]+)\"", page.read_text()
        )
        assert not [x for x in loaded if x.startswith(("http", "//"))], page
    for sheet in tmp_path.rglob("*.css"):
        assert not re.findall(r"url\([\"']?(?:https?:)?//", sheet.read_text()), sheet
