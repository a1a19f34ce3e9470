import json
import os
import subprocess
import sys

import pytest

from cut import records
from cut.files import write_atomically
from cut.records import Record, config_hash, load, machine, read

CONFIG = {
    "seed_everything": 1,
    "out": "runs/a",
    "trainer": {
        "max_epochs": 3,
        "devices": 1,
        "accelerator": "cpu",
        "logger": False,
        "default_root_dir": "x",
    },
    "data": {"class_path": "cut.data.rooms.Rooms", "init_args": {"num_workers": 0, "batch_size": 16}},
    "pruning": {"budget": {"init_args": {"target": 0.9}}, "tasks": ["seg", "depth"]},
}


def record(**changes):
    entries = {
        "method": "cut",
        "data": {"name": "rooms", "seed": 1},
        "backbone": "resnet18",
        "weights_source": "random",
        "tasks": ["seg", "depth"],
        "seed": 3,
        "config": CONFIG,
        "metrics": {"test": {"seg/miou": 0.5, "depth/abs": 0.25}},
        "higher_is_better": {"seg/miou": True, "depth/abs": False},
        "budget": {"target": 0.9, "achieved": 0.90001},
        "cost": {"compact": {"params": 10, "latency": {"median_ms": 1.5}}},
    }
    return Record(**(entries | changes))


def test_written_record_reads_back_equal(tmp_path):
    first = record(history=[{"epoch": 0, "val/seg/miou": 0.1}], mask_overlap={"w": {"a & b": 0.5}})
    path = first.write(tmp_path / "new" / "folder")
    assert read(path) == first
    assert read(path).id == first.id == path.stem
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_name_is_readable_and_ends_in_the_hash():
    assert record().id == f"rooms-cut-0.9-seg+depth-3-{config_hash(CONFIG)}"
    assert record(budget={}).id.startswith("rooms-cut-dense-seg+depth-3-")


def test_hash_leaves_out_places_devices_workers_and_loggers():
    other = json.loads(json.dumps(CONFIG))
    other |= {"out": "elsewhere", "init": "/dense", "records": "r"}
    other["trainer"] |= {"devices": 4, "accelerator": "gpu", "logger": True, "default_root_dir": "y"}
    other["data"]["init_args"]["num_workers"] = 8
    assert config_hash(other) == config_hash(CONFIG)


@pytest.mark.parametrize("path", [("seed_everything",), ("trainer", "max_epochs"), ("data", "init_args", "batch_size")])
def test_hash_covers_what_numbers_depend_on(path):
    other = json.loads(json.dumps(CONFIG))
    place = other
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] += 1
    assert config_hash(other) != config_hash(CONFIG)


def test_hash_is_pinned_so_that_old_records_stay_valid():
    assert config_hash({"a": 1, "b": [{"c": None}]}) == "4ec77fe8"
    assert config_hash(CONFIG) == "8a883b6a"


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"schema": 1}', '{"schema": 99, "method": "cut"}', "\xff\xfe", "3"]
)
def test_damaged_record_is_refused_by_name(tmp_path, content):
    path = tmp_path / "broken.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"broken\.json"):
        read(path)
    with pytest.raises(ValueError, match=r"broken\.json"):
        load(tmp_path)


def test_number_that_is_not_finite_is_refused_and_nothing_is_left(tmp_path):
    with pytest.raises(ValueError, match="not finite"):
        record(metrics={"test": {"seg/miou": float("nan")}}).write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomically(path, "old")

    def fail(*_):
        raise OSError("disk")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_load_gives_one_row_per_record_with_dotted_columns(tmp_path):
    for seed in (1, 2):
        record(seed=seed).write(tmp_path)
    (tmp_path / "notes.txt").write_text("no record")
    frame = load(tmp_path)
    assert sorted(frame["seed"]) == [1, 2]
    assert list(frame["metrics.test.seg/miou"]) == [0.5, 0.5]
    assert len(load(tmp_path / "nowhere")) == 0


def test_machine_and_commit_say_where_a_number_is_from(monkeypatch):
    assert {"processor", "cores", "python", "torch", "lightning", "timm"} <= set(machine())
    name, dirty = records.commit()
    assert isinstance(dirty, bool) and name

    def no_git(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", no_git)
    assert records.commit() == ("unknown", False)


def test_records_do_not_need_lightning():
    code = "import sys, cut.records; print('lightning' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_peak_memory_is_in_bytes():
    assert 10_000_000 < records.peak_memory() < 1_000_000_000_000
