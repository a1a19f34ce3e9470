"""NYU-v2: both layouts decoded once more, the published protocol, and the four real pictures where they are present."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from layout_files import COUNTS, file_of, load, read_all, write, write_index, write_set
from PIL import Image

from cut.data.augmentation import Augmentation
from cut.data.batch import check_batch, picture
from cut.data.nyuv2 import CLASSES13, CLASSES40, NYUv2

SAMPLES = Path(os.environ.get("CUT_NYUV2_SAMPLES", Path(__file__).parents[3] / "shared/data/nyuv2_samples"))
NAMES = ("0061", "0295", "0774", "1314")


@pytest.fixture(scope="module")
def adashare(tmp_path_factory) -> Path:
    return write_set("nyuv2", tmp_path_factory.mktemp("nyuv2"))


@pytest.fixture(scope="module")
def numbered(tmp_path_factory) -> Path:
    return write_set("nyuv2-npy", tmp_path_factory.mktemp("nyuv2-npy"))


def opened(root: Path, number: int) -> tuple[np.ndarray, ...]:
    """A test picture's files of AdaShare's layout."""
    paths = [file_of("nyuv2", root, "test", number, key) for key in ("img", "seg", "normal_mask")]
    return (*(np.array(Image.open(p)) for p in paths), np.load(file_of("nyuv2", root, "test", number, "depth")))


def decoded(colours: np.ndarray) -> np.ndarray:
    """Normals of AdaShare's colours, pixel by pixel: x right, y into the picture, z up, to x right, y up, z to us."""
    found = np.zeros(colours.shape)
    for place in np.ndindex(colours.shape[:2]):
        if colours[place].max() != 255:
            x, y, z = colours[place] / 255 * 2 - 1
            found[place] = np.array([x, z, -y]) / np.sqrt(x * x + y * y + z * z)
    return found


def test_adashares_files_are_decoded(adashare: Path) -> None:
    data = load("nyuv2", adashare)
    assert [(t.name, t.channels) for t in data.tasks] == [("seg", 40), ("normal", 3), ("depth", 1)]
    assert data.tasks[0].classes == CLASSES40 and len(set(CLASSES40)) == 40
    for number in range(COUNTS["test"]):
        image, seg, colours, depth = opened(adashare, number)
        item = data.splits["test"][0, number]
        np.testing.assert_array_equal(picture(item["image"], data.mean, data.std), image)
        wanted = (image / 255 - np.array(data.mean)) / np.array(data.std)
        np.testing.assert_allclose(item["image"].permute(1, 2, 0), wanted, atol=1e-5)
        np.testing.assert_array_equal(item["seg"], seg)
        assert item["seg"].dtype == torch.int64 and (item["seg"][0] == 255).all() and item["seg"].unique().numel() > 30
        np.testing.assert_allclose(item["normal"].permute(1, 2, 0), decoded(colours), atol=1e-6)
        np.testing.assert_array_equal(item["depth"][0], depth)
        assert (item["depth"][0, 0] == 0).all()


def test_numbered_files_are_decoded(numbered: Path) -> None:
    data = load("nyuv2-npy", numbered)
    assert data.tasks[0].classes == CLASSES13 and data.description["layout"] == "LibMTL"
    for number in range(COUNTS["test"]):
        image, label, depth, normal = (
            np.load(file_of("nyuv2-npy", numbered, "test", number, key))
            for key in ("image", "label", "depth", "normal")
        )
        item = data.splits["test"][0, number]
        np.testing.assert_array_equal(picture(item["image"], data.mean, data.std), (image * 255).round())
        np.testing.assert_array_equal(item["seg"], np.where(label < 0, 255, label))
        np.testing.assert_array_equal(item["depth"], depth[None, ..., 0])
        np.testing.assert_allclose(item["normal"].permute(1, 2, 0), normal, atol=1e-6)
        assert (item["normal"][:, 0] == 0).all()


