"""The drawing of the architecture is that of the code."""

import ast
from graphlib import CycleError, TopologicalSorter

import pytest

from experiments import architecture
from experiments.architecture import between, groups, imports, layers, modules, reduced

PAGE = architecture.PAGE.read_text()
GROUPS = groups(PAGE)
# Imports inside functions that look back; each needs a reason on the page.
BACK = {("cut.removal", "cut.units")}


def test_the_arrows_are_the_imports():
    drawn = {f"{g.name} -> {u}" for g in GROUPS for u in g.uses}
    imported = {f"{name} -> {u}" for name, used in between(GROUPS).items() for u in used}
    assert drawn - imported == set(), "on the page, but nothing imports it"
    assert imported - drawn == set(), "imported, but not on the page: docs/architecture.md"


def test_the_drawing_is_that_of_the_block():
    assert architecture.DRAWING.read_text() == architecture.svg(GROUPS), "python -m experiments.architecture draws it"


def test_about_a_dozen_groups_each_with_a_purpose():
    assert 10 <= len(GROUPS) <= 18 and all(g.says for g in GROUPS)


def test_imports_have_no_cycle():
    known = modules()
    list(TopologicalSorter({m: imports(p, known, deferred=False) for m, p in known.items()}).static_order())
    whole = {m: {u for u in imports(p, known) if (m, u) not in BACK} for m, p in known.items()}
    list(TopologicalSorter(whole).static_order())
    assert all(used in imports(known[module], known) for module, used in BACK), "no longer needed"


def test_the_library_never_imports_the_experiments():
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in names if n.split(".")[0] in ("experiments", "tests")], module


def test_lightning_is_imported_only_where_it_is_needed():
    for module, path in modules().items():
        tree = ast.parse(path.read_text())
        asked = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        asked |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        classes = {ast.unparse(b) for n in ast.walk(tree) if isinstance(n, ast.ClassDef) for b in n.bases}
        if {a for a in asked if a and a.startswith("lightning")} - {"lightning.pytorch.utilities"}:
            assert classes & {"Callback", "pl.LightningModule", "pl.LightningDataModule"}, module


def test_a_module_in_no_group_or_in_two_is_named():
    with pytest.raises(ValueError, match=r"'cut.fusion' is in groups \[\]"):
        between([g for g in GROUPS if g.name != "fusion"])
    with pytest.raises(ValueError, match=r"is in groups \['files', 'files'\]"):
        between([GROUPS[0], *GROUPS])
    with pytest.raises(ValueError, match="no block"):
        groups("nothing")


def test_what_type_checkers_read_does_not_count_and_functions_count_when_asked(tmp_path):
    file = tmp_path / "a.py"
    file.write_text(
        "import cut.b\nif TYPE_CHECKING:\n    import cut.c\ndef f():\n    from cut import d\n    from cut.e import x\n"
    )
    known = {f"cut.{n}": file for n in "bcde"}
    assert imports(file, known) == {"cut.b", "cut.d", "cut.e"}
    assert imports(file, known, deferred=False) == {"cut.b"}


def test_a_path_stands_for_the_arrow_that_is_left_out():
    graph = {g.name: set(g.uses) for g in GROUPS}
    small = reduced(graph)
    for name, used in graph.items():
        seen, ahead = set(), [name]
        while ahead:
            ahead += (new := small[ahead.pop()] - seen)
            seen |= new
        assert used <= seen
    order = {n: i for i, row in enumerate(layers(graph)) for n in row}
    assert all(order[u] < order[n] for n, used in graph.items() for u in used)
    with pytest.raises(CycleError):
        layers({"a": {"b"}, "b": {"a"}})
