"""What ``cut`` offers by itself is there when asked for, and reading tables waits for nothing else."""

import importlib
import subprocess
import sys
from types import ModuleType

import pytest

import cut
from cut import names
from cut.compact import compact
from cut.data import multifashion, rooms
from experiments import fashion, newtask


def test_every_name_is_there_and_is_no_module():
    assert len(set(cut.__all__)) == len(cut.__all__) and sorted(cut.__all__) == cut.__all__
    for name in cut.__all__:
        found = getattr(cut, name)
        assert found is getattr(names, name) and not isinstance(found, ModuleType)
        assert found.__name__ == name and name in dir(cut)
    assert {n for n in vars(names) if n.isidentifier() and not n.startswith("_")} == set(cut.__all__)


def test_a_module_does_not_take_the_place_of_the_function_of_its_name():
    module = importlib.import_module("cut.compact")
    assert isinstance(module, ModuleType) and cut.compact is compact is module.compact
    cut.compact = module  # what Python does after every first import of a module
    assert cut.compact is compact
    assert cut.masks is importlib.import_module("cut.masks"), "other modules are there as they always are"


def test_what_is_not_there_is_said():
    with pytest.raises(AttributeError, match="module 'cut' has no attribute 'prun'"):
        getattr(cut, "prun")  # noqa: B009
    with pytest.raises(ImportError, match="cannot import name 'prun'"):
        exec("from cut import prun")


@pytest.mark.parametrize("module", ["cut", "cut.records", "cut.weights", "experiments.tables", "experiments.sweep"])
def test_tables_are_read_without_pytorch(module):
    """Six tables and their sweeps are a dozen processes; each would wait seconds for what it does not use."""
    code = (
        f"import sys, {module}; print([m for m in ('torch', 'lightning', 'torchmetrics', 'timm') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_names_work_in_a_process_that_has_imported_nothing_else():
    code = "import cut, cut.speed; print(cut.compact.__name__, cut.prune.__name__, cut.Vote(0.5).share)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["compact", "prune", "0.5"]


def test_the_grids_call_tasks_what_their_sets_call_them():
    assert rooms.TASKS == newtask.TASKS and tuple(multifashion.TASKS) == fashion.TASKS
