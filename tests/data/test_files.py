"""Sets of files: the validation part, order, index, augmentation, padding, workers, sizes."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from layout_files import COUNTS, LAYOUTS, SIZE, file_of, load, read_all, write, write_index, write_set

from cut.data.augmentation import Augmentation
from cut.data.batch import check_batch
from cut.data.files import Example, numbered, read_index

# Training pictures for validation, of 100 in AdaShare's NYU-v2 and in a numbered layout: never to be changed.
PINNED = [9, 81, 95]
PINNED_NPY = [0, 3, 10, 20, 22, 34, 35, 47, 48, 53, 54, 73, 77, 78, 80, 88, 91, 98]
ZOOM = Augmentation(scale=(0.5, 1.5), crop=(20, 20), pad=True, uniform=True)


@pytest.fixture
def nyuv2(tmp_path: Path) -> Path:
    """A set that may be changed."""
    return write_set("nyuv2", tmp_path)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k].nan_to_num(-7), b[k].nan_to_num(-7)) for k in a)


# --- the validation part ---


def test_the_validation_part_is_fixed_for_ever() -> None:
    names = [f"nyu_train_val/training/img/{n:04d}.png" for n in range(100)]
    found = [n for n, name in enumerate(names) if Example(name, {}).is_validation]
    assert found == PINNED
    assert [n for n in range(100) if Example(f"train/{n}", {}).is_validation] == PINNED_NPY


def test_it_is_about_a_tenth() -> None:
    assert 160 < sum(Example(f"picture {n}", {}).is_validation for n in range(2000)) < 240


def test_train_and_validation_are_the_index_without_test(published: tuple[str, Path]) -> None:
    layout, root = published
    data = load(layout, root)
    names = {split: [e.name for e in data.splits[split].examples] for split in ("train", "val", "test", "plain")}
    assert len(names["train"]) + len(names["val"]) == COUNTS["train"] and len(names["test"]) == COUNTS["test"]
    assert names["plain"] == names["train"] and not set(names["train"]) & set(names["val"])
    assert len(names["val"]) > 0
    listed = [e.name for e in data.layout.examples(root, "train")]
    assert [n for n in listed if n in names["train"]] == names["train"]  # in the set's order
    assert [n for n in listed if n in names["val"]] == names["val"]
    assert names["test"] == [e.name for e in data.layout.examples(root, "test")]


def test_numbered_files_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (10, 2, 1, 100):
        write(tmp_path / f"train/image/{number}.npy", np.zeros(1))
    names = [e.name for e in numbered(tmp_path, "train", {"image": "image"})]
    assert names == ["train/1", "train/2", "train/10", "train/100"]


@pytest.mark.parametrize(("count", "split"), [(1, "val"), (20, "train")])
def test_no_split_is_empty(nyuv2: Path, count: int, split: str) -> None:
    rows = [[file_of("nyuv2", nyuv2, "train", n, k).relative_to(nyuv2).as_posix() for k in KEYS] for n in range(20)]
    kept = [row for row in rows if Example(row[0], {}).is_validation == (split == "train")][:count]
    write_index("nyuv2", nyuv2, {"train": kept, "test": rows[:1]})
    with pytest.raises(ValueError, match=f"no pictures for split '{split}'"):
        load("nyuv2", nyuv2)


# --- records ---


def test_the_hash_changes_with_names_and_sizes_of_files(nyuv2: Path) -> None:
    first = load("nyuv2", nyuv2).description
    assert first["name"] == "nyuv2" and first["layout"] == "AdaShare" and len(first["hash"]) == 12
    assert sum(first["splits"].values()) == COUNTS["train"] + COUNTS["test"]
    assert load("nyuv2", nyuv2).description == first
    assert load("nyuv2", nyuv2, legacy=True).description == first | {"legacy": True}
    path = file_of("nyuv2", nyuv2, "train", 3, "seg")
    os.utime(path, (1, 1))
    assert load("nyuv2", nyuv2).description == first
    path.write_bytes(path.read_bytes() + b"more")
    assert load("nyuv2", nyuv2).description["hash"] != first["hash"]


def test_the_hash_changes_with_the_order(nyuv2: Path) -> None:
    before = load("nyuv2", nyuv2).description["hash"]
    index = read_index(nyuv2 / "nyu_v2_3task.json", 4)
    write_index("nyuv2", nyuv2, index | {"test": index["test"][::-1]})
    assert load("nyuv2", nyuv2).description["hash"] != before


# --- the index ---

KEYS = ("img", "seg", "normal_mask", "depth")
ROW = [f"{key}.png" for key in KEYS]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ("\udcff", "is damaged"),
        ('{"train": [["a", "b"]]}', "'test'"),
        ('{"train": [], "test": [["a", "b"]]}', "no pictures of split 'train'"),
        ('{"train": [["a", "b"]], "test": {}}', "no pictures of split 'test'"),
        ('{"train": [["a", "b"], ["a"]], "test": [["a", "b"]]}', "row 1 of split 'train' is .'a'.; expected 2 paths"),
        ('{"train": [["a", 3]], "test": [["a", "b"]]}', "row 0 of split 'train'"),
        ('{"train": ["ab"], "test": [["a", "b"]]}', "row 0 of split 'train' is 'ab'"),
    ],
)
def test_a_damaged_index_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "index.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message) as error:
        read_index(path, 2)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("path", ["../secret.png", "/etc/passwd", "nyu_train_val/../../x.png"])
def test_no_path_leads_out_of_the_root(nyuv2: Path, path: str) -> None:
    write_index("nyuv2", nyuv2, {"train": [ROW], "test": [[path, *ROW[1:]]]})
    with pytest.raises(ValueError, match=f"names '{path}', which is outside"):
        load("nyuv2", nyuv2)


def test_an_index_that_names_a_missing_file_names_the_split(nyuv2: Path) -> None:
    index = read_index(nyuv2 / "nyu_v2_3task.json", 4)
    index["test"][1][2] = "nyu_train_val/testing/normal_mask/none.png"
    write_index("nyuv2", nyuv2, index)
    with pytest.raises(ValueError, match=r"none\.png is missing; the index names it in 'test'"):
        load("nyuv2", nyuv2)
    load("nyuv2", nyuv2, tasks=["seg", "depth"])  # whose files are all there


# --- folders and arguments ---


@pytest.mark.parametrize("layout", ["nyuv2", "cityscapes", "taskonomy"])
def test_a_wrong_folder_is_told_what_was_found_expected_and_where_the_set_is(layout: str, tmp_path: Path) -> None:
    loader = LAYOUTS[layout][0]
    with pytest.raises(ValueError, match=r"no folder of .* given \(data.init_args.root\).*repository"):
        loader(None)
    with pytest.raises(ValueError, match=r"no such folder; expected .*json.*repository"):
        loader(tmp_path / "none")
    write(tmp_path / "holiday.png", np.zeros((2, 2, 3), np.uint8))
    with pytest.raises(ValueError, match=r"it holds holiday.png; expected .*json.*repository"):
        loader(tmp_path)


def test_numbered_nyuv2_is_no_cityscapes(tmp_path: Path) -> None:
    root = write_set("nyuv2-npy", tmp_path)
    with pytest.raises(ValueError, match=f"{root} is not Cityscapes: it holds train, val"):
        LAYOUTS["cityscapes"][0](root)


def test_a_set_in_another_format_is_refused(published: tuple[str, Path]) -> None:
    layout, root = published
    for other, (loader, *_) in LAYOUTS.items():
        if loader is not LAYOUTS[layout][0]:
            with pytest.raises(ValueError, match=f"{root} is not"):
                loader(root)
        assert other in LAYOUTS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": ["seg", "scene"]}, "no task 'scene'; allowed: seg"),
        ({"tasks": []}, "at least one"),
        ({"tasks": ["seg", "seg"]}, "each once"),
        ({"weights": {"seg": 0}}, "loss weights"),
        ({"weights": {"scene": 1}}, "loss weights"),
        ({"batch_size": 0}, "batch_size 0"),
    ],
)
def test_wrong_arguments_are_named(published: tuple[str, Path], arguments: dict, message: str) -> None:
    layout, root = published
    with pytest.raises(ValueError, match=message):
        LAYOUTS[layout][0](root, **arguments)


def test_loss_weights_are_the_papers_or_ones_own(published: tuple[str, Path]) -> None:
    layout, root = published
    papers = {
        "nyuv2": {"seg": 1, "normal": 20, "depth": 3},
        "cityscapes": {"seg": 1, "depth": 20},
        "taskonomy": {"seg": 1, "normal": 3, "depth": 2, "keypoint": 7, "edge": 7},
    }[layout.removesuffix("-npy")]
    assert {t.name: t.weight for t in load(layout, root).tasks} == papers
    assert {t.name: t.weight for t in load(layout, root, weights={"depth": 0.5}).tasks} == papers | {"depth": 0.5}


# --- batches ---


@pytest.mark.parametrize("legacy", [False, True])
def test_batches_are_as_documented(published: tuple[str, Path], legacy: bool) -> None:
    layout, root = published
    data = load(layout, root, batch_size=4, augmentation=ZOOM, legacy=legacy)
    for batch in (next(iter(data.train_dataloader())), *data.val_dataloader(), *data.score_batches(2)):
        check_batch(batch, data.tasks)
    assert next(iter(data.train_dataloader()))["image"].shape == (4, 3, 20, 20)
    assert next(iter(data.val_dataloader()))["image"].shape[-2:] == SIZE
    assert data.score_batches(1)[0]["image"].shape == (4, 3, 20, 20)


def test_workers_give_the_same_batches(published: tuple[str, Path]) -> None:
    layout, root = published
    loaders = [load(layout, root, batch_size=4, num_workers=n, augmentation=ZOOM).train_dataloader() for n in (0, 2)]
    for epoch in (0, 1):
        for loader in loaders:
            loader.sampler.set_epoch(epoch)
        pairs = list(zip(*loaders, strict=True))
        assert len(pairs) > 2 and all(equal(a, b) for a, b in pairs)


def test_pictures_depend_on_seed_epoch_and_index_only(published: tuple[str, Path]) -> None:
    layout, root = published
    split = load(layout, root, augmentation=ZOOM).splits["train"]
    wanted = {(e, i): split[e, i] for e in (0, 1) for i in (0, 5, 2)}
    torch.manual_seed(3)
    np.random.seed(3)
    again = load(layout, root, augmentation=ZOOM, tasks=[t.name for t in load(layout, root).tasks][:1])
    for key in reversed(wanted):
        assert equal(split[key], wanted[key])
        assert torch.equal(again.splits["train"][key]["image"], wanted[key]["image"])  # tasks do not matter
    assert not equal(wanted[0, 0], wanted[1, 0])
    assert not equal(load(layout, root, augmentation=ZOOM, seed=1).splits["train"][0, 0], wanted[0, 0])


def test_scoring_pictures_are_crops_without_other_changes(published: tuple[str, Path]) -> None:
    layout, root = published
    crop = Augmentation(scale=(0.5, 1.5), crop=(20, 20), pad=True)
    data = load(layout, root, augmentation=crop)
    whole = load(layout, root, augmentation=Augmentation(mirror=False)).splits["plain"]
    places = set()
    for index in range(4):
        found, original = data.splits["plain"][0, index], whole[0, index]
        assert equal(found, data.splits["plain"][7, index])  # whatever the epoch
        for top, left in np.ndindex(SIZE[0] - 19, SIZE[1] - 19):
            part = {k: v[..., top : top + 20, left : left + 20] for k, v in original.items()}
            if equal(found, part):
                places.add((top, left))
    assert len(places) > 2


def test_a_subset_is_the_first_training_pictures(published: tuple[str, Path]) -> None:
    layout, root = published
    data = load(layout, root, subset=5)
    assert {s: len(d) for s, d in data.splits.items()} == {
        **{s: len(d) for s, d in load(layout, root).splits.items()},
        "train": 5,
        "plain": 5,
    }


# --- padding and zooming ---


@pytest.mark.parametrize(("crop", "size"), [((30, 40), (30, 40)), (None, SIZE), ((8, 40), (8, 40))])
def test_what_is_missing_is_the_mean_colour_and_unknown(
    published: tuple[str, Path], crop: tuple[int, int] | None, size: tuple[int, int]
) -> None:
    layout, root = published
    augmentation = Augmentation(mirror=False, scale=(0.5, 0.5), crop=crop, pad=True)
    item = load(layout, root, augmentation=augmentation).splits["train"][0, 0]
    height, width = min(size[0], SIZE[0] // 2), SIZE[1] // 2
    unknown = {"image": 0.0, "seg": 255, "normal": 0.0, "depth": 0.0, "keypoint": float("nan"), "edge": float("nan")}
    for name, value in item.items():
        assert value.shape[-2:] == size
        outside = torch.ones(size, dtype=torch.bool)
        outside[:height, :width] = False
        assert np.isnan(unknown[name]) or (value[..., outside] == unknown[name]).all()
        assert not np.isnan(unknown[name]) or value[..., outside].isnan().all()
        assert (value[..., ~outside] != unknown[name]).any()
        if name in ("keypoint", "edge"):
            assert not value[..., ~outside].isnan().any()


def test_responses_of_a_zoomed_picture_come_from_their_files(tmp_path: Path) -> None:
    """Whether or not the picture may be padded: they are files, and stay what those hold."""
    root = write_set("taskonomy", tmp_path)
    zoom = Augmentation(mirror=False, scale=(2, 2))
    items = [load("taskonomy", root, augmentation=a).splits["train"][0, 0] for a in (zoom, ZOOM)]
    plain = load("taskonomy", root).splits["plain"][0, 0]
    for item, name in ((i, n) for i in items for n in ("keypoint", "edge")):
        known = item[name][~item[name].isnan()]
        assert torch.isin(known, plain[name]).all() and known.unique().numel() > 50


def test_a_crop_that_does_not_fit_needs_padding(nyuv2: Path) -> None:
    with pytest.raises(ValueError, match="crop 20x40 is larger than pictures of 24x32"):
        load("nyuv2", nyuv2, augmentation=Augmentation(crop=(20, 40)))
    load("nyuv2", nyuv2, augmentation=Augmentation(crop=(20, 40), pad=True))


# --- files ---


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_picture_of_another_size_is_named(layout: str, tmp_path: Path) -> None:
    root = write_set(layout, tmp_path)
    small = write_set(layout, tmp_path / "small", {"train": 1, "test": 1}, (12, 16))
    (key,) = [k for k in ("img", "image", "rgb") if file_of(layout, root, "test", 0, k).exists()]
    target = file_of(layout, root, "test", 2, key)
    target.write_bytes(file_of(layout, small, "test", 0, key).read_bytes())
    with pytest.raises(ValueError, match=f"{target} is 12x16; the set's first picture is 24x32"):
        read_all(load(layout, root))
