"""``cut data check``: a good set is summed up; a damaged one gives one clear error, and so does its loader."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from layout_files import COUNTS, LAYOUTS, file_of, is_npy, load, read_all, write, write_index, write_set
from PIL import Image

from cut.cli import main
from cut.data.check import check, which
from cut.data.files import Example, read_index

CLASSES = {"nyuv2": 40, "nyuv2-npy": 13, "cityscapes": 19, "cityscapes-npy": 7, "taskonomy": 17}
# Column of a layout's file with the picture, the classes, and another label.
COLUMNS = {
    "nyuv2": ("img", "seg", "depth"),
    "nyuv2-npy": ("image", "label", "normal"),
    "cityscapes": ("image", "label_19", "depth"),
    "cityscapes-npy": ("image", "label", "depth"),
    "taskonomy": ("rgb", "segment_semantic", "edge_texture"),
}
INDEXED = ("nyuv2", "cityscapes", "taskonomy")
Damage = Callable[[str, Path], Path]


# --- a good set ---


def test_a_good_set_is_summed_up(published: tuple[str, Path], capsys) -> None:
    layout, root = published
    assert main(["data", "check", str(root), "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    name = layout.removesuffix("-npy")
    val = sum(e.is_validation for e in load(layout, root).layout.examples(root, "train"))
    assert found["name"] == name and found["wrong"] == [] and err == ""
    assert found["pictures"] == {"train": COUNTS["train"] - val, "val": val, "test": COUNTS["test"]}
    assert found["size"] == [24, 32] != found["published"]
    assert found["classes"] == found["of_classes"] == CLASSES[layout]

    assert main(["data", "check", str(root), "--set", name]) == 0
    out, err = capsys.readouterr()
    assert f"{COUNTS['train'] - val} train, {val} val, {COUNTS['test']} test pictures of 24x32 (published: " in out
    assert f"{CLASSES[layout]} of {CLASSES[layout]} classes seen" in out and "wrong" not in out + err

    assert main(["data", "check", str(root), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_every_example_is_opened_under_a_progress_bar(published: tuple[str, Path]) -> None:
    _, root = published
    seen: list[Example] = []
    check(root, progress=lambda examples: (seen.append(e) or e for e in examples))
    assert len({e.name for e in seen}) == sum(COUNTS.values())


def test_the_layout_is_told_from_the_folder(published: tuple[str, Path]) -> None:
    layout, root = published
    name, found = which(root)
    assert name == layout.removesuffix("-npy") and len(found.classes) == CLASSES[layout]


# --- damage ---


def missing(layout: str, root: Path) -> Path:
    path = file_of(layout, root, "train", 4, COLUMNS[layout][2])
    path.unlink()
    return path


def truncated(column: int) -> Damage:
    def damage(layout: str, root: Path) -> Path:
        path = file_of(layout, root, "train", 7, COLUMNS[layout][column])
        path.write_bytes(path.read_bytes()[:-60])
        return path

    return damage


def emptied(layout: str, root: Path) -> Path:
    path = file_of(layout, root, "test", 1, COLUMNS[layout][2])
    path.write_bytes(b"")
    return path


def read(path: Path) -> np.ndarray:
    return np.load(path) if path.suffix == ".npy" else np.array(Image.open(path))


def reshaped(change: Callable[[np.ndarray], np.ndarray], column: int) -> Damage:
    def damage(layout: str, root: Path) -> Path:
        path = file_of(layout, root, "test", 2, COLUMNS[layout][column])
        return write(path, np.ascontiguousarray(change(read(path))))

    return damage


def wrong_class(layout: str, root: Path) -> Path:
    path = file_of(layout, root, "test", 0, COLUMNS[layout][1])
    array = read(path)
    array[9, 9] = CLASSES[layout] + (layout == "taskonomy")
    return write(path, array)


DAMAGES: dict[str, tuple[Damage, str]] = {
    "missing file": (missing, "is missing"),
    "truncated picture": (truncated(0), "is damaged"),
    "truncated label": (truncated(1), "is damaged"),
    "empty file": (emptied, "is damaged"),
    "cropped label": (reshaped(lambda a: a[:-1], 1), "is 23x32"),
    "cropped picture": (reshaped(lambda a: a[:, 1:], 0), "is 24x31"),
    "grey picture": (reshaped(lambda a: a[..., 0], 0), "expected "),
    "coloured label": (reshaped(lambda a: np.stack([a.reshape(24, 32)] * 3, -1).astype(a.dtype), 1), "expected "),
    "wrong class": (wrong_class, "class "),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_damage_is_one_clear_error_that_names_the_file(layout: str, damage: str, tmp_path: Path, capsys) -> None:
    root = write_set(layout, tmp_path / "set")
    action, message = DAMAGES[damage]
    path = action(layout, root)

    with pytest.raises(ValueError, match=message) as error:
        read_all(load(layout, root))
    assert str(path) in str(error.value) and "\n" not in str(error.value)

    assert main(["data", "check", str(root)]) == 2
    out, err = capsys.readouterr()
    (line,) = [line for line in out.splitlines() if line.startswith("wrong: ")]
    assert str(path) in line and message in line
    assert err.startswith(f"cut: {root}: 1 thing is wrong, the first: {path}") and len(err.splitlines()) == 1

    assert main(["data", "check", str(root), "--json"]) == 2
    (wrong,) = json.loads(capsys.readouterr().out)["wrong"]
    assert str(path) in wrong and message in wrong


@pytest.mark.parametrize("layout", INDEXED)
def test_an_index_that_names_a_missing_file(layout: str, tmp_path: Path, capsys) -> None:
    root = write_set(layout, tmp_path)
    index = read_index(root / str(LAYOUTS[layout][2]), {"nyuv2": 4, "cityscapes": 5, "taskonomy": 6}[layout])
    index["train"][2][1] = index["train"][2][1].replace(".", "-none.")
    write_index(layout, root, index)
    with pytest.raises(ValueError, match=r"-none\.\w+ is missing; the index names it in 'train'"):
        load(layout, root)
    assert main(["data", "check", str(root)]) == 2
    assert "-none." in capsys.readouterr().err


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_empty_split(layout: str, split: str, tmp_path: Path, capsys) -> None:
    root = write_set(layout, tmp_path, COUNTS | {split: 0})
    if LAYOUTS[layout][2] is None:  # a folder of labels without any
        for key in COLUMNS[layout]:
            file_of(layout, root, split, 0, key).parent.mkdir(parents=True, exist_ok=True)
        if layout == "nyuv2-npy":
            (root / "train/normal").mkdir(exist_ok=True)
    with pytest.raises(ValueError, match="no pictures"):
        load(layout, root)
    assert main(["data", "check", str(root)]) == 2
    assert "no pictures" in capsys.readouterr().err


def test_no_validation_picture(tmp_path: Path, capsys) -> None:
    root = write_set("nyuv2", tmp_path, {"train": 5, "test": 1})
    with pytest.raises(ValueError, match="no pictures for split 'val'"):
        load("nyuv2", root)
    assert main(["data", "check", str(root)]) == 2
    assert f"{root}: no pictures for split 'val'" in capsys.readouterr().err


def test_missing_class_weights(tmp_path: Path, capsys) -> None:
    root = write_set("taskonomy", tmp_path)
    (root / "semseg_prior_factor.npy").unlink()
    assert main(["data", "check", str(root)]) == 2
    assert "semseg_prior_factor.npy is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "is no data set that is known here: it holds notes.txt; known: AdaShare's nyu_v2_3task.json"),
        (["--set", "nyuv2"], "is not NYU-v2: it holds notes.txt; expected AdaShare's nyu_v2_3task.json"),
        (["--set", "taskonomy"], "is not Tiny-Taskonomy: it holds notes.txt; expected taskonomy.json"),
        (["--set", "kitti"], "set 'kitti'; allowed: nyuv2, cityscapes, taskonomy"),
    ],
)
def test_a_wrong_folder(tmp_path: Path, arguments: list[str], message: str, capsys) -> None:
    (tmp_path / "notes.txt").write_text("x")
    assert main(["data", "check", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert main(["data", "check", str(tmp_path / "none"), *arguments]) == 2


def test_everything_that_is_wrong_is_listed(tmp_path: Path, capsys) -> None:
    root = write_set("nyuv2", tmp_path)
    paths = [action("nyuv2", root) for action in (missing, truncated(0), emptied, wrong_class)]
    assert main(["data", "check", str(root), "--json"]) == 2
    wrong = json.loads(capsys.readouterr().out)["wrong"]
    assert len(wrong) == 4 and all(any(str(path) in line for line in wrong) for path in paths)


@pytest.mark.parametrize(
    ("value", "message"),
    [(5000.0, "depths from 5000 to 5000; expected metres, up to 100"), (0.0, "no pixel with a known")],
)
def test_values_that_no_set_has(tmp_path: Path, value: float, message: str) -> None:
    root = write_set("nyuv2", tmp_path)
    assert is_npy("nyuv2", "depth")
    path = write(file_of("nyuv2", root, "train", 0, "depth"), np.full((24, 32), value, np.float32))
    (line,) = check(root).wrong
    assert str(path) in line and message in line


# --- what an index lists more than once ---


def listed_again(layout: str, root: Path, source: tuple[str, int], target: str) -> tuple[Path, int]:
    """Append a row of the index to a split; gives the row's picture and its new number."""
    index = read_index(root / str(LAYOUTS[layout][2]), {"nyuv2": 4, "cityscapes": 5, "taskonomy": 6}[layout])
    split, number = source
    index[target].append(index[split][number])
    write_index(layout, root, index)
    return file_of(layout, root, split, number, COLUMNS[layout][0]), len(index[target]) - 1