@pytest.mark.parametrize("layout", ["nyuv2", "nyuv2-npy"])
@pytest.mark.parametrize("legacy", [False, True])
def test_mirroring_changes_the_sign_of_x_but_not_in_the_published_protocol(
    layout: str, legacy: bool, adashare: Path, numbered: Path
) -> None:
    root = {"nyuv2": adashare, "nyuv2-npy": numbered}[layout]
    splits = [
        load(layout, root, augmentation=Augmentation(mirror=m), legacy=legacy).splits["train"] for m in (False, True)
    ]
    seen = 0
    for epoch in range(8):
        plain, found = (split[epoch, 1] for split in splits)
        if torch.equal(plain["image"], found["image"]):
            continue
        seen += 1
        plain["normal"][0] *= 1 if legacy else -1
        for key, value in found.items():
            assert torch.equal(value, plain[key].flip(-1)), key
    assert seen > 1


def test_the_published_protocol_of_adashares_files(adashare: Path) -> None:
    data = load("nyuv2", adashare, legacy=True)
    image, seg, colours, depth = opened(adashare, 0)
    item = data.splits["test"][0, 0]
    blue_first = image[..., ::-1] - np.array([104.00698793, 116.66876762, 122.67891434])
    np.testing.assert_allclose(item["image"].permute(1, 2, 0), blue_first, atol=1e-3)
    raw = colours / np.linalg.norm(colours, axis=-1, keepdims=True).clip(1e-9)
    raw[colours.max(-1) == 255] = 0
    np.testing.assert_allclose(item["normal"].permute(1, 2, 0), raw, atol=1e-6)
    assert (item["normal"] >= 0).all()
    np.testing.assert_array_equal(item["seg"], seg)
    np.testing.assert_array_equal(item["depth"][0], depth)


def test_the_published_protocol_of_numbered_files_makes_colours_of_the_vectors(numbered: Path) -> None:
    normal = np.load(file_of("nyuv2-npy", numbered, "test", 0, "normal"))
    item = load("nyuv2-npy", numbered, legacy=True).splits["test"][0, 0]
    raw = (normal + 1) / 2
    raw = raw / np.linalg.norm(raw, axis=-1, keepdims=True)
    raw[(normal == 0).all(-1)] = 0
    np.testing.assert_allclose(item["normal"].permute(1, 2, 0), raw, atol=1e-6)


def test_raw_normals_have_plain_angles_and_no_corrected_metrics(adashare: Path) -> None:
    data = load("nyuv2", adashare, legacy=True, tasks=["normal"])
    (task,) = data.tasks
    with pytest.raises(ValueError, match="normals as published have legacy metrics only; allowed: family 'legacy'"):
        task.metrics("corrected")
    target = data.splits["test"][0, 0]["normal"][None]
    output = torch.randn(target.shape, generator=torch.Generator().manual_seed(0)) * 3
    metrics = task.metrics("legacy")
    metrics.update(output, target)
    known = (target != 0).any(1).numpy()[0]
    a, b = (x[0].permute(1, 2, 0).numpy()[known].astype(float) for x in (output, target))
    angles = np.degrees(np.arccos((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)))
    found = metrics.compute()
    assert float(found["mean"]) == pytest.approx(angles.mean(), abs=1e-3)
    assert float(found["median"]) == pytest.approx(np.median(angles), abs=0.02)
    assert float(found["within_30"]) == pytest.approx((angles <= 30).mean(), abs=1e-3)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("label", 13, "class 13; allowed: 0 to 12"),
        ("label", 2.5, "class 2.5; allowed: whole numbers"),
        ("label", np.nan, "class nan; allowed: whole numbers"),
        ("normal", np.nan, "a component of nan; allowed: -1 to 1"),
        ("normal", 127.0, "a component of 127; allowed: -1 to 1"),
        ("depth", np.inf, "not finite"),
        ("image", 200.0, "values from 0.* to 200; expected 0 to 1"),
    ],
)
def test_values_that_cannot_be_are_named(tmp_path: Path, key: str, value: float, message: str) -> None:
    root = write_set("nyuv2-npy", tmp_path)
    path = file_of("nyuv2-npy", root, "test", 1, key)
    array = np.load(path)
    array[5, 6] = value
    write(path, array)
    with pytest.raises(ValueError, match=message) as error:
        read_all(load("nyuv2-npy", root))
    assert str(path) in str(error.value)


