"""Tiny-Taskonomy: files decoded once more, index paths, sizes, class weights, the published protocol."""

from pathlib import Path

import numpy as np
import pytest
import torch
from layout_files import COUNTS, file_of, load, read_all, write, write_index, write_set
from PIL import Image

from cut.data.augmentation import Augmentation
from cut.data.batch import picture
from cut.data.files import read_index
from cut.data.taskonomy import CLASSES, located, shrunk

KEYS = ("rgb", "segment_semantic", "normal", "depth_zbuffer", "keypoints2d", "edge_texture")


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return write_set("taskonomy", tmp_path_factory.mktemp("taskonomy"))


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return write_set("taskonomy", tmp_path)


def opened(root: Path, number: int) -> list[np.ndarray]:
    return [np.array(Image.open(file_of("taskonomy", root, "test", number, key))) for key in KEYS]


@pytest.mark.parametrize("legacy", [False, True])
def test_files_are_decoded(written: Path, legacy: bool) -> None:
    data = load("taskonomy", written, legacy=legacy)
    assert [t.name for t in data.tasks] == ["seg", "normal", "depth", "keypoint", "edge"]
    assert data.tasks[0].classes == CLASSES and len(set(CLASSES)) == 17
    for number in range(COUNTS["test"]):
        image, stored, colours, raw, keypoint, edge = opened(written, number)
        item = {k: v.numpy() for k, v in data.splits["test"][0, number].items()}
        np.testing.assert_array_equal(item["seg"], np.where(stored == 0, 255, stored.astype(int) - 1))
        vectors = colours / 255 * 2 - 1
        vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
        vectors[(colours == 128).all(-1)] = 0
        np.testing.assert_allclose(item["normal"].transpose(1, 2, 0), vectors, atol=1e-6)
        depth = np.log(1 + raw.astype(float)) / np.log(2**16) if legacy else raw / 512
        np.testing.assert_allclose(item["depth"][0], np.where(raw < 64500, depth, 0), rtol=1e-5)
        for name, array, limit in (("keypoint", keypoint, 0.005), ("edge", edge, 0.08)):
            response = np.minimum(array / 2**16, limit) / limit
            np.testing.assert_allclose(item[name][0], response * 2 - 1 if legacy else response, atol=1e-6)
            assert response.max() == 1 and response.min() < 0.01
        if legacy:
            blue_first = image[..., ::-1] - np.array([104.00698793, 116.66876762, 122.67891434])
            np.testing.assert_allclose(item["image"].transpose(1, 2, 0), blue_first, atol=1e-3)
        else:
            shown = picture(torch.from_numpy(item["image"]), data.mean, data.std)
            np.testing.assert_array_equal(shown, image)


def test_normals_of_the_published_protocol_are_decoded_and_change_sign_in_a_mirror(written: Path) -> None:
    splits = [
        load("taskonomy", written, legacy=True, augmentation=Augmentation(mirror=m)).splits["train"] for m in (0, 1)
    ]
    seen = 0
    for epoch in range(8):
        plain, found = (split[epoch, 0] for split in splits)
        if not torch.equal(plain["image"], found["image"]):
            seen += 1
            plain["normal"][0] *= -1
            assert all(torch.equal(found[k], plain[k].flip(-1)) for k in found)
    assert seen > 1
    label = plain["normal"][None]
    metric = load("taskonomy", written, legacy=True).tasks[1].metrics("legacy")["mean"]
    metric.update(-label, label)
    assert float(metric.compute()) == pytest.approx(180, abs=0.1), "they are true normals, their angles true angles"


def test_the_ranges_of_the_published_protocol_are_its_tasks(written: Path) -> None:
    data = load("taskonomy", written, legacy=True)
    item = {k: v[None] for k, v in data.splits["test"][0, 0].items()}
    for task in data.tasks:
        assert task.loss(torch.zeros(1, task.channels, 24, 32), item).isfinite()
    assert 0.5 < item["depth"].max() <= 1 and item["edge"].min() < -0.9
    with pytest.raises(ValueError, match=r"out of range: -1 to 1.*'edge'"):
        data.tasks[-1].loss(torch.zeros(1, 1, 24, 32), item | {"edge": item["edge"] * 1.5})


@pytest.mark.parametrize("factor", [0.5, 1.5])
@pytest.mark.parametrize("legacy", [False, True])
def test_dividing_depth_keeps_unknown_what_is_and_wraps_nothing(own: Path, factor: float, legacy: bool) -> None:
    raw = np.array([[1, 300, 40000, 64499, 64500, 65535] * 4] * 24, np.uint16)
    for number in range(COUNTS["train"]):
        for key in KEYS:
            path = file_of("taskonomy", own, "train", number, key)
            array = np.array(Image.open(path))[:, :24]
            write(path, raw if key == "depth_zbuffer" else array)
    zoom = Augmentation(mirror=False, scale=(factor, factor), crop=(36, 36), pad=True, divide_depth=True)
    found = load("taskonomy", own, augmentation=zoom, legacy=legacy).splits["train"][0, 0]["depth"][0, 0]
    columns = ((np.arange(round(24 * factor)) + 0.5) / factor).astype(int)
    nearer = raw[0, columns].astype(float) / factor
    depth = np.log1p(nearer) / np.log(2**16) if legacy else nearer / 512
    wanted = np.where(raw[0, columns] < 64500, depth, 0)
    np.testing.assert_allclose(found[: len(wanted)], wanted[:36], rtol=1e-5)
    assert (found[len(wanted) :] == 0).all()


