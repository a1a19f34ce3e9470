"""The README keeps its promises: its code runs, its table is that of the records, its commands and files exist."""

import re
from pathlib import Path

import pytest
import torch

import cut
from experiments.tables import comparison, records, replaced
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


def test_its_table_is_that_of_the_records():
    assert replaced(README, "demo", comparison(*records(ROOT / "experiments/records/demo"))) == README


@pytest.mark.parametrize(
    "target", sorted(set(re.findall(r"(?m)^make ([a-z-]+)", SHELL) + re.findall(r"`make ([a-z-]+)", README)))
)
def test_its_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def test_the_files_it_names_exist():
    named = set(re.findall(r"\]\(([\w/.-]+)\)", README)) | set(
        re.findall(r"`((?:cut|configs|experiments)/[\w/.]+)`", README)
    )
    assert named and all((ROOT / n).exists() for n in named), [n for n in named if not (ROOT / n).exists()]
