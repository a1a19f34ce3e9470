"""Stand-ins, read back with NumPy, Pillow and json alone."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from cut.data.filters import edge_strength, keypoint_response
from experiments.rooms import encode, pack
from experiments.rooms.__main__ import main
from experiments.rooms.catalog import CLASSES
from experiments.rooms.layouts import LAYOUTS, write_layout
from tests.experiments.layout_rooms import HEIGHT, WIDTH, read, read_source, tree, write_source

ROOT = Path(__file__).parents[2]
HALF_A_BYTE = 1 / 255 + 1e-6

# The 15 room classes by hand, in the numbers that the sets are published with.
NYU40 = [0, 1, 21, 3, 4, 5, 6, 2, 34, 39, 24, 32, 8, 23, 39]
NYU13 = [11, 4, 2, 0, 3, 8, 9, 5, 6, 6, 10, 6, 12, 5, 6]
CITY19 = [3, 0, 10, 15, 18, 13, 14, 16, 6, 8, 7, 4, 2, 17, 5]
CITY7 = [1, 0, 4, 6, 6, 6, 6, 6, 2, 3, 2, 1, 1, 6, 2]
CITY2 = [0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 0]
TASKONOMY = [0, 0, 0, 5, 2, 3, 6, 0, 0, 4, 8, 7, 0, 13, 0]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("rooms"))


@pytest.fixture(scope="module")
def rooms(source):
    return read_source(source)


@pytest.fixture(scope="module")
def written(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    return {name: (write_layout(name, folder / name, source), folder / name)[1] for name in LAYOUTS}


def rows(folder: Path, index: str, split: str) -> list[list[np.ndarray]]:
    return [[read(folder / path) for path in row] for row in json.loads((folder / index).read_text())[split]]


def classes(room: pack.Room, table: list[int], unknown: int) -> np.ndarray:
    return np.array([[unknown if c == 255 else table[c] for c in line] for line in room.labels.seg.tolist()])


# Which files


def test_counts_are_those_of_train_and_val_together_and_of_test(source, tmp_path):
    assert write_layout("nyuv2", tmp_path / "set", source) == {"train": 5, "test": 2}


@pytest.mark.parametrize(
    "layout, index, first, last",
    [
        (
            "nyuv2",
            "nyu_v2_3task.json",
            "nyu_train_val/training/{}/0001. img.png seg.png normal_mask.png depth.npy",
            "nyu_train_val/testing/{}/0007. img.png seg.png normal_mask.png depth.npy",
        ),
        (
            "cityscapes",
            "cityscape.json",
            "train/{}/0. image.npy depth.npy label_2.npy label_7.npy label_19.npy",
            "test/{}/1. image.npy depth.npy label_2.npy label_7.npy label_19.npy",
        ),
    ],
)
def test_index_names_every_file_in_the_published_order(written, layout, index, first, last):
    listed = json.loads((written[layout] / index).read_text())
    assert {split: len(found) for split, found in listed.items()} == {"train": 5, "test": 2}
    for row, expected in ((listed["train"][0], first), (listed["test"][-1], last)):
        path, *columns = expected.split()
        assert row == [path.format(column[:-4]) + column[-3:] for column in columns]
    named = {path for found in listed.values() for row in found for path in row}
    assert set(tree(written[layout])) == named | {index, "STAND-IN.md", "ATTRIBUTION.md"}


def test_taskonomys_index_names_the_old_paths_and_the_files_lie_at_the_new_ones(written):
    listed = json.loads((written["taskonomy"] / "taskonomy.json").read_text())
    domains = ["rgb", "segment_semantic", "normal", "depth_zbuffer", "keypoints2d", "edge_texture"]
    for split, count in {"train": 5, "test": 2}.items():
        assert len(listed[split]) == count
        for row in listed[split]:
            assert [path.split("/")[1] for path in row] == domains
            for path in row:
                building, domain, name = path.split("/")
                assert (written["taskonomy"] / domain / "taskonomy" / building / name).is_file()
    assert listed["train"][3][1] == "rooms_train/segment_semantic/point_3_view_0_domain_segmentsemantic.png"


@pytest.mark.parametrize(
    "layout, kinds", [("nyuv2-npy", "image label depth normal"), ("cityscapes-npy", "image label depth")]
)
def test_npy_layouts_number_each_split_from_zero(written, layout, kinds):
    expected = {
        f"{folder}/{kind}/{number}.npy"
        for folder, count in {"train": 5, "val": 2}.items()
        for kind in kinds.split()
        for number in range(count)
    }
    assert set(tree(written[layout])) == expected | {"STAND-IN.md", "ATTRIBUTION.md"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stand_in_says_what_it_is_and_who_made_it(written, source, layout):
    title = {"n": "NYU-v2", "c": "Cityscapes", "t": "Taskonomy"}[layout[0]]
    text = (written[layout] / "STAND-IN.md").read_text()
    assert text.startswith(f"# Rooms in {title} layout: rendered rooms, not {title}\n")
    assert "Attribution" in text and "5 training and 2 test pictures (24x32)" in text
    assert (written[layout] / "ATTRIBUTION.md").read_bytes() == (source / "ATTRIBUTION.md").read_bytes()


# What is in them


@pytest.mark.parametrize("split", ["train", "test"])
def test_nyuv2(written, rooms, split):
    for room, (img, seg, normal, depth) in zip(
        rooms[split], rows(written["nyuv2"], "nyu_v2_3task.json", split), strict=True
    ):
        assert img.dtype == np.uint8 and (img == room.picture).all()
        assert seg.dtype == np.uint8 and (seg == classes(room, NYU40, 255)).all()
        assert depth.dtype == np.float32 and depth.shape == (HEIGHT, WIDTH)
        np.testing.assert_allclose(depth, room.labels.depth, rtol=1e-6)
        unknown = normal.max(-1) == 255
        assert normal.dtype == np.uint8 and (unknown == (room.labels.normal == 0).all(-1)).all()
        assert (normal[unknown] == 255).all()
        # The file's axes are x right, y into the picture, z up.
        right, into, up = np.moveaxis(normal / 127.5 - 1, -1, 0)
        error = np.abs(np.stack([right, up, -into], -1) - room.labels.normal)[~unknown]
        ends = np.abs(room.labels.normal[~unknown]) > 0.99
        assert error[~ends].max() <= HALF_A_BYTE and error.max() <= 3 * HALF_A_BYTE


@pytest.mark.parametrize("split, folder", [("train", "train"), ("test", "val")])
def test_nyuv2_npy(written, rooms, split, folder):
    for number, room in enumerate(rooms[split]):
        image, label, depth, normal = (
            np.load(written["nyuv2-npy"] / folder / kind / f"{number}.npy")
            for kind in ("image", "label", "depth", "normal")
        )
        assert image.dtype == depth.dtype == normal.dtype == np.float32
        assert (np.round(image * 255) == room.picture).all() and image.max() <= 1
        assert (label == classes(room, NYU13, -1)).all()
        np.testing.assert_allclose(depth, room.labels.depth[..., None], rtol=1e-6)
        np.testing.assert_allclose(normal, room.labels.normal, atol=1e-6)


@pytest.mark.parametrize("split", ["train", "test"])
def test_cityscapes(written, rooms, split):
    found = rows(written["cityscapes"], "cityscape.json", split)
    for room, (image, depth, label2, label7, label19) in zip(rooms[split], found, strict=True):
        assert image.dtype == depth.dtype == np.float32
        assert image.shape == (HEIGHT, WIDTH, 3) and depth.shape == (HEIGHT, WIDTH, 1)
        assert (np.round(image * 255) == room.picture).all() and image.max() <= 1
        assert (label2 == classes(room, CITY2, -1)).all()
        assert (label7 == classes(room, CITY7, -1)).all()
        assert (label19 == classes(room, CITY19, -1)).all()
        known = room.labels.depth > 0
        assert ((depth[..., 0] > 3e-5) == known).all()
        np.testing.assert_allclose(0.1 / depth[known, 0], room.labels.depth[known], rtol=1e-6)


@pytest.mark.parametrize("split, folder", [("train", "train"), ("test", "val")])
def test_cityscapes_npy_is_the_other_layout_with_seven_classes(written, rooms, split, folder):
    other = rows(written["cityscapes"], "cityscape.json", split)
    for number in range(len(rooms[split])):
        for kind, column in {"image": 0, "depth": 1, "label": 3}.items():
            found = np.load(written["cityscapes-npy"] / folder / kind / f"{number}.npy")
            assert found.dtype == other[number][column].dtype and (found == other[number][column]).all()


def taskonomy_rows(folder: Path, split: str) -> list[list[np.ndarray]]:
    listed = json.loads((folder / "taskonomy.json").read_text())[split]
    swapped = [[re.sub(r"^([^/]+)/([^/]+)/", r"\2/taskonomy/\1/", path) for path in row] for row in listed]
    return [[read(folder / path) for path in row] for row in swapped]


@pytest.mark.parametrize("split", ["train", "test"])
def test_taskonomy(written, rooms, split):
    found = taskonomy_rows(written["taskonomy"], split)
    for room, (rgb, seg, normal, depth, keypoint, edge) in zip(rooms[split], found, strict=True):
        assert rgb.dtype == seg.dtype == normal.dtype == np.uint8
        assert depth.dtype == keypoint.dtype == edge.dtype == np.uint16
        assert (rgb == room.picture).all()
        assert (seg == classes(room, [number + 1 for number in TASKONOMY], 0)).all()
        known = room.labels.depth > 0
        assert ((depth < 64500) == known).all() and (depth[~known] == 65535).all()
        assert np.abs(depth[known] / 512 - room.labels.depth[known]).max() <= 0.5 / 512 + 1e-6
        assert np.abs(normal / 127.5 - 1 - room.labels.normal)[known].max() <= HALF_A_BYTE
        for raw, full, response in (
            (keypoint, 0.005, keypoint_response(room.picture)),
            (edge, 0.08, edge_strength(room.picture)),
        ):
            again = np.clip(raw / 2**16, 0, full) / full
            assert np.abs(again - response).max() <= 0.5 / (full * 2**16) + 1e-6
            assert again.max() <= 1 and (again[response == 1] == 1).all()


def test_taskonomys_weights_are_inverse_to_the_train_pictures_classes_and_one_on_average(written):
    weights = np.load(written["taskonomy"] / "semseg_prior_factor.npy")
    seen = np.concatenate([row[1].ravel() for row in taskonomy_rows(written["taskonomy"], "train")])
    share = np.bincount(seen[seen > 0] - 1, minlength=17) / (seen > 0).sum()
    assert weights.shape == (17,) and weights.dtype == np.float64 and (weights > 0).all()
    assert (share * weights).sum() == pytest.approx(1)
    assert (np.diff(weights[np.argsort(share)]) <= 1e-12).all()
    assert np.ptp(weights * (share + 1 / 17)) < 1e-12


@pytest.mark.data
def test_weights_follow_the_rule_of_the_published_file():
    """The file's 17 numbers imply frequencies; these give the numbers back."""
    path = ROOT.parent / "shared/data/semseg_prior_factor.npy"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    published = np.load(path)
    share = 2 / published / (1 / published).sum() - 1 / 17
    assert share.min() > -1e-12 and share.sum() == pytest.approx(1)
    np.testing.assert_allclose(encode.prior_factor(share), published, rtol=1e-9)