# --- the index ---


def test_outdated_folders_are_swapped_and_paths_that_exist_are_taken_as_written(own: Path) -> None:
    index = read_index(own / "taskonomy.json", 6)
    assert index["test"][0][0] == "oyens/rgb/p_0.png"
    before = load("taskonomy", own).splits["test"][0, 0]
    rows = [[file_of("taskonomy", own, "test", n, k).relative_to(own).as_posix() for k in KEYS] for n in range(3)]
    write_index("taskonomy", own, index | {"test": rows})
    after = load("taskonomy", own).splits["test"][0, 0]
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_located() -> None:
    assert located(Path("r"), "a/rgb/x/y.png") == Path("r/rgb/taskonomy/a/x/y.png")
    assert located(Path("r"), "rgb/y.png") == Path("r/rgb/y.png")
    with pytest.raises(ValueError, match="outside"):
        located(Path("r"), "../rgb/a/y.png")


# --- sizes ---


@pytest.mark.parametrize("size", [(512, 512), (300, 260), (256, 256), (257, 200)])
def test_larger_pictures_become_256_by_the_nearest_pixel(size: tuple[int, int]) -> None:
    array = np.arange(size[0] * size[1], dtype=np.int32).reshape(size)
    resized = Image.fromarray(array).resize((256, 256), Image.Resampling.NEAREST)
    np.testing.assert_array_equal(shrunk(array), np.array(resized))


def test_smaller_pictures_stay(written: Path) -> None:
    assert load("taskonomy", written).splits["test"][0, 0]["image"].shape == (3, 24, 32)


# --- class weights ---


def test_the_loss_is_weighted_by_the_sets_class_weights(written: Path) -> None:
    data = load("taskonomy", written)
    item = {k: v[None] for k, v in data.splits["test"][0, 0].items()}
    logits = torch.randn(1, 17, 24, 32, generator=torch.Generator().manual_seed(1))
    weights = np.load(written / "semseg_prior_factor.npy")
    total = weight = 0.0
    for y, x in np.ndindex(24, 32):
        label = int(item["seg"][0, y, x])
        if label != 255:
            scores = logits[0, :, y, x].double().numpy()
            total += weights[label] * (np.log(np.exp(scores).sum()) - scores[label])
            weight += weights[label]
    assert float(data.tasks[0].loss(logits, item)) == pytest.approx(total / weight, rel=1e-5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing: Taskonomy's class weights"),
        (b"\x93NUMPY", "is damaged"),
        (np.ones(16), "holds 16 numbers; expected 17 positive ones"),
        (np.zeros(17), "expected 17 positive ones"),
        (np.full(17, np.nan), "expected 17 positive ones"),
        (np.full(17, "a"), "expected numbers"),
    ],
)
def test_class_weights_that_are_none_are_named(own: Path, content: np.ndarray | bytes | None, message: str) -> None:
    path = own / "semseg_prior_factor.npy"
    path.unlink()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    with pytest.raises(ValueError, match=message) as error:
        load("taskonomy", own)
    assert str(path) in str(error.value)
    read_all(load("taskonomy", own, tasks=["normal", "edge"]))  # which need none


@pytest.mark.parametrize(
    ("key", "array", "message"),
    [
        ("segment_semantic", np.full((24, 32), 18, np.uint8), "class 17; allowed: 0 to 16"),
        ("segment_semantic", np.full((24, 32), 40000, np.uint16), "class 39999; allowed: 0 to 16"),
        ("depth_zbuffer", np.full((24, 32), 9, np.uint8), "8 bits; expected 16"),
        ("edge_texture", np.full((24, 32), 9, np.uint8), "8 bits; expected 16"),
        ("normal", np.full((24, 32), 9, np.uint8), r"mode L; expected \[H, W, 3\]"),
        ("keypoints2d", np.full((24, 32, 3), 9, np.uint8), r"mode RGB; expected \[H, W\]"),
    ],
)
def test_values_that_cannot_be_are_named(own: Path, key: str, array: np.ndarray, message: str) -> None:
    path = write(file_of("taskonomy", own, "test", 1, key), array)
    with pytest.raises(ValueError, match=message) as error:
        read_all(load("taskonomy", own))
    assert str(path) in str(error.value)
