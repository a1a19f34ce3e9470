"""MNIST and Fashion-MNIST: what the files hold, what is refused, what may be fetched."""

import gzip
import hashlib
import io
import socket
import subprocess
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from idx_files import NAMES, idx, write_set, write_sets

from cut.data import fetch as fetching
from cut.data.idx import read_idx
from cut.data.mnist import DIGITS, FILES, GARMENTS, GREY_SETS, SPLITS, cache, read


@pytest.mark.parametrize("shape", [(7,), (0,), (2, 3, 5)])
def test_an_idx_file_holds_what_was_written(shape, tmp_path):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    (tmp_path / "file").write_bytes(idx(array))
    assert np.array_equal(read_idx(tmp_path / "file", len(shape)), array)


def test_pictures_and_labels_are_those_of_the_files(tmp_path):
    written = write_sets(tmp_path)
    for name, found in GREY_SETS.items():
        pictures, labels = read(found, "test", tmp_path)
        assert np.array_equal(pictures, written[name]["test"][0]) and np.array_equal(labels, written[name]["test"][1])
        train, val = read(found, "train", tmp_path), read(found, "val", tmp_path)
        assert train[1].dtype == np.int64 and 0 < len(val[1]) < len(train[1]) / 3
        every = {p.tobytes(): int(label) for p, label in zip(*written[name]["train"], strict=True)}
        parts = [{p.tobytes(): int(label) for p, label in zip(*part, strict=True)} for part in (train, val)]
        assert not parts[0].keys() & parts[1].keys(), "no training picture is for validation"
        assert parts[0] | parts[1] == every


def test_a_longer_file_holds_out_the_same_pictures(tmp_path):
    short, long = (write_set(tmp_path / str(n) / "mnist", 5, (n, 10)) for n in (60, 90))
    held = [{p.tobytes() for p in read(DIGITS, "val", tmp_path / str(n))[0]} for n in (60, 90)]
    places = [[i for i, p in enumerate(s["train"][0]) if p.tobytes() in h] for s, h in zip((short, long), held)]  # noqa: B905
    assert places[0] == [i for i in places[1] if i < 60]