def test_weights_of_no_pixels_are_refused():
    with pytest.raises(ValueError, match="no pixel"):
        encode.prior_factor(np.zeros(17))


# Class maps


def test_every_room_class_has_a_class_and_only_what_has_no_fitting_one_is_shared():
    shared = {
        "nyu40": ({"plant", "other"},),
        "nyu13": ({"lamp", "plant", "bathroom", "other"}, {"cabinet", "appliance"}),
        "cityscapes19": (),
        "taskonomy17": ({"wall", "floor", "ceiling", "cabinet", "lamp", "door_window", "other"},),
    }
    for name, groups in shared.items():
        table = getattr(encode, name)()
        assert len(table) == len(CLASSES)
        together = {frozenset(c for c, n in zip(CLASSES, table, strict=True) if n == number) for number in table}
        assert {group for group in together if len(group) > 1} == {frozenset(group) for group in groups}


def test_the_document_holds_the_class_maps():
    text = (ROOT / "docs/stand-ins.md").read_text()
    for room, (nyu, city, taskonomy) in encode.CLASS_MAP.items():
        numbers = encode.NYU40.index(nyu), encode.CITYSCAPES19.index(city), encode.TASKONOMY17.index(taskonomy)
        small = encode.NYU13_OF_40[nyu]
        category = encode.CITYSCAPES7[encode.cityscapes7()[CLASSES.index(room)]]
        line = (
            f"| {room} | {numbers[0]} {nyu} | {encode.NYU13.index(small)} {small} | {numbers[1]} {city} "
            f"| {encode.CITYSCAPES7.index(category)} {category} | {encode.cityscapes2()[CLASSES.index(room)]} "
            f"| {numbers[2]} {taskonomy} |"
        )
        assert line in text


