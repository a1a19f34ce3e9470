"""A file that is whole or not there, is read without code, and belongs to one piece of work."""

import hashlib
import io
import os
import pickle
import random
import signal

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from cut.randomness import random_state, set_random_state
from cut.snapshot import Snapshot, digest, patient

CPU = torch.device("cpu")
KEY = {"lr": 0.1, "tasks": ["seg", "depth"], "share": None}


def test_sections_come_back_equal_and_beside_each_other(tmp_path):
    first = Snapshot(tmp_path / "a.pt", KEY)
    first.keep("one", {"x": torch.arange(3), "y": [1.5, "z", None]})
    first.keep("two", 2)
    again = Snapshot(tmp_path / "a.pt", KEY)
    assert again.get("two") == 2 and again.get("three") is None
    assert again.get("one")["y"] == [1.5, "z", None] and torch.equal(again.get("one")["x"], torch.arange(3))
    again.remove()
    assert not list(tmp_path.iterdir()) and Snapshot(tmp_path / "a.pt", KEY).get("two") is None


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({**KEY, "lr": 0.2}, "lr was 0.1, now it is 0.2"),
        ({"lr": 0.1}, "tasks was"),
        ({**KEY, "more": 1}, "more was None, now it is 1"),
    ],
)
def test_other_work_is_refused_by_name_and_left_alone(other, words, tmp_path):
    Snapshot(tmp_path / "a.pt", KEY).keep("one", 1)
    content = (tmp_path / "a.pt").read_bytes()
    with pytest.raises(ValueError, match=words):
        Snapshot(tmp_path / "a.pt", other)
    assert (tmp_path / "a.pt").read_bytes() == content


def whole(payload: bytes) -> bytes:
    return hashlib.sha256(payload).digest() + payload


def saved(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.parametrize(
    "harm",
    [
        lambda c: b"",
        lambda c: c[:-1],
        lambda c: c[: len(c) // 2],
        lambda c: c[:200] + bytes([c[200] ^ 1]) + c[201:],
        lambda c: whole(b"nothing"),
        lambda c: whole(pickle.dumps(Evil(), 2)),
        lambda c: whole(saved({"format": "cut snapshot 1", "key": {}, "sections": Evil()})),
        lambda c: whole(saved({"format": "another", "key": {}, "sections": {}})),
        lambda c: whole(saved([1, 2])),
    ],
)
def test_damaged_file_is_told_of_and_not_used(harm, tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Snapshot(tmp_path / "a.pt", KEY).keep("one", torch.arange(300))
    (tmp_path / "a.pt").write_bytes(harm((tmp_path / "a.pt").read_bytes()))
    fresh = Snapshot(tmp_path / "a.pt", KEY)
    assert fresh.get("one") is None and not (tmp_path / "evil").exists()
    assert len(caplog.records) == 1 and "beginning anew" in caplog.text and "a.pt" in caplog.text
    fresh.keep("one", 3)
    assert Snapshot(tmp_path / "a.pt", KEY).get("one") == 3


def test_half_written_files_of_a_killed_process_are_swept(tmp_path):
    for name in ("a.ptxyz.part", "b.ptxyz.part", "a.pt.json"):
        (tmp_path / name).write_text("half")
    Snapshot(tmp_path / "a.pt", KEY)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt.json", "b.ptxyz.part"]


def test_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    snapshot = Snapshot(tmp_path / "a.pt", KEY)
    snapshot.keep("one", 1)

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        snapshot.keep("one", 2)
    monkeypatch.undo()
    assert Snapshot(tmp_path / "a.pt", KEY).get("one") == 1 and len(list(tmp_path.iterdir())) == 1


def test_digest_tells_names_shapes_types_and_values_apart():
    values = [
        {"a": torch.zeros(4)},
        {"b": torch.zeros(4)},
        {"a": torch.zeros(2, 2)},
        {"a": torch.zeros(4, dtype=torch.int32)},
        {"a": torch.tensor([0.0, 0.0, 0.0, 1e-30])},
        {"a": torch.tensor(0.0)},
        {"a": torch.zeros(4, dtype=torch.bfloat16)},
        {},
    ]
    assert len({digest(v) for v in values}) == len(values)
    assert digest({"a": torch.arange(6.0).view(2, 3).T}) == digest({"a": torch.arange(6.0).view(2, 3).T.contiguous()})


def drawn(loader):
    return [
        torch.rand(1).item(),
        np.random.rand(),
        random.random(),
        random.gauss(0, 1),
        *map(float, next(iter(loader))),
    ]


@pytest.mark.parametrize("own", [False, True])
def test_every_generator_is_put_back(own, tmp_path):
    generator = torch.Generator().manual_seed(3) if own else None
    loader = DataLoader(torch.arange(1000), batch_size=4, shuffle=True, generator=generator)
    random.gauss(0, 1), np.random.randn()  # each holds a second number back
    snapshot = Snapshot(tmp_path / "a.pt")
    snapshot.keep("random", random_state(CPU, loader))
    first = drawn(loader)
    assert drawn(loader) != first
    set_random_state(Snapshot(tmp_path / "a.pt").get("random"), CPU, loader)
    assert drawn(loader) == first


def test_state_of_another_loader_is_refused():
    state = random_state(CPU, DataLoader(range(4), generator=torch.Generator()))
    with pytest.raises(ValueError, match="0 random generators, not 1"):
        set_random_state(state, CPU, [1, 2])


def test_first_interrupt_waits_for_the_end_and_the_second_does_not():
    done = []
    with pytest.raises(KeyboardInterrupt), patient() as stopped:
        assert not stopped()
        signal.raise_signal(signal.SIGINT)
        done.append(stopped())
    assert done == [True]
    with pytest.raises(KeyboardInterrupt), patient():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        done.append("not reached")
    assert done == [True] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_someone_elses_is_left_alone(monkeypatch):
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    try:
        with patient() as stopped:
            signal.raise_signal(signal.SIGINT)
            assert seen == [1] and not stopped()
    finally:
        signal.signal(signal.SIGINT, before)
