import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cut import checkpoint, export, latency, stopwatch
from cut.latency import Ratio, Timing, compare, ratio
from cut.search import Target, clock
from tests.test_export import SIZE, Tiny, images

pytest.importorskip("onnxruntime")
FAST = {"warmup": 1, "repeats": 7, "rounds": 3, "progress": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("latency")
    torch.manual_seed(0)
    network = Tiny().eval()
    export.export_onnx(network, path / "tiny.onnx", images(1), tasks=["scene", "depth"])
    checkpoint.save(network, path / "tiny", metadata={"input": {"height": SIZE[0], "width": SIZE[1]}})
    return path


@pytest.fixture(scope="module")
def found(folder):
    files = {"onnx": folder / "tiny.onnx", "torch": folder / "tiny"}
    return compare(files, builder="tests.test_export:Tiny", **FAST)


def test_files_of_two_runtimes_side_by_side(found, folder):
    assert [t.runtime for t in found.values()] == ["ONNX Runtime", "PyTorch"]
    for timing in found.values():
        assert timing.repeats == 7 and timing.threads == 1 and len(timing.rounds_ms) == 3
        assert 0 < min(timing.rounds_ms) <= timing.median_ms <= timing.p95_ms
        assert timing.load >= 0 and 0 <= timing.model_bytes < timing.peak_bytes
    assert found["onnx"].bytes == (folder / "tiny.onnx").stat().st_size


def test_a_process_with_an_onnx_file_holds_no_pytorch(found):
    assert found["onnx"].peak_bytes < 150e6 < found["torch"].peak_bytes


@pytest.mark.parametrize("shape", [(5,), (1, 8, 6)])
@pytest.mark.parametrize("suffix", [".onnx", ".pte"])
def test_a_file_of_any_input_is_timed(shape, suffix, tmp_path):
    class Doubled(torch.nn.Module):
        def forward(self, x):
            return {"twice": x + x}

    write = export.export_onnx
    if suffix == ".pte":
        pytest.importorskip("executorch")
        from cut.executorch import export_executorch as write
    file = write(Doubled(), tmp_path / f"m{suffix}", torch.zeros(1, *shape), tasks=["twice"]).path
    assert compare({"m": file}, **FAST)["m"].median_ms > 0


def timing(*rounds):
    return Timing(1.0, 1.0, 5, 1, "any", rounds, 0, 0, 0, 0.0)


def test_a_ratio_is_taken_within_rounds():
    slow_spell = ratio(timing(1, 10, 1), timing(2, 20, 2))
    assert slow_spell == Ratio(0.5, 0.5, 0.5)
    assert ratio(timing(1, 2, 6), timing(2, 2, 2)) == Ratio(1, 0.5, 3)
    with pytest.raises(ValueError, match="timed together"):
        ratio(timing(1), timing(1, 1))


def test_files_take_turns(monkeypatch, tmp_path):
    (tmp_path / "a.onnx").write_text("")
    asked = []

    class Fake:
        def __init__(self, name):
            self.name, self.facts = name, {"runtime": "fake", "before": 1}

        def ask(self, count):
            asked.append((self.name, count))
            return {"times": [float(len(asked))] * count, "peak": 3}

    import contextlib

    monkeypatch.setattr(latency, "_worker", lambda name, job: contextlib.nullcontext(Fake(name)))
    found = compare({n: tmp_path / "a.onnx" for n in "abc"}, repeats=5, rounds=2, progress=False)
    assert asked == [(n, 3) for n in "abc"] + [(n, 2) for n in "abc"]
    assert found["b"].rounds_ms == (2, 5) and found["b"].median_ms == 2 and found["b"].p95_ms == 5
    assert found["c"].repeats == 5 and found["a"].model_bytes == 2


@pytest.mark.parametrize(
    "wrong", [{"threads": 0}, {"warmup": -1}, {"rounds": 0}, {"repeats": 2, "rounds": 3}, {"repeats": 0}]
)
def test_bad_numbers(folder, wrong):
    with pytest.raises(ValueError, match="allowed"):
        compare({"a": folder / "tiny.onnx"}, **wrong)


def test_bad_files_are_named(tmp_path, folder):
    with pytest.raises(ValueError, match="no files"):
        compare({})
    with pytest.raises(ValueError, match="no model file"):
        compare({"a": tmp_path / "none.onnx"})
    (tmp_path / "bad.onnx").write_text("x")
    with pytest.raises(ValueError, match=r"mine: .*bad\.onnx is not a readable ONNX model"):
        compare({"good": folder / "tiny.onnx", "mine": tmp_path / "bad.onnx"}, **FAST)


@pytest.mark.slow
def test_a_builder_that_is_not_there_and_a_size_that_is_not_told(folder):
    with pytest.raises(ValueError, match=r"theirs: .*no_such"):
        compare({"theirs": folder / "tiny"}, builder="tests.no_such:thing", **FAST)
    checkpoint.save(Tiny(), folder / "plain")
    with pytest.raises(ValueError, match="does not say its input's size"):
        compare({"plain": folder / "plain"}, builder="tests.test_export:Tiny", **FAST)


def test_no_process_is_left(folder, monkeypatch):
    started = []
    real = subprocess.Popen

    class Watched(real):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)

    monkeypatch.setattr(latency.subprocess, "Popen", Watched)
    monkeypatch.setattr(latency._Worker, "ask", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        compare({"a": folder / "tiny.onnx"}, **FAST)
    assert len(started) == 1 and started[0].returncode is not None


def test_a_process_that_dies_says_why(folder, monkeypatch):
    monkeypatch.setattr(latency, "_START", "import sys; sys.stdin.readline(); raise SystemExit('out of memory')")
    with pytest.raises(ValueError, match=r"a: timing failed .*out of memory"):
        compare({"a": folder / "tiny.onnx"}, **FAST)


def test_the_stopwatch_times_what_it_is_told_to():
    calls = []
    times = stopwatch._timed(lambda: (calls.append(1), time.sleep(0.002)), 4)
    assert len(calls) == 4 and len(times) == 4 and all(t >= 2 for t in times)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_this_processs_and_its_peak_only_grows():
    before = stopwatch.memory("VmHWM")
    block = bytearray(64 << 20)
    assert stopwatch.memory("VmHWM") >= stopwatch.memory("VmRSS") >= len(block)
    del block
    assert stopwatch.memory("VmHWM") >= before


def test_clock_reads_in_the_targets_unit(monkeypatch):
    asked = []

    def fake(files, **options):
        asked.append((list(files.values()), options))
        return {"dense": timing(10.0, 20.0), "model": timing(4.0, 10.0)}

    monkeypatch.setattr("cut.search.compare", fake)
    built = []

    def build(density):
        built.append(density)
        return f"model-{density}"

    share = clock(build, "dense.onnx", Target(0.5, "x"), threads=2)
    assert share(1.0).value == 1 and not asked
    reading = share(0.3)
    assert (reading.value, reading.low, reading.high, reading.load) == (0.45, 0.4, 0.5, 0.0)
    assert asked == [(["dense.onnx", "model-0.3"], {"progress": False, "threads": 2})]
    ms = clock(build, "dense.onnx", Target(5))
    assert ms(1.0).high == 10 and asked[-1][0] == ["dense.onnx", "dense.onnx"] and built == [0.3]


def test_a_builder_may_return_all_that_the_commands_ask_for_and_use_the_whole_package(tmp_path, monkeypatch):
    (tmp_path / "theirs.py").write_text(
        "import cut\nimport torch\nfrom tests.test_export import Tiny\nassert cut.prune\n"
        "def setup():\n    return Tiny(), torch.ones(25_000_000), {}, None\n"
    )
    checkpoint.save(Tiny(), tmp_path / "tiny", metadata={"input": {"height": SIZE[0], "width": SIZE[1]}})
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parent.parent}")
    (found,) = compare({"torch": tmp_path / "tiny"}, builder="theirs:setup", **FAST).values()
    assert found.runtime == "PyTorch" and found.model_bytes < 80e6, "100 MB of data are not the model's"


@pytest.mark.parametrize(("cores", "load", "warns"), [(1, 0.2, False), (1, 0.4, True), (8, 2.3, False), (8, 2.5, True)])
def test_a_machine_is_busy_by_its_load_per_core(cores, load, warns, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    assert (f"load {load:.2f} on {cores} cores" in latency.warning_of(load)) == warns


def test_a_timing_can_be_written_to_a_record(found):
    from dataclasses import asdict

    assert json.loads(json.dumps(asdict(found["onnx"])))["runtime"] == "ONNX Runtime"
