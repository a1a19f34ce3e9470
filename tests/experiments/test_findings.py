"""The results page: its numbers come from records, and a slip in its template is refused."""

import pytest

from experiments import findings
from experiments.findings import Numbers, rendered
from experiments.grid import Grid, Row
from experiments.recipe import RATES
from tests.experiments.grid_records import cell, dense_cell, record

SEEDS = (1, 2)


def row(method, target, variant=None, **settings):
    return Row(method, tuple((cell(method, target, s, **settings),) for s in SEEDS), variant or {})


GRID = Grid(
    "rooms",
    "Rooms",
    (
        Row("dense", tuple((dense_cell(s),) for s in SEEDS)),
        row("cut", 0.9),
        row("cut", 0.95),
        row("snip", 0.9),
        row("disparse", 0.9, {"floor": 0.0}, **{"pruning.floor": 0.0}),
        row("disparse", 0.9, {"floor": 0.05}),
    ),
)


@pytest.fixture()
def folder(tmp_path, monkeypatch):
    """Records of the dense model, CUT at 90 % and one of the two of DiSparse."""
    monkeypatch.setattr(findings, "GRIDS", {"rooms": lambda: GRID})
    for seed, factor in zip(SEEDS, (1.03, 1.09), strict=True):
        record(dense_cell(seed)).write(tmp_path)
        achieved = {"sparsity": {"kept": 0.8991}}
        record(cell(seed=seed), {"depth/rel": factor}, **achieved).write(tmp_path)
        record(cell("disparse", seed=seed), {"depth/rel": 1.3}).write(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("call", "shown"),
    [
        ('"cut", 0.9, "delta_m"', "-2.00"),
        ('"cut", 0.9, "delta_m_std"', "1.41"),
        ('"cut", 0.9, "nonzero", digits=3, scale=1e-6', "0.080"),
        ('"cut", 0.9, "seg/miou", scale=100', "40.00"),
        ('"cut", 0.95, "delta_m"', "missing"),
        ('"snip", 0.9, "seg/miou"', "missing"),
        ('"dense", 0, "delta_m"', "0.00"),
        ('"disparse", 0.9, "delta_m", floor=0.05', "-10.00"),
        ('"disparse", 0.9, "delta_m", floor=0.0', "missing"),
        ('"cut", 0.9, "delta_m", tasks="seg+normal+depth"', "-2.00"),
    ],
)
def test_values_come_from_records(folder, call, shown):
    assert rendered(f'a {{{{ value("rooms", {call}) }}}} %\n', folder) == f"a {shown} %\n"


@pytest.mark.parametrize(
    ("call", "match"),
    [
        ('value("romos", "cut", 0.9, "delta_m")', "no grid 'romos'; there are: rooms"),
        ('value("rooms", "cat", 0.9, "delta_m")', "0 rows of 'cat' at sparsity 0.9; its methods are dense, cut"),
        ('value("rooms", "cut", 0.8, "delta_m")', "0 rows of 'cut' at sparsity 0.8"),
        ('value("rooms", "disparse", 0.9, "delta_m")', "2 rows of 'disparse'"),
        ('value("rooms", "cut", 0.9, "delta")', "no column 'delta'"),
        ('value("rooms", "cut", 0.9, "seg/iou")', "no column 'seg/iou'"),
        ('value("rooms", "cut", 0.9, "delta_m", flor=1)', "no column 'flor'"),
        ('valeu("rooms")', "template: 'valeu' is undefined"),
        ('value("rooms"', "template: "),
    ],
)
def test_slips_in_the_template_are_refused(folder, call, match):
    with pytest.raises(ValueError, match=match):
        rendered(f"{{{{ {call} }}}}", folder)


def test_metrics_are_missing_while_there_are_no_records(folder, tmp_path):
    assert rendered('{{ value("rooms", "cut", 0.9, "seg/miou") }}', tmp_path / "none") == "missing"