def trained_on(layout: str, root: Path, validation: bool = False) -> int:
    """The number of a training picture that is, or is not, for validation."""
    examples = LAYOUTS[layout][0](root).layout.examples(root, "train")
    return next(n for n, e in enumerate(examples) if e.is_validation == validation)


@pytest.mark.parametrize("validation", [False, True])
@pytest.mark.parametrize("layout", INDEXED)
def test_a_picture_in_two_splits_is_named_and_refused(layout: str, validation: bool, tmp_path: Path, capsys) -> None:
    root = write_set(layout, tmp_path)
    row = trained_on(layout, root, validation)
    path, number = listed_again(layout, root, ("train", row), "test")
    part = "val" if validation else "train"
    wanted = (
        f"{root / str(LAYOUTS[layout][2])} lists {path} for {part} (row {row} of split 'train') "
        f"and for test (row {number} of split 'test')"
    )
    with pytest.raises(ValueError, match=re.escape(wanted) + "; allowed: each picture in one split"):
        load(layout, root)
    assert main(["data", "check", str(root), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["wrong"] == [wanted]

    with pytest.warns(UserWarning, match=re.escape(wanted)):
        data = load(layout, root, legacy=True)
    assert len(data.splits["test"]) == COUNTS["test"] + 1
    assert main(["data", "check", str(root), "--legacy"]) == 0
    out, err = capsys.readouterr()
    assert f"warning: {wanted}" in out and "wrong" not in out + err


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("layout", INDEXED)
def test_a_picture_that_is_listed_twice_is_named(layout: str, split: str, legacy: bool, tmp_path: Path) -> None:
    root = write_set(layout, tmp_path)
    row = trained_on(layout, root) if split == "train" else 1
    path, number = listed_again(layout, root, (split, row), split)
    wanted = (
        f"{root / str(LAYOUTS[layout][2])} lists {path} twice for {split} "
        f"(row {row} of split {split!r} and row {number} of split {split!r})"
    )
    report = check(root, legacy=legacy)
    assert (report.warnings, report.wrong) == (([wanted], []) if legacy else ([], [wanted]))
    with pytest.warns(UserWarning, match=re.escape(wanted)):
        data = load(layout, root, legacy=legacy)
    assert len(data.splits[split]) == report.pictures[split]


def test_all_repeated_pictures_are_listed_and_counted(tmp_path: Path) -> None:
    root = write_set("nyuv2", tmp_path)
    paths = [listed_again("nyuv2", root, ("test", n), "train")[0] for n in range(3)]
    wrong = check(root).wrong
    assert len(wrong) == 3 and all(str(path) in line for path, line in zip(paths, wrong, strict=True))
    with pytest.raises(ValueError, match=re.escape(str(paths[0])) + ".* and 2 more; allowed"):
        load("nyuv2", root)


def test_a_picture_is_where_its_file_is_however_it_is_written(tmp_path: Path) -> None:
    """Another spelling is another name, which may send the same picture to validation, but it is no other picture."""
    root = write_set("taskonomy", tmp_path)
    index = read_index(root / "taskonomy.json", 6)
    path = file_of("taskonomy", root, "test", 0, "rgb")
    index["train"].append([path.relative_to(root).as_posix(), *index["test"][0][1:]])
    write_index("taskonomy", root, index)
    (line,) = check(root).wrong
    assert str(path) in line and "row 20 of split 'train'" in line and "row 0 of split 'test'" in line
    index["train"][-1] = ["leonardo/rgb//p_0.png", *index["train"][0][1:]]
    write_index("taskonomy", root, index)
    (line,) = check(root).wrong
    assert str(file_of("taskonomy", root, "train", 0, "rgb")) in line and "row 20 of split 'train'" in line


@pytest.mark.parametrize("legacy", [False, True])
def test_an_intact_set_gives_no_warning(published: tuple[str, Path], legacy: bool, recwarn) -> None:
    layout, root = published
    load(layout, root, legacy=legacy)
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]
    assert check(root, legacy=legacy).warnings == []


# --- units ---


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("layout", ["nyuv2", "nyuv2-npy"])
@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
def test_millimetres_are_refused_with_the_first_file(layout: str, legacy: bool, dtype: type, tmp_path: Path) -> None:
    root = write_set(layout, tmp_path)
    for split, count in COUNTS.items():
        for number in range(count):
            path = file_of(layout, root, split, number, "depth")
            write(path, (np.load(path) * 1000).round().astype(dtype))
    data = load(layout, root, legacy=legacy)
    path = file_of(layout, root, "test", 0, "depth")
    low, high = np.load(path).min(), np.load(path).max()
    wanted = f"{path} holds depths from {low:g} to {high:g}; expected metres, up to 100"
    with pytest.raises(ValueError, match=re.escape(wanted)):
        data.splits["test"][0, 0]
    report = check(root)
    assert len(report.wrong) == sum(COUNTS.values()) and wanted in report.wrong
    load(layout, root, tasks=["seg"]).splits["test"][0, 0]  # which needs no depth
