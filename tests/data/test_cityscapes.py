"""Cityscapes: both layouts decoded once more, inverse depth, void in the published protocol."""

from pathlib import Path

import numpy as np
import pytest
import torch
from layout_files import COUNTS, file_of, load, read_all, write, write_set

from cut.data.batch import picture
from cut.data.cityscapes import CLASSES7, CLASSES19, NEAREST

LABEL = {"cityscapes": "label_19", "cityscapes-npy": "label"}


@pytest.fixture(scope="module", params=LABEL)
def written(request, tmp_path_factory) -> tuple[str, Path]:
    return request.param, write_set(request.param, tmp_path_factory.mktemp(request.param))


def opened(layout: str, root: Path, number: int) -> tuple[np.ndarray, ...]:
    keys = ("image", LABEL[layout], "depth")
    return tuple(np.load(file_of(layout, root, "test", number, key)) for key in keys)


def test_files_are_decoded(written: tuple[str, Path]) -> None:
    layout, root = written
    data = load(layout, root)
    assert data.tasks[0].classes == (CLASSES19 if layout == "cityscapes" else CLASSES7)
    assert [t.name for t in data.tasks] == ["seg", "depth"] and data.tasks[1].unit == "inverse depth, as stored"
    for number in range(COUNTS["test"]):
        image, label, depth = opened(layout, root, number)
        item = data.splits["test"][0, number]
        assert set(item) == {"image", "seg", "depth"}
        np.testing.assert_array_equal(picture(item["image"], data.mean, data.std), (image * 255).round())
        np.testing.assert_array_equal(item["seg"], np.where(label < 0, 255, label.astype(int)))
        np.testing.assert_array_equal(item["depth"], depth.transpose(2, 0, 1))
        assert (item["seg"][0] == 255).all() and (item["depth"][0, 0] == 0).all()


def test_an_inverse_depth_must_be_larger_than_the_limit(tmp_path: Path) -> None:
    root = write_set("cityscapes", tmp_path)
    path = file_of("cityscapes", root, "test", 0, "depth")
    depth = np.load(path)
    depth[3, :4, 0] = [-1, NEAREST / 2, NEAREST, NEAREST * 1.01]
    write(path, depth)
    found = load("cityscapes", root).splits["test"][0, 0]["depth"][0, 3, :4]
    assert (found > 0).tolist() == [False, False, False, True]


def test_the_published_protocol_counts_void_as_wrong(written: tuple[str, Path]) -> None:
    layout, root = written
    data, plain = load(layout, root, legacy=True), load(layout, root)
    image, label, _ = opened(layout, root, 0)
    item = data.splits["test"][0, 0]
    blue_first = image[..., ::-1] * 255 - np.array([104.00698793, 116.66876762, 122.67891434])
    np.testing.assert_allclose(item["image"].permute(1, 2, 0), blue_first, atol=1e-3)
    target = item["seg"][None]
    perfect = torch.nn.functional.one_hot(target.where(target != 255, 0), len(data.tasks[0].classes))
    known, accuracy = (label >= 0).mean(), {}
    for name, module in (("published", data), ("plain", plain)):
        for family in ("legacy", "corrected"):
            metrics = module.tasks[0].metrics(family)
            metrics.update(perfect.permute(0, 3, 1, 2).float(), target)
            accuracy[name, family] = float(metrics.compute()["pixel_acc"])
    assert accuracy.pop(("published", "legacy")) == pytest.approx(known) and known < 0.97
    assert set(accuracy.values()) == {1.0}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("label_19", 19, "class 19; allowed: 0 to 18"),
        ("depth", np.nan, "not finite"),
        ("image", np.nan, "expected 0 to 1"),
        ("image", 77.0, "values from 0.* to 77; expected 0 to 1"),
    ],
)
def test_values_that_cannot_be_are_named(tmp_path: Path, key: str, value: float, message: str) -> None:
    root = write_set("cityscapes", tmp_path)
    path = file_of("cityscapes", root, "train", 1, key)
    array = np.load(path)
    array[5, 6] = value
    write(path, array)
    with pytest.raises(ValueError, match=message) as error:
        read_all(load("cityscapes", root))
    assert str(path) in str(error.value)


def test_labels_of_other_numbers_of_classes_are_not_read(tmp_path: Path) -> None:
    root = write_set("cityscapes", tmp_path)
    for key in ("label_2", "label_7"):
        file_of("cityscapes", root, "train", 0, key).unlink()
    data = load("cityscapes", root)
    read_all(data)  # raises where a file is missing
    assert data.tasks[0].channels == 19
