"""The Rooms loader against the pictures on disk, read here with Pillow and NumPy."""

import io
import json
import shutil
import zipfile
from pathlib import Path

import jsonargparse
import numpy as np
import pytest
import torch
from PIL import Image
from rooms_files import CLASSES, COUNTS, SIZE, TYPES, png, write_rooms

from cut.data.augmentation import Augmentation
from cut.data.base import MultiTaskData
from cut.data.batch import check_batch, picture
from cut.data.filters import FILTERS
from cut.data.rooms import EMBEDDED, TASKS, Rooms


def on_disk(root: Path, split: str, number: int) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(root / f"{split}-{number // 4:03d}.zip") as archive:
        return {
            suffix: np.array(Image.open(io.BytesIO(archive.read(f"{split}-{number:05d}.{suffix}"))))
            for suffix in ("jpg", "seg.png", "normal.png", "depth.png")
        }


def unit(pixels: np.ndarray) -> np.ndarray:
    """[3, H, W] from a picture of normals."""
    vectors = pixels.astype(np.float64) / 255 * 2 - 1
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    vectors[(pixels == 128).all(-1)] = 0
    return np.moveaxis(vectors, -1, 0)


def test_labels_are_those_on_disk(rooms_root: Path) -> None:
    data = Rooms(rooms_root, batch_size=2)
    data.setup()
    number = 0
    for batch in data.val_dataloader():
        check_batch(batch, data.tasks)
        for i in range(len(batch["image"])):
            files = on_disk(rooms_root, "val", number)
            assert (picture(batch["image"][i], data.mean, data.std) == files["jpg"]).all()
            assert (batch["seg"][i].numpy() == files["seg.png"]).all()
            np.testing.assert_allclose(batch["normal"][i].numpy(), unit(files["normal.png"]), atol=1e-6)
            np.testing.assert_allclose(batch["depth"][i, 0].numpy(), files["depth.png"] / 1000, rtol=1e-6)
            for key, filter_ in FILTERS.items():
                np.testing.assert_allclose(batch[key][i, 0].numpy(), filter_(files["jpg"]), atol=1e-5)
            assert batch["scene"][i] == number % len(TYPES)
            number += 1
    assert number == COUNTS["val"]


def test_unknown_pixels_reach_no_loss_and_no_metric(rooms_root: Path) -> None:
    data = Rooms(rooms_root)
    (batch,) = data.score_batches(1, batch_size=4)
    assert (batch["seg"][:, 0] == 255).all()
    assert (batch["normal"][:, :, 0] == 0).all() and (batch["depth"][:, :, 0] == 0).all()
    for task in data.tasks[:3]:
        outputs = [torch.randn(4, task.channels, *SIZE) for _ in range(2)]
        outputs[1][:, :, 1:] = outputs[0][:, :, 1:]
        losses = [task.loss(output, batch) for output in outputs]
        assert losses[0] == losses[1] and losses[0] > 0
        for family in ("corrected", "legacy"):
            values = []
            for output in outputs:
                metrics = task.metrics(family)
                metrics.update(output, batch[task.name])
                values.append(metrics.compute())
            assert values[0] == values[1]


def test_mirrored_pictures_have_mirrored_labels(rooms_root: Path) -> None:
    data = Rooms(rooms_root, batch_size=1)
    data.setup()
    mirrored = 0
    for epoch in range(4):
        for index in range(COUNTS["train"]):
            item, plain = data.splits["train"][epoch, index], data.splits["plain"][0, index]
            flipped = {key: label.flip(-1) if label.ndim else label for key, label in plain.items()}
            flipped["normal"] *= torch.tensor([-1.0, 1, 1]).view(3, 1, 1)
            expected = plain if torch.equal(item["image"], plain["image"]) else flipped
            mirrored += expected is flipped
            for key, label in item.items():
                assert torch.equal(label, expected[key]), key
    assert 5 < mirrored < 23


