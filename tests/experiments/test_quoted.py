"""Quoted tables: their numbers, our units, Delta_m computed a second way."""

import csv
import re
from pathlib import Path

import pandas as pd
import pytest

from cut.tasks import FAMILIES
from experiments import quoted

# Delta_m in percent in the order of the rows, computed by hand from the printed tables before this code was written.
EXPECTED = {
    "nyuv2": (0, -4.67, -4.20, -22.68, -0.69, -5.09, 1.52, 2.88, -22.94, 3.24),
    "cityscapes": (0, -5.78, -4.09, -13.45, -3.17, -6.34, -4.07, -6.53, -33.64, -3.06),
    "taskonomy": (0, -7.66, -7.86, -8.16, -4.48, -7.26, -2.18, -2.12, -289.9, 1.22),
}
METHODS = (
    ("-", "dense"),
    ("init", "LTH"),
    ("init", "SNIP"),
    ("init", "Random"),
    ("init", "DiSparse static"),
    ("dynamic", "RigL"),
    ("dynamic", "DiSparse dynamic"),
    ("trained", "IMP"),
    ("trained", "Random"),
    ("trained", "DiSparse pt"),
)
LOWER = {"error", "mean", "median", "abs", "rel", "l1"}
FOLDER = Path(quoted.__file__).parent / "quoted"


def by_hand(dataset: str) -> list[float]:
    """Delta_m from the printed cells, with nothing of this project."""
    with (FOLDER / f"{dataset}.csv").open() as file:
        rows = list(csv.DictReader(file))
    dense, result = rows[0], []
    for row in rows:
        changes: dict[str, list[float]] = {}
        for key, text in row.items():
            task, *rest = key.split("/")
            if rest and rest[-1] != "error":
                change = (float(text) - float(dense[key])) / float(dense[key]) * 100
                changes.setdefault(task, []).append(-change if rest[-1] in LOWER else change)
        per_task = [sum(c) / len(c) for c in changes.values()]
        result.append(sum(per_task) / len(per_task))
    return result


@pytest.mark.parametrize("dataset", quoted.DATASETS)
def test_delta_m_is_the_one_computed_by_hand(dataset):
    found = quoted.quoted(dataset)["delta_m"].tolist()
    assert found == pytest.approx(by_hand(dataset), abs=1e-9)
    for value, expected in zip(found, EXPECTED[dataset], strict=True):
        assert value == pytest.approx(expected, abs=0.051 if abs(expected) > 100 else 0.00501)


@pytest.mark.parametrize("dataset", quoted.DATASETS)
def test_rows_are_the_published_ones(dataset):
    frame = quoted.quoted(dataset)
    assert tuple(zip(frame["start"], frame["method"], strict=True)) == METHODS
    assert frame["sparsity"].tolist() == [0.0] + [0.9] * 9
    assert set(frame["dataset"]) == {dataset} and frame["source"].str.contains("DiSparse").all()


@pytest.mark.parametrize("dataset", quoted.DATASETS)
def test_shares_become_fractions_and_all_else_stays(dataset):
    frame, printed = quoted.quoted(dataset), quoted.printed(dataset)
    for name in quoted.metric_columns(frame):
        percent = name.split("/")[-1] not in LOWER
        assert frame[name].tolist() == pytest.approx([float(t) / (100 if percent else 1) for t in printed[name]])
        assert not percent or frame[name].between(0, 1).all()


def test_names_are_those_of_our_metrics():
    assert "legacy" in FAMILIES
    ours = quoted.higher_is_better()
    for dataset in quoted.DATASETS:
        names = set(quoted.metric_columns(quoted.printed(dataset)))
        assert names - set(ours) <= set(quoted.LEFT_OUT)
    for name, better in ours.items():
        assert better == (name.split("/")[-1] not in LOWER)


def test_tasks_are_those_of_the_tables():
    assert set(quoted.quoted("nyuv2")["tasks"]) == {"seg+normal"}
    assert set(quoted.quoted("cityscapes")["tasks"]) == {"seg+depth"}
    assert set(quoted.quoted("taskonomy")["tasks"]) == {"seg+normal+depth+keypoint+edge"}


def test_only_the_two_random_rows_of_nyuv2_are_suspect():
    marked = {
        (d, r["start"], r["method"], r["suspect"])
        for d in quoted.DATASETS
        for r in quoted.quoted(d).to_dict("records")
        if r["suspect"]
    }
    pair = "seg/legacy/miou seg/legacy/pixel_acc"
    assert marked == {("nyuv2", "init", "Random", pair), ("nyuv2", "trained", "Random", pair)}


@pytest.mark.parametrize("dataset", quoted.DATASETS)
def test_every_row_of_the_markdown_is_marked_and_holds_the_printed_cells(dataset):
    lines = [line for line in quoted.markdown(dataset).splitlines() if line.startswith("|")]
    printed = quoted.printed(dataset)
    assert len(lines) == 2 + len(printed)
    for line, (_, row) in zip(lines[2:], printed.iterrows(), strict=True):
        cells = [c.strip() for c in line.strip("|").split("|")]
        assert cells[:3] == [row["method"], "quoted", row["start"]]
        assert [c.rstrip("†") for c in cells[5:]] == [row[n] for n in quoted.metric_columns(printed)]
        assert ("†" in line) == bool(row["suspect"])
    assert quoted.markdown(dataset).count("Quoted from DiSparse") == 1


def test_the_csv_is_as_printed():
    """Two digits and no leading zero where the published tables have it so."""
    assert ".016" in quoted.printed("cityscapes")["depth/legacy/abs"].tolist()
    assert all(re.fullmatch(r"\d*\.\d+", t) for t in quoted.printed("taskonomy")["edge/legacy/l1"])


def test_an_unknown_set_is_refused():
    with pytest.raises(ValueError, match=r"'rooms'; allowed: nyuv2, cityscapes, taskonomy"):
        quoted.quoted("rooms")


def test_frames_of_all_sets_join():
    joined = pd.concat([quoted.quoted(d) for d in quoted.DATASETS])
    assert len(joined) == 30 and joined["delta_m"].notna().all()
