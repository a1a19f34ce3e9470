"""Stand-ins are written whole or not at all, and never over anything else."""

import json
import subprocess
from pathlib import Path

import pytest

from experiments.rooms import layouts
from experiments.rooms.__main__ import main
from experiments.rooms.layouts import LAYOUTS, write_layout
from tests.experiments.layout_rooms import tree, write_source

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("rooms"))


@pytest.fixture(scope="module")
def written(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    return {name: (write_layout(name, folder / name, source), folder / name)[1] for name in LAYOUTS}


# Whole or not at all


@pytest.mark.parametrize("layout", LAYOUTS)
def test_writing_again_gives_the_same_bytes_and_leaves_nothing_else(written, source, tmp_path, layout):
    out = tmp_path / "set"
    for _ in range(2):
        write_layout(layout, out, source)
        assert tree(out) == tree(written[layout])
        assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_another_layout_replaces_a_stand_in_wholly(written, source, tmp_path):
    write_layout("nyuv2", tmp_path / "set", source)
    write_layout("cityscapes-npy", tmp_path / "set", source)
    assert tree(tmp_path / "set") == tree(written["cityscapes-npy"])


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_a_stopped_run_leaves_the_old_set_or_none(written, source, tmp_path, monkeypatch, stop):
    out, real, calls = tmp_path / "set", layouts._bytes, []

    def fails(array, path):
        calls.append(path)
        if len(calls) == 9:
            raise stop("disk full")
        return real(array, path)

    monkeypatch.setattr(layouts, "_bytes", fails)
    with pytest.raises(ValueError if stop is OSError else stop):
        write_layout("nyuv2", out, source)
    assert list(tmp_path.iterdir()) == []
    write_layout("nyuv2", out, source)
    calls.clear()
    with pytest.raises(ValueError if stop is OSError else stop):
        write_layout("cityscapes", out, source)
    assert tree(out) == tree(written["nyuv2"]) and [path.name for path in tmp_path.iterdir()] == ["set"]


def test_what_a_killed_run_left_is_removed(written, source, tmp_path):
    part = tmp_path / ".set.part"
    (part / "train/image").mkdir(parents=True)
    (part / "train/image/0.npy").write_bytes(b"half")
    write_layout("nyuv2-npy", tmp_path / "set", source)
    assert tree(tmp_path / "set") == tree(written["nyuv2-npy"])
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_set_that_was_being_replaced_when_killed_comes_back(written, source, tmp_path, monkeypatch):
    out = tmp_path / "set"
    write_layout("nyuv2", out, source)
    out.rename(tmp_path / ".set.old")
    monkeypatch.setattr(layouts, "_bytes", lambda array, path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_layout("cityscapes", out, source)
    assert tree(out) == tree(written["nyuv2"])


# Bad input


def test_unknown_layout_names_the_allowed_ones(source, tmp_path, capsys):
    assert main(["layout", "--layout", "nyu", "--set", str(source), "--out", str(tmp_path / "set")]) == 2
    message = capsys.readouterr().err
    assert "'nyu'" in message and "nyuv2, nyuv2-npy, cityscapes, cityscapes-npy, taskonomy" in message
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_files_is_never_touched(source, tmp_path):
    (tmp_path / "nyu_v2_3task.json").write_text("{}")
    with pytest.raises(ValueError, match="hold"):
        write_layout("nyuv2", tmp_path, source)
    (tmp_path / "file").write_text("text")
    with pytest.raises(ValueError, match="is a file"):
        write_layout("nyuv2", tmp_path / "file", source)
    assert sorted(tree(tmp_path)) == ["file", "nyu_v2_3task.json"]


@pytest.mark.parametrize("place", [".", "..", "inside"])
def test_the_rooms_themselves_are_never_replaced(source, place):
    before = tree(source)
    with pytest.raises(ValueError, match="another folder"):
        write_layout("nyuv2", source / place, source)
    assert tree(source) == before


def copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_a_missing_or_damaged_source_is_named(source, tmp_path):
    with pytest.raises(ValueError, match=r"meta\.json is missing"):
        write_layout("nyuv2", tmp_path / "set", tmp_path / "nothing")
    broken = copy(source, tmp_path / "rooms")
    (broken / "test-000.zip").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"test-000\.zip is damaged"):
        write_layout("nyuv2", tmp_path / "set", broken)
    (broken / "ATTRIBUTION.md").unlink()
    with pytest.raises(ValueError, match=r"ATTRIBUTION\.md is missing.*experiments\.rooms attribution"):
        write_layout("nyuv2", tmp_path / "set", broken)
    assert not (tmp_path / "set").exists()


def test_rooms_of_other_classes_are_refused(source, tmp_path):
    other = copy(source, tmp_path / "rooms")
    meta = json.loads((other / "meta.json").read_text())
    (other / "meta.json").write_text(json.dumps(meta | {"classes": ["wall", "sea"]}))
    with pytest.raises(ValueError, match=r"\['wall', 'sea'\]; allowed: \['wall', 'floor'"):
        write_layout("nyuv2", tmp_path / "set", other)


# make rooms


def commands(*arguments: str) -> list[str]:
    done = subprocess.run(["make", "-n", "rooms", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if "experiments.rooms" in line]


def test_make_reencodes_the_embedded_set_unless_new_rooms_are_asked_for():
    (layout,) = commands("LAYOUT=taskonomy", "OUT=here")
    assert "layout --layout taskonomy --size 96x128 --out here" in layout and "--set" not in layout
    render, attribution, layout = commands("LAYOUT=nyuv2", "OUT=here", "N=7")
    assert "render --num 7" in render and "--out here-rendered" in render
    assert "--out here-rendered/ATTRIBUTION.md" in attribution
    assert "--layout nyuv2" in layout and "--out here --set here-rendered" in layout
    assert len(commands("LAYOUT=nyuv2", "SEED=3")) == 3


def test_make_without_a_layout_renders():
    lines = commands("OUT=here")
    assert "render --num 100 --size 96x128 --seed 0 --out here" in lines[0]
    assert not any("--layout" in line for line in lines)