# --- four real pictures ---


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """The samples, linked as AdaShare's set: each is a test picture; all are training pictures several times."""
    if not SAMPLES.is_dir():
        pytest.skip(f"no samples of NYU-v2 in {SAMPLES}")
    root = tmp_path_factory.mktemp("real")

    def link(folder: str, number: int, name: str) -> list[str]:
        row = []
        for key in ("img", "seg", "normal_mask", "depth"):
            path = file_of("nyuv2", root, folder, number, key)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to((SAMPLES / key / name).with_suffix(path.suffix).resolve())
            row.append(path.relative_to(root).as_posix())
        return row

    train = [link("train", n, NAMES[n % 4]) for n in range(20)]
    write_index("nyuv2", root, {"train": train, "test": [link("test", n, name) for n, name in enumerate(NAMES)]})
    return root


@pytest.mark.data
def test_real_pictures_have_the_published_shapes_and_ranges(real: Path) -> None:
    data = NYUv2(real, batch_size=2, augmentation=Augmentation(scale=(0.5, 1.5), crop=(321, 321), pad=True))
    data.setup()
    for batch in data.test_dataloader():
        check_batch(batch, data.tasks)
        assert batch["image"].shape == (2, 3, 480, 640)
        depth = batch["depth"][batch["depth"] > 0]
        assert depth.min() > 0.7 and depth.max() < 7
        unknown = (batch["normal"] == 0).all(1).float().mean((1, 2))
        assert (unknown > 0.19).all() and (unknown < 0.4).all()
        assert (batch["seg"][batch["seg"] != 255] < 40).all() and (batch["seg"] == 255).any()
    assert next(iter(data.train_dataloader()))["image"].shape == (2, 3, 321, 321)


@pytest.mark.data
def test_real_normals_are_those_of_the_depth(real: Path) -> None:
    """In the frame x right, y up, z to the camera, and in no other: each sign is needed."""
    data = NYUv2(real)
    data.setup()
    v, u = np.mgrid[0:480, 0:640]
    rays = np.stack([(u - 325.6) / 518.9, (253.7 - v) / 519.5, -np.ones((480, 640))], -1)  # the Kinect's camera
    for index in range(4):
        item = data.splits["test"][0, index]
        points, k = rays * item["depth"][0].numpy()[..., None], 6
        right = points[k:-k, 2 * k :] - points[k:-k, : -2 * k]
        down = points[2 * k :, k:-k] - points[: -2 * k, k:-k]
        surface = np.cross(down, right)
        surface /= np.linalg.norm(surface, axis=-1, keepdims=True) + 1e-9
        normal = item["normal"].permute(1, 2, 0).numpy()[k:-k, k:-k]
        known = (normal != 0).any(-1)
        angles = [
            np.degrees(np.arccos((surface * normal * signs).sum(-1)[known].clip(-1, 1)))
            for signs in ((1, 1, 1), (-1, 1, 1), (1, -1, 1), (1, 1, -1))
        ]
        right_one, *wrong = (np.median(a) for a in angles)
        assert right_one < 15 and min(wrong) > 20
        assert (normal[known][:, 2] > 0).mean() > 0.97  # visible surfaces face the camera


@pytest.mark.data
@pytest.mark.parametrize(
    ("legacy", "mean", "within"), [(True, 19.1, {"within_22": 0.668, "within_30": 0.888}), (False, 47.6, {})]
)
def test_a_constant_prediction_scores_what_it_is_known_to(real: Path, legacy: bool, mean: float, within: dict) -> None:
    data = NYUv2(real, legacy=legacy, tasks=["normal"])
    data.setup()
    target = torch.stack([data.splits["test"][0, index]["normal"] for index in range(4)])
    constant = target.double().sum((0, 2, 3)).float()  # the mean direction of all that are known
    metrics = data.tasks[0].metrics("legacy" if legacy else "corrected")
    metrics.update(constant.view(1, 3, 1, 1).expand_as(target), target)
    found = metrics.compute()
    assert float(found["mean"]) == pytest.approx(mean, abs=0.06)
    for name, value in within.items():
        assert float(found[name]) == pytest.approx(value, abs=1e-3)
