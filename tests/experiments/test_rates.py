"""Rates: the highest validation Delta_m decides, and nothing is chosen from half the runs."""

from dataclasses import replace

import pytest
import yaml

from cut.records import read
from experiments import rates
from experiments.grid import Grid, Row
from tests.experiments.grid_records import METRICS, by_id, cell, dense_cell, record

ERROR = "depth/rel"  # smaller is better
AT = cell("cut").target
LR = "model.init_args.optimizer.init_args.lr"


def of_rate(method, rate):
    return cell(method, **{LR: rate})


def grid(methods=("cut", "magnitude"), values=(1e-3, 3e-3, 1e-2)):
    rows = [Row(m, ((of_rate(m, r),),), {"rate": r}) for m in methods for r in values]
    return Grid("rates", "Rates", tuple(rows))


def judged(of, factor=1.0, test=1.0):
    """A record whose depth error is ``factor`` times the dense model's on validation, ``test`` times on test."""
    metrics = {
        split: {k: v * (f if k == ERROR else 1) for k, v in METRICS.items() if k.split("/")[0] in of.tasks}
        for split, f in (("val", factor), ("test", test))
    }
    return replace(record(of), metrics=metrics)


def everything(factors):
    """Records of the dense cell and of (method, rate) to factor."""
    found = [judged(of_rate(m, r), f, test) for (m, r), (f, test) in factors.items()]
    return by_id(judged(dense_cell()), *found)


FACTORS = {
    ("cut", 1e-3): (1.3, 0.1),  # the best on test, which does not count
    ("cut", 3e-3): (0.9, 5.0),
    ("cut", 1e-2): (1.1, 0.5),
    ("magnitude", 1e-3): (1.2, 1.0),
    ("magnitude", 3e-3): (1.5, 1.0),
    ("magnitude", 1e-2): (1.4, 1.0),
}


def test_the_highest_delta_m_on_validation_is_chosen():
    assert rates.choose(grid(), everything(FACTORS)) == {"cut": {AT: 3e-3}, "magnitude": {AT: 1e-3}}


def test_delta_m_is_over_the_kept_tasks_only():
    part = judged(cell(tasks=("depth",)), 0.8)
    assert rates.on_validation(part, judged(dense_cell())) == pytest.approx(20)
    assert "edge/l1" in judged(dense_cell()).metrics["val"] and "edge/l1" not in part.metrics["val"]


def test_every_sparsity_has_a_choice_of_its_own():
    other = {("cut", r): f for r, f in ((1e-3, 1.0), (3e-3, 1.2), (1e-2, 1.1))}
    budget = "pruning.budget.init_args.target"
    more = {r: cell("cut", **{LR: r, budget: 0.37}) for _, r in other}
    whole = Grid(
        "rates", "Rates", grid(("cut",)).rows + tuple(Row("cut", ((c,),), {"rate": r}) for r, c in more.items())
    )
    records = everything(FACTORS) | by_id(*(judged(more[r], f) for (_, r), f in other.items()))
    assert rates.choose(whole, records) == {"cut": {AT: 3e-3, 0.37: 1e-3}}


@pytest.mark.parametrize("gone", [("cut", 1e-3), ("cut", 3e-3)])
def test_a_method_with_a_missing_run_is_left_out(gone):
    some = {k: v for k, v in FACTORS.items() if k != gone}
    assert rates.choose(grid(), everything(some)) == {"magnitude": {AT: 1e-3}}


def test_without_the_dense_record_nothing_is_chosen():
    records = {i: r for i, r in everything(FACTORS).items() if r.tasks != judged(dense_cell()).tasks}
    assert dense_cell().id not in records
    assert rates.choose(grid(), records) == {}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of records, and a rates file that has a method of its own already."""
    monkeypatch.setitem(rates.GRIDS, "rates", grid)
    monkeypatch.setattr(rates, "rates", lambda: {"other": {0.9: 0.5}, "cut": {0.1: 0.4, AT: 0.7}})
    for r in everything(FACTORS).values():
        r.write(tmp_path / "records")
    return tmp_path


def call(folder):
    return rates.main(["--records", str(folder / "records"), "--out", str(folder / "rates.yaml")])


def test_main_writes_the_choices_and_keeps_the_rest(folder, capsys):
    assert call(folder) == 0
    text = (folder / "rates.yaml").read_text()
    assert text.startswith("# ")
    assert yaml.safe_load(text) == {
        "cut": {0.1: 0.4, AT: 3e-3},
        "magnitude": {AT: 1e-3},
        "other": {0.9: 0.5},
    }
    assert len(capsys.readouterr().out.splitlines()) == len(FACTORS)
    assert not list(folder.glob("*.part"))


def test_main_keeps_the_rate_of_a_method_whose_runs_are_not_all_there(folder):
    (folder / "records" / f"{of_rate('cut', 1e-2).id}.json").unlink()
    assert call(folder) == 0
    assert yaml.safe_load((folder / "rates.yaml").read_text()) == {
        "cut": {0.1: 0.4, AT: 0.7},
        "magnitude": {AT: 1e-3},
        "other": {0.9: 0.5},
    }


def test_a_failed_write_leaves_the_old_file(folder, monkeypatch, capsys):
    (folder / "rates.yaml").write_text("cut: 0.25\n")

    def broken(*_):
        raise OSError("no space left")

    monkeypatch.setattr("cut.files.os.replace", broken)
    assert call(folder) == 2
    assert "no space left" in capsys.readouterr().err
    assert (folder / "rates.yaml").read_text() == "cut: 0.25\n" and not list(folder.glob("*.part"))


def test_a_damaged_record_is_named(folder, capsys):
    path = folder / "records" / f"{of_rate('cut', 1e-2).id}.json"
    path.write_text(path.read_text()[:-20])
    assert call(folder) == 2
    assert f"{path} is damaged" in capsys.readouterr().err
    assert not (folder / "rates.yaml").exists()


def test_records_that_cannot_be_compared_are_refused(folder, capsys):
    name = of_rate("cut", 1e-2).id
    odd = read(folder / "records" / f"{name}.json")
    odd.metrics["val"].pop(ERROR)
    odd.write(folder / "records")
    assert call(folder) == 2
    assert ERROR in capsys.readouterr().err
    assert not (folder / "rates.yaml").exists()