def test_augmentation_is_a_function_of_seed_epoch_and_index(rooms_root: Path) -> None:
    augmentation = Augmentation(scale=(1.0, 1.5), crop=(16, 20))

    def items(seed: int, epoch: int) -> list[torch.Tensor]:
        data = Rooms(rooms_root, seed=seed, augmentation=augmentation)
        data.setup()
        order = range(COUNTS["train"]) if seed else reversed(range(COUNTS["train"]))
        found = {index: data.splits["train"][epoch, index] for index in order}
        check_batch({key: value[None] for key, value in found[0].items()}, data.tasks)
        return [found[index]["image"] for index in sorted(found)]

    for seed in (0, 1):
        assert all(torch.equal(a, b) for a, b in zip(items(seed, 2), items(seed, 2), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(items(1, 2), items(1, 3), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(items(1, 2), items(2, 2), strict=True))


def test_workers_give_the_same_batches(rooms_root: Path) -> None:
    found = []
    for num_workers in (0, 2):
        data = Rooms(rooms_root, batch_size=3, num_workers=num_workers)
        data.setup()
        loader = data.train_dataloader()
        loader.sampler.set_epoch(1)
        found.append(list(loader))
    for one, two in zip(*found, strict=True):
        assert all(torch.equal(one[key], two[key]) for key in TASKS)


def test_only_the_tasks_asked_for_are_read(rooms_root: Path) -> None:
    data = Rooms(rooms_root, tasks=("depth", "scene"))
    (batch,) = data.score_batches(1, batch_size=2)
    assert set(batch) == {"image", "depth", "scene"}
    assert [task.name for task in data.tasks] == ["depth", "scene"]
    assert data.tasks[1].classes == tuple(TYPES)
    assert Rooms(rooms_root, tasks=("seg",)).tasks[0].classes == tuple(CLASSES)


def test_description_tells_sets_apart(rooms_root: Path, tmp_path: Path) -> None:
    found = Rooms(rooms_root).description
    assert found["name"] == "rooms" and found["splits"] == COUNTS and found["size"] == list(SIZE)
    json.dumps(found)
    other = write_rooms(tmp_path, train_00000={"seg.png": png(np.ones(SIZE, np.uint8))})
    assert Rooms(other).description["hash"] != found["hash"]


def test_subset_limits_training_only(rooms_root: Path) -> None:
    assert Rooms(rooms_root, subset=2).description["splits"] == {**COUNTS, "train": 2}


def test_the_embedded_set_is_whole() -> None:
    data = Rooms(batch_size=8, subset=8)
    data.setup()
    for loader in (data.train_dataloader(), data.test_dataloader()):
        batch = next(iter(loader))
        check_batch(batch, data.tasks)
        assert 0.05 < batch["edge"].mean() < 0.3 and 0.05 < batch["keypoint"].mean() < 0.3
        assert 0.5 < batch["depth"][batch["depth"] > 0].median() < 10


def test_test_rooms_hold_other_furniture() -> None:
    models: dict[str, set[str]] = {"train": set(), "test": set()}
    for split, found in models.items():
        for path in EMBEDDED.glob(f"{split}-*.zip"):
            with zipfile.ZipFile(path) as archive:
                for room in json.loads(archive.read("index.json"))["rooms"]:
                    found.update(room["models"])
    assert models["train"] and models["test"] and not models["train"] & models["test"]


@pytest.fixture
def copy(rooms_root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(rooms_root, tmp_path / "copy"))


def test_missing_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"meta.json is missing"):
        Rooms(tmp_path / "nowhere")


@pytest.mark.parametrize("damage", ["missing", "truncated", "changed"])
def test_damaged_shard_is_named_before_training(copy: Path, damage: str) -> None:
    path = copy / "train-001.zip"
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[:-100])
    else:
        content[200] ^= 1
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-001.zip is (missing|damaged)"):
        Rooms(copy).setup("fit")


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"classes": 3, "room_types": [], "size": [4, 4], "splits": {}, "files": {}}']
)
def test_damaged_meta_is_named(copy: Path, text: str) -> None:
    (copy / "meta.json").write_text(text)
    with pytest.raises(ValueError, match=r"meta.json is damaged"):
        Rooms(copy)


def test_meta_cannot_name_files_elsewhere(copy: Path) -> None:
    meta = json.loads((copy / "meta.json").read_text())
    meta["files"] = {f"../{name}": digest for name, digest in meta["files"].items()}
    (copy / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=r"meta.json is damaged"):
        Rooms(copy)


def test_a_missing_room_is_noticed(copy: Path) -> None:
    meta = json.loads((copy / "meta.json").read_text())
    meta["splits"]["val"] = 4
    (copy / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=r"hold 3 rooms of split 'val', not 4"):
        Rooms(copy).setup()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"seg.png": png(np.full(SIZE, 9, np.uint8))}, r"seg.png has class 9; allowed: 0 to 3"),
        ({"seg.png": png(np.zeros((8, 8), np.uint8))}, r"seg.png is 8x8, not 24x32"),
        ({"depth.png": png(np.zeros((*SIZE, 3), np.uint8))}, r"depth.png is uint8 \[24, 32, 3\]"),
        ({"normal.png": b"no picture"}, "cannot identify"),
        ({"jpg": png(np.zeros(SIZE, np.uint8))}, r"jpg is uint8 \[24, 32\]"),
    ],
)
def test_unreadable_room_is_named(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    data = Rooms(write_rooms(tmp_path, val_00001=files), batch_size=1)
    data.setup()
    with pytest.raises(ValueError, match=rf"room val-00001 in .*val-000.zip cannot be read: .*{message}"):
        list(data.val_dataloader())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": ("seg", "pose")}, "Rooms has no task 'pose'; allowed: seg, normal"),
        ({"tasks": ("seg", "seg")}, "each once"),
        ({"augmentation": Augmentation(crop=(25, 32))}, "crop 25x32 is larger than pictures of 24x32"),
    ],
)
def test_refuses(rooms_root: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rooms(rooms_root, **arguments)


@pytest.mark.parametrize("name", ["rooms", "synthetic"])
def test_configs_build(name: str, rooms_root: Path) -> None:
    path = Path(__file__).parents[2] / "configs" / "data" / f"{name}.yaml"
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(MultiTaskData, "data")
    arguments = [f"--config={path}", "--data.init_args.seed=3"]
    if name == "rooms":
        arguments += [f"--data.init_args.root={rooms_root}", "--data.init_args.augmentation.crop=[16,16]"]
    parsed = parser.parse_args(arguments)
    again = parser.parse_string(parser.dump(parsed))
    data = parser.instantiate(again).data
    assert data.seed == 3
    check_batch(data.score_batches(1)[0], data.tasks)
    assert name != "rooms" or data.augmentation.crop == (16, 16)
