"""Decoding: pictures and arrays of every kind, damaged files, values out of range."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from layout_files import write
from PIL import Image

from cut.data.decoding import depths, load_npy, read_npy, read_png


def test_a_png_of_another_kind_is_named(tmp_path: Path) -> None:
    grey, colours = np.zeros((4, 5), np.uint8), np.zeros((4, 5, 3), np.uint8)
    path = tmp_path / "a.png"
    for array, channels in ((grey, 3), (grey.astype(np.uint16), 3), (colours, 1)):
        write(path, array)
        with pytest.raises(ValueError, match=r"a.png holds a picture .* of mode .*; expected \[H, W"):
            read_png(path, channels)
    for mode, channels in (("P", 1), ("L", 1), ("1", 1), ("RGBA", 3), ("P", 3), ("RGB", 3)):
        Image.new(mode, (5, 4), 1).save(path)
        found = read_png(path, channels)
        assert found.dtype == np.uint8 and found.shape == ((4, 5) if channels == 1 else (4, 5, 3))
    deep = np.arange(20, dtype=np.uint16).reshape(4, 5) * 3000
    np.testing.assert_array_equal(read_png(write(path, deep), 1), deep)


@pytest.mark.parametrize("suffix", [".png", ".npy"])
def test_no_damage_to_a_file_is_anything_but_one_named_error(suffix: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (9, 7, 3), dtype=np.uint8)
    path = write(tmp_path / f"a{suffix}", pixels)
    good, named = path.read_bytes(), 0
    damaged = [good[:n] for n in range(0, len(good), 7)]
    damaged += [good[:n] + bytes([int(rng.integers(256))]) + good[n + 1 :] for n in range(0, len(good), 2)]
    for content in damaged:
        path.write_bytes(content)
        try:
            found = (read_png if suffix == ".png" else read_npy)(path, 3)
        except ValueError as error:
            named += str(path) in str(error)
        else:  # a changed byte may be one of a pixel; of missing ones, all pixels may still be there
            named += len(content) == len(good) or bool((found == pixels).all())
    assert named == len(damaged)


def test_only_arrays_of_numbers_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    path.write_bytes((tmp_path / "a.npz").read_bytes())
    with pytest.raises(ValueError, match=r"a\.npy is damaged"):
        load_npy(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match=r"a\.npy is damaged"):
        load_npy(path)
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"a\.npy is damaged"):
        load_npy(path)
    for array, channels in (
        (np.zeros((4, 5, 2)), 1),
        (np.zeros((4, 5, 2)), 3),
        (np.zeros((4, 5)), 3),
        (np.zeros(4), 1),
        (np.full((4, 5), "a"), 1),
        (np.zeros((4, 5), complex), 1),
    ):
        np.save(path, array)
        with pytest.raises(ValueError, match=r"a.npy holds .*; expected numbers \[H, W"):
            read_npy(path, channels)
    np.save(path, np.zeros((4, 5, 1)))
    assert read_npy(path, 1).shape == (4, 5)


@pytest.mark.parametrize(("value", "good"), [(100.0, True), (100.5, False), (-5000.0, True), (np.nan, True)])
def test_a_depth_of_the_limit_is_one(value: float, good: bool) -> None:
    array = np.array([[1.0, value]])
    if good:
        assert depths(Path("a.npy"), array, 100.0, "metres") is array
    else:
        with pytest.raises(ValueError, match=r"a\.npy holds depths from 1 to 100\.5; expected metres, up to 100"):
            depths(Path("a.npy"), array, 100.0, "metres")
    assert depths(Path("a.npy"), array[:0], 100.0, "metres").size == 0