PICTURES, LABELS = (np.zeros((12, 28, 28), np.uint8), np.zeros(12, np.uint8))
DAMAGE = {
    "a file that ends early": (0, idx(PICTURES)[:-1], "9423 bytes, its header says 9424"),
    "a file that goes on": (1, idx(LABELS) + b"x", "21 bytes, its header says 20"),
    "an empty file": (0, b"", "0 bytes, its header alone has 16"),
    "labels in place of pictures": (0, idx(LABELS) + bytes(20), "it starts with 00 00 08 01, expected 00 00 08 03"),
    "another format": (1, gzip.compress(idx(LABELS)), "it starts with 1f 8b 08 00, expected 00 00 08 01"),
    "a huge header": (0, bytes([0, 0, 8, 3]) + b"\xff" * 12 + bytes(9), "its header says 79228162458924105385300197"),
    "other counts": (1, idx(LABELS[:11]), r"has 12 pictures, .*train-labels-idx1-ubyte has 11 labels"),
    "other sizes": (0, idx(np.zeros((12, 27, 28), np.uint8)), "has pictures of 27x28; Fashion-MNIST has 28x28"),
    "a label too high": (1, idx(LABELS + 10), "has label 10; allowed: 0 to 9"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named(what, tmp_path):
    place, content, message = DAMAGE[what]
    write_set(tmp_path / "fashion-mnist", 0)
    for name, array in zip(NAMES["train"], (PICTURES, LABELS), strict=True):
        (tmp_path / "fashion-mnist" / name).write_bytes(idx(array))
    path = tmp_path / "fashion-mnist" / NAMES["train"][place]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read(GARMENTS, "train", tmp_path)
    assert path.name in str(caught.value)


def test_no_pictures_at_all(tmp_path):
    write_set(tmp_path / "mnist", 0, (20, 0))
    with pytest.raises(ValueError, match="has no pictures"):
        read(DIGITS, "test", tmp_path)


def test_missing_files_say_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setenv("CUT_DATA", str(tmp_path))
    assert cache() == tmp_path
    for split in SPLITS:
        with pytest.raises(ValueError, match=r"no file .*fashion-mnist.*make fashion-mnist fetches Fashion-MNIST"):
            read(GARMENTS, split)
    with pytest.raises(ValueError, match="no split 'dev'; allowed: train, val, test"):
        read(GARMENTS, "dev")


@pytest.fixture
def tiny(tmp_path):
    """A set whose published files are tiny, and those files."""
    write_set(tmp_path / "source", 3, (20, 10))
    files = {name: (tmp_path / "source" / name).read_bytes() for pair in FILES.values() for name in pair}
    return replace(DIGITS, hashes={n: hashlib.sha256(f).hexdigest() for n, f in files.items()}), files


def broken(found, folder):
    raise RuntimeError("no such\naddress")


def test_the_first_source_that_has_the_files_is_taken_once(tiny, tmp_path):
    found, files = tiny
    asked = []

    def source(*arguments):
        asked.append(arguments)
        return files

    assert fetching.fetch(found, tmp_path / "cache", [broken, source, broken])
    assert not fetching.damaged(found, tmp_path / "cache/mnist")
    assert sorted(p.name for p in (tmp_path / "cache/mnist").iterdir()) == sorted(files), "nothing else is left"
    assert len(read(DIGITS, "test", tmp_path / "cache")[1]) == 10
    assert not fetching.fetch(found, tmp_path / "cache", [source]) and len(asked) == 1
    (tmp_path / "cache/mnist" / NAMES["test"][1]).write_bytes(b"damaged")
    assert fetching.fetch(found, tmp_path / "cache", [source]) and len(asked) == 2


def test_other_files_than_the_published_ones_are_not_kept(tiny, tmp_path):
    found, files = tiny
    other, less = dict(files), dict(files)
    other[NAMES["train"][0]] += b"x"
    del less[NAMES["test"][1]]
    sources = [lambda *_: other, lambda *_: less, broken]
    wrong = (
        r"could not be fetched: train-images\S+ has .* SHA-256 .* not using it; t10k-labels\S+ of MNIST is missing; "
    )
    with pytest.raises(ValueError, match=wrong + "no such address. Put train-images"):
        fetching.fetch(found, tmp_path / "cache", sources)
    assert not list((tmp_path / "cache/mnist").iterdir())


def packed(members: dict[str, bytes], mode: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def test_packages_are_taken_apart(tiny, tmp_path, monkeypatch):
    """Clients are played by a function that leaves the file they would leave."""
    _, files = tiny
    npm = packed({f"package/data/{n}": f for n, f in files.items()}, "w:gz")
    start = "./usr/share/datasets/fashion-mnist"
    deb = packed({f"{start}/{n}.gz": gzip.compress(f) for n, f in files.items()}, "w")

    def client(command, cwd, stdout, **options):
        if command[0] == "npm":
            (cwd / "package.tgz").write_bytes(npm)
        elif command[0] == "apt-get":
            if command[1] == "download":
                return subprocess.CompletedProcess(command, 100, b"", b"no lists")
            if command[-1] == fetching.GARMENTS_PACKAGE:
                (cwd / "some.deb").write_bytes(b"deb")
        else:
            with open(stdout, "wb", closefd=False) as file:
                file.write(deb)
        return subprocess.CompletedProcess(command, 0, b"", b"")

    monkeypatch.setattr(fetching.shutil, "which", lambda name: name)
    monkeypatch.setattr(fetching.subprocess, "run", client)
    for found in GREY_SETS.values():
        folder = tmp_path / f"work-{found.name}"
        folder.mkdir()
        assert fetching.from_package(found, folder) == files
    deb = packed({f"{start}/{NAMES['train'][0]}.gz": b"no gzip"}, "w")
    with pytest.raises(ValueError, match="could not be fetched: Error -3"):
        fetching.fetch(GARMENTS, tmp_path / "cache", [fetching.from_package])
    deb = packed({}, "w")
    with pytest.raises(ValueError, match=r"the package holds no \./usr/share"):
        fetching.fetch(GARMENTS, tmp_path / "cache", [fetching.from_package])


def test_without_network_and_clients_the_command_says_so(tmp_path, monkeypatch, capsys):
    def refused(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refused)
    monkeypatch.setattr(fetching.shutil, "which", lambda name: None)
    before = socket.getdefaulttimeout()
    assert fetching.main(["--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert socket.getdefaulttimeout() == before
    assert "apt-get is not installed" in said[-2] and "npm is not installed" in said[-1]
    assert all("by hand" in line for line in said[-2:])
    with pytest.raises(SystemExit):
        fetching.main(["emnist"])
    assert "no set 'emnist'; allowed: fashion-mnist, mnist" in capsys.readouterr().err
