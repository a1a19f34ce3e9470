"""The README keeps its promises: its code runs, its table is that of the records, its commands and files exist."""

import re
from pathlib import Path

import pytest
import torch

import cut
from cut.cli import main as cut_main
from cut.cost import size_on_disk
from cut.records import read
from experiments import papers, published
from experiments.findings import PAGES, rendered
from experiments.grids import GRIDS
from experiments.tables import readme, write
from tests.small_networks import Cnn, trained
from tests.test_reference import LOSSES, batches

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SHELL = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL))


def test_ten_lines_cut_ones_own_model(tmp_path):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    assert len([x for x in code.splitlines() if x.strip()]) <= 11
    torch.manual_seed(0)
    space = {
        "model": trained(Cnn()),
        "batches": batches(),
        "losses": LOSSES,
        "torch": torch,
        "folder": tmp_path / "small",
    }
    exec(code, space)
    small, model, image = space["small"], space["model"].eval(), batches()[0]["image"]
    assert set(small(image)) == {"seg", "depth"}
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    again = cut.load(tmp_path / "small", Cnn).eval()
    for task, out in small(image).items():
        torch.testing.assert_close(out, model(image)[task], rtol=1e-4, atol=1e-5)
        assert torch.equal(out, again(image)[task])


def test_its_tables_are_those_of_the_records():
    assert readme(README) == README


@pytest.mark.parametrize("template", PAGES, ids=lambda p: p.name)
def test_every_number_of_a_page_of_findings_is_that_of_the_records(template):
    assert rendered(template.read_text()) == PAGES[template].read_text()


@pytest.mark.parametrize("name", sorted(GRIDS))
def test_committed_tables_are_those_of_the_records(name, tmp_path):
    grid = GRIDS[name]()
    for path in write(grid, ROOT / "experiments/records" / grid.folder, tmp_path):
        assert (ROOT / "docs/tables" / path.name).read_text() == path.read_text()


@pytest.mark.parametrize("name", sorted(papers.SETS))
def test_committed_tables_of_the_published_sets_are_those_of_the_records(name, tmp_path):
    records = ROOT / "experiments/records" / papers.folder(name, True)
    for path in published.tables(name, True, True, records, tmp_path):
        assert (ROOT / "docs/tables" / path.name).read_text() == path.read_text()


@pytest.mark.parametrize(
    "target",
    sorted(set(re.findall(r"(?m)^(?:SMOKE=1 )?make ([a-z0-9-]+)", SHELL) + re.findall(r"`make ([a-z0-9-]+)", README))),
)
def test_its_make_targets_exist(target):
    makefile = (ROOT / "Makefile").read_text()
    if target.startswith("table-"):
        named = [n for kind in ("TABLES", "PAPERS") for n in re.search(rf"^{kind} := (.*)$", makefile, re.M)[1].split()]
        assert target.removeprefix("table-") in set(named) & {*GRIDS, *papers.SETS} and "table-%:" in makefile
    else:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_files_it_names_exist():
    named = set(re.findall(r"\]\(([\w/.-]+)\)", README)) | set(
        re.findall(r"`((?:cut|configs|experiments)/[\w/.]+)`", README)
    )
    assert named and all((ROOT / n).exists() for n in named), [n for n in named if not (ROOT / n).exists()]


@pytest.mark.parametrize("method", ["cut", "cut-channels"])
def test_the_committed_models_are_those_of_the_records(method, tmp_path):
    folder = ROOT / "experiments/records/demo"
    (record,) = [r for r in map(read, folder.glob("*.json")) if r.method == method]
    model = folder / "models" / method
    assert size_on_disk(model) == record.cost["compact"]["bytes"] < 4e6
    assert sum(p.numel() for p in cut.load(model).parameters()) == record.cost["compact"]["params"]
    out = tmp_path / "seen.png"
    assert cut_main(["predict", str(model), str(ROOT / "docs/images/room.jpg"), "--out", str(out)]) == 0
    assert out.is_file()
