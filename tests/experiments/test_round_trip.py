"""Rooms, written in every published layout and read by the loader of the published set, are the rooms again."""

import numpy as np
import pytest

from cut.data.batch import check_batch, picture
from cut.data.cityscapes import Cityscapes
from cut.data.filters import edge_strength, keypoint_response
from cut.data.nyuv2 import NYUv2
from cut.data.taskonomy import Taskonomy
from experiments.rooms import encode
from experiments.rooms.layouts import write_layout
from tests.experiments.layout_rooms import read_source, write_source

# Enough train rooms for a validation part of about a tenth.
COUNTS = {"train": 30, "val": 4, "test": 5}
LOADERS = {
    "nyuv2": (NYUv2, encode.nyu40),
    "nyuv2-npy": (NYUv2, encode.nyu13),
    "cityscapes": (Cityscapes, encode.cityscapes19),
    "cityscapes-npy": (Cityscapes, encode.cityscapes7),
    "taskonomy": (Taskonomy, encode.taskonomy17),
}
# Largest error of a normal's component before it is brought to length 1, where a layout has 8 bits; values of
# 255 become 254 in AdaShare's NYU-v2.
NORMAL = {"nyuv2": 1.5 / 127.5, "nyuv2-npy": 1e-6, "taskonomy": 0.5 / 127.5}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("rooms"), COUNTS)


@pytest.fixture(scope="module", params=LOADERS)
def loaded(request, source, tmp_path_factory):
    """A layout's name, its data module, and each room with what the loader gives for it, by split."""
    folder = tmp_path_factory.mktemp(request.param) / "set"
    write_layout(request.param, folder, source)
    data = LOADERS[request.param][0](folder)
    data.setup()
    found, rooms = {}, read_source(source)
    for split, parts in {"train": ("plain", "val"), "test": ("test",)}.items():
        items = [data.splits[part][0, index] for part in parts for index in range(len(data.splits[part]))]
        by_picture = {picture(item["image"], data.mean, data.std).tobytes(): item for item in items}
        assert len(by_picture) == len(items) == len(rooms[split])
        found[split] = [(room, by_picture[room.picture.tobytes()]) for room in rooms[split]]
    return request.param, data, [pair for pairs in found.values() for pair in pairs]


def test_no_picture_is_lost_and_the_batches_are_as_documented(loaded):
    _, data, pairs = loaded
    assert len(pairs) == sum(COUNTS.values()) and len(data.splits["test"]) == COUNTS["test"]
    for batch in (*data.val_dataloader(), *data.test_dataloader(), *data.score_batches(1, 4)):
        check_batch(batch, data.tasks)


def test_segmentation_is_the_rooms_in_the_sets_classes(loaded):
    layout, data, pairs = loaded
    table = np.full(256, 255)
    table[:15] = LOADERS[layout][1]()
    (task,) = [task for task in data.tasks if task.name == "seg"]
    assert len(task.classes) > table[:15].max()
    for room, item in pairs:
        assert (item["seg"].numpy() == table[room.labels.seg]).all()


def test_normals_are_the_rooms_in_the_camera_frame(loaded):
    layout, data, pairs = loaded
    if "normal" not in {task.name for task in data.tasks}:
        assert layout.startswith("cityscapes")
        return
    for room, item in pairs:
        normal = item["normal"].permute(1, 2, 0).numpy()
        unknown = (room.labels.normal == 0).all(-1)
        assert (normal[unknown] == 0).all()
        error = np.linalg.norm(normal - room.labels.normal, axis=-1)
        assert error.max() <= np.sqrt(3) * NORMAL[layout] + 1e-6
        # Only a component of 1 loses more than half a level.
        inner = (np.abs(room.labels.normal) < 0.98).all(-1)
        assert error[inner].max() <= np.sqrt(3) * min(NORMAL[layout], 0.5 / 127.5) + 1e-6


def test_depth_is_the_rooms(loaded):
    layout, _, pairs = loaded
    for room, item in pairs:
        depth, true = item["depth"][0].numpy(), room.labels.depth
        known = true > 0
        assert ((depth > 0) == known).all() and (depth[~known] == 0).all()
        if layout.startswith("cityscapes"):
            np.testing.assert_allclose(0.1 / depth[known], true[known], rtol=1e-6)
        else:
            atol = 0.5 / 512 if layout == "taskonomy" else 0
            np.testing.assert_allclose(depth[known], true[known], rtol=1e-6, atol=atol)


def test_taskonomys_responses_are_the_pictures(loaded):
    layout, _, pairs = loaded
    for room, item in pairs if layout == "taskonomy" else []:
        keypoint, edge = (item[name][0].numpy() for name in ("keypoint", "edge"))
        assert np.abs(keypoint - keypoint_response(room.picture)).max() <= 0.5 / (0.005 * 65536) + 1e-6
        assert np.abs(edge - edge_strength(room.picture)).max() <= 0.5 / (0.08 * 65536) + 1e-6
