"""Multi-Fashion+MNIST: a garment and a digit in one picture, checked pixel by pixel."""

from pathlib import Path

import numpy as np
import pytest
import torch
from idx_files import write_sets

from cut.data.batch import check_batch, picture
from cut.data.multifashion import MultiFashion, overlay, pairs
from experiments.run import parsed

CONFIGS = Path(__file__).parents[2] / "configs"
SETS = {"garment": "fashion-mnist", "digit": "mnist"}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    return root, write_sets(root)


def module(root, **options):
    data = MultiFashion(root, batch_size=8, **options)
    data.setup()
    return data


def shown(data, split, index):
    """A picture as bytes, with its labels."""
    item = data.splits[split][0, index]
    pixels = picture(item["image"], data.mean, data.std)
    assert (pixels == pixels[:, :, :1]).all(), "grey in three channels"
    return pixels[:, :, 0], int(item["garment"]), int(item["digit"])


def test_every_pixel_is_the_brighter_of_the_two_shifted_pictures():
    random = np.random.default_rng(0)
    garment, digit = random.integers(0, 256, (2, 28, 28), dtype=np.uint8)
    found = overlay(garment, digit)
    assert found.shape == (36, 36) and found.dtype == np.uint8
    for y in range(36):
        for x in range(36):
            first = garment[y, x] if y < 28 and x < 28 else 0
            second = digit[y - 8, x - 8] if y >= 8 and x >= 8 else 0
            assert found[y, x] == max(first, second)


def test_labels_are_those_of_the_two_pictures_and_no_picture_is_in_two_places(sets):
    """Each picture is found again among all pairs of the files' pictures by its two own corners."""
    root, written = sets
    data, used = module(root), {"garment": [], "digit": []}
    corners = {"garment": np.s_[:8, :28], "digit": np.s_[-8:, -28:]}  # no other picture reaches there
    inner = {"garment": np.s_[:8, :], "digit": np.s_[-8:, :]}
    for split in ("train", "val", "test"):
        file = "test" if split == "test" else "train"
        for index in range(len(data.splits[split])):
            pixels, *labels = shown(data, split, index)
            originals = []
            for task, label in zip(SETS, labels, strict=True):
                every, classes = written[SETS[task]][file]
                (place,) = [i for i, p in enumerate(every) if (p[inner[task]] == pixels[corners[task]]).all()]
                assert classes[place] == label
                originals.append(every[place])
                used[task].append((file, place))
            assert np.array_equal(pixels, overlay(*originals))
    assert all(len(set(places)) == len(places) for places in used.values())


def test_the_same_pairs_every_time(sets):
    root, _ = sets
    first, again, other = module(root), module(root, seed=3), module(root, pairing=1)
    for split in ("train", "val", "test"):
        for index in range(len(first.splits[split])):
            mine = first.splits[split][0, index]
            theirs = again.splits[split][5, index]
            assert all(torch.equal(mine[k], theirs[k]) for k in mine), "order and epoch change no picture"
    assert first.description["hash"] == again.description["hash"] != other.description["hash"]
    assert not all(
        torch.equal(first.splits["train"][0, i]["image"], other.splits["train"][0, i]["image"]) for i in (0, 1, 2)
    )
    assert first.description["pairing"] == 0 and first.description["splits"]["test"] == 40


def test_the_pairs_of_a_seed_are_fixed_for_ever():
    assert pairs(4, 6, (0, 0)).tolist() == [[0, 4], [2, 3], [3, 1], [1, 5]]
    found = pairs(50, 40, (7, 1))
    assert found.shape == (40, 2) and all(len(set(column)) == 40 for column in found.T.tolist())


def test_batches_are_as_documented(sets):
    root, _ = sets
    data = module(root, side=48, held=9, subset=24)
    for loader, count in ((data.train_dataloader(), 24), (data.val_dataloader(), 9), (data.test_dataloader(), 9)):
        batches = list(loader)
        assert sum(len(b["image"]) for b in batches) == count
        for batch in batches:
            assert batch["image"].shape[1:] == (3, 48, 48)
            check_batch(batch, data.tasks)
    assert [(t.name, t.kind, t.channels, t.dense) for t in data.tasks] == [
        (name, "classification", 10, False) for name in SETS
    ]
    assert {"image", "digit"} == set(MultiFashion(root, tasks=["digit"]).score_batches(1, 2)[0])


def test_a_changed_picture_changes_the_hash(sets, tmp_path):
    root, _ = sets
    write_sets(tmp_path / "new")
    path = tmp_path / "new/mnist/t10k-images-idx3-ubyte"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert module(root).description["hash"] != module(tmp_path / "new").description["hash"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["garment", "shoe"]}, "no task 'shoe'; allowed: garment, digit"),
        ({"side": 0}, "side 0; allowed: at least 1"),
        ({"held": 0}, "held 0; allowed: None or at least 1"),
        ({"pairing": -1}, "pairing -1; allowed: 0 to 4294967295"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        MultiFashion(**options)


def test_without_the_sets_it_says_how_to_get_them(tmp_path):
    with pytest.raises(ValueError, match="make fashion-mnist"):
        MultiFashion(tmp_path).setup()


@pytest.mark.parametrize(
    ("name", "outputs"), [("multifashion", {"garment": 10, "digit": 10}), ("labelgroups", {"fashion-0": 3})]
)
def test_the_config_builds_a_model_for_its_tasks_before_there_are_pictures(name, outputs, tmp_path):
    parts = ("trainer/default", f"data/{name}", "model/small_cnn", "pruning/cut")
    configs = [part for n in parts for part in ("--config", str(CONFIGS / f"{n}.yaml"))]
    cli = parsed([*configs, f"--out={tmp_path}", f"--data.init_args.root={tmp_path}"])
    found = cli.model.eval()(torch.zeros(2, 3, 36, 36))
    assert {task: tuple(output.shape) for task, output in found.items()} == {t: (2, n) for t, n in outputs.items()}