def test_a_class_out_of_range_is_named():
    with pytest.raises(ValueError, match="class 15 of a room; allowed: 0 to 14, 255"):
        encode.as_classes(np.array([[15]], np.uint8), NYU40, 255, np.uint8)


# Other sizes


@pytest.mark.parametrize("size", [(48, 64), (12, 16), (24, 48), (40, 32), (256, 512)])
def test_zoom_takes_the_nearest_pixel_of_the_middle_scaled_alike_both_ways(rooms, size):
    room = rooms["test"][0]
    again = encode.zoom(room, size)
    assert again.picture.shape == (*size, 3) and again.picture.dtype == np.uint8
    factor = max(size[0] / HEIGHT, size[1] / WIDTH)
    for y in range(0, size[0], 5):
        for x in range(0, size[1], 7):
            row = int((y + 0.5 - size[0] / 2) / factor + HEIGHT / 2)
            column = int((x + 0.5 - size[1] / 2) / factor + WIDTH / 2)
            assert again.labels.seg[y, x] == room.labels.seg[row, column]
            assert again.labels.depth[y, x] == room.labels.depth[row, column]
            assert (again.labels.normal[y, x] == room.labels.normal[row, column]).all()


def test_zoom_to_the_own_size_changes_nothing(rooms):
    assert encode.zoom(rooms["test"][0], (HEIGHT, WIDTH)) is rooms["test"][0]


def test_size_is_that_of_every_file(source, tmp_path):
    assert (
        main(["layout", "--layout", "taskonomy", "--set", str(source), "--out", str(tmp_path / "a"), "--size", "32x32"])
        == 0
    )
    for row in taskonomy_rows(tmp_path / "a", "test"):
        assert all(array.shape[:2] == (32, 32) for array in row)
        assert np.abs(row[5] / 5242.88 - edge_strength(row[0])).max() < 1e-3