@pytest.mark.parametrize(
    ("call", "shown"),
    [
        # cut's rel is 1.03 and 1.09 times the dense model's, disparse's 1.3 times; one of three tasks.
        ('versus("rooms", "cut", "dense", 0.9)', "rows of 'dense'"),
        ('versus("rooms", "cut", "taylor", 0.9)', "8.00 ± 1.41"),
        ('versus("rooms", "cut", "taylor", 0.9, "depth/rel", digits=3)', "-0.048 ± 0.008"),
        ('versus("rooms", "cut", "snip", 0.9)', "missing"),
        ('changed("rooms", "cut", 0.9, "depth/rel")', "-6.00"),
        ('changed("rooms", "cut", 0.9, "seg/miou", digits=1)', "0.0"),
        ('changed("rooms", "snip", 0.9, "seg/miou")', "missing"),
        ('pruned("rooms", "cut", 0.9, "kept")', "89.9"),
        ('pruned("rooms", "cut", 0.9, "heads.seg.weight")', "70.0"),
        ('pruned("rooms", "disparse", 0.9, "kept", floor=0.05)', "90.0"),
        ('pruned("rooms", "snip", 0.9, "kept")', "missing"),
        ('most_pruned("rooms", "cut", 0.9)', "`heads.seg`, 80.00 %"),
        ('most_pruned("rooms", "snip", 0.9)', "missing"),
        ('inherited("rooms")', "from `taylor`: `fisher`"),
    ],
)
def test_causes_come_from_records(folder, monkeypatch, call, shown):
    rows = (*GRID.rows, row("taylor", 0.9), row("fisher", 0.9))
    monkeypatch.setattr(findings, "GRIDS", {"rooms": lambda: Grid("rooms", "Rooms", rows)})
    for seed, most in zip(SEEDS, (0.6, 0.8), strict=True):
        record(cell("taylor", seed=seed), {"depth/rel": 1.3}).write(folder)
        layers = {"backbone.a.weight": 0.5, "heads.seg.weight": most}
        of = cell(seed=seed)
        factor = 1.03 if seed == 1 else 1.09
        record(of, {"depth/rel": factor}, sparsity={"kept": 0.8991}, layer_sparsity=layers).write(folder)
    if shown.startswith("rows"):
        with pytest.raises(ValueError, match=shown):
            rendered(f"{{{{ {call} }}}}", folder)
    else:
        assert rendered(f"{{{{ {call} }}}}", folder) == shown


def test_choices_are_the_rates_with_the_methods_that_have_them(monkeypatch):
    low, high = RATES[0], RATES[-1]
    monkeypatch.setattr(findings, "rates", lambda: {"cut": {0.7: low, 0.9: high}, "snip": {0.9: high}})
    assert [r for r, methods in Numbers().choices(0.7).items() if methods == ["cut"]] == [low]
    assert list(Numbers().choices(0.9)) == list(RATES) and Numbers().choices(0.9)[high] == ["cut", "snip"]
    assert not any(Numbers().choices(0.5).values())


def test_tables_are_those_of_the_grid_with_their_caption(folder):
    whole = rendered('{{ table("rooms") }}', folder)
    assert "| cut |" in whole and "-2.00 ± 1.41" in whole and "95 %" in whole
    assert "Rooms: Δm % against the dense model" in whole and "Commit 0123456789." in whole
    level = rendered('{{ table("rooms", 0.9) }}', folder)
    assert "seg mIoU % ↑" in level and "Rooms: 90 % sparsity. Test set" in level


def test_the_command_line_writes_the_page_or_leaves_the_old_one(folder, tmp_path, capsys):
    template, out = tmp_path / "in.md", tmp_path / "page/results.md"
    arguments = ["--records", str(folder), "--template", str(template), "--out", str(out)]
    template.write_text('# é\n{{ value("rooms", "cut", 0.9, "delta_m") }}\n', encoding="utf-8")
    assert findings.main(arguments) == 0 and out.read_text(encoding="utf-8") == "# é\n-2.00\n"
    template.write_text("{{ nothing }}")
    assert findings.main(arguments) == 2 and "error: template" in capsys.readouterr().err
    assert out.read_text(encoding="utf-8") == "# é\n-2.00\n" and [p.name for p in out.parent.iterdir()] == [out.name]
    assert findings.main([*arguments, "--template", str(tmp_path / "none.md")]) == 2


def test_the_repositorys_template_renders(tmp_path):
    text = (findings.ROOT / "docs/results.template.md").read_text(encoding="utf-8")
    assert rendered(text, tmp_path).startswith("# Results") and "{{" not in rendered(text, tmp_path)
