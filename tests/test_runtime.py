import numpy as np
import pytest
import torch
from torch import nn

from cut import checkpoint, export, runtime
from tests.test_export import SIZE, Tiny, images

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(3)
    return Tiny().eval()


@pytest.fixture(scope="module")
def folder(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("runtime")
    meta = {"input": {"height": SIZE[0], "width": SIZE[1]}, "tasks": {}}
    export.export_onnx(network, path / "tiny.onnx", images(1), tasks=["scene", "depth"], meta=meta)
    checkpoint.save(network, path / "tiny", metadata=meta)
    return path


@pytest.mark.parametrize(("name", "kind"), [("tiny.onnx", "ONNX Runtime"), ("tiny", "PyTorch")])
def test_every_runtime_gives_the_networks_outputs_by_task(folder, network, name, kind):
    opened = runtime.open_file(folder / name, torch.get_num_threads(), Tiny)
    assert opened.runtime == kind == runtime.kind(folder / name)
    assert opened.size == SIZE and set(opened.meta) == {"input", "tasks"}
    found = opened.run(images(2).numpy())
    with torch.no_grad():
        expected = network(images(2))
    assert set(found) == set(expected)
    for task, value in expected.items():
        np.testing.assert_allclose(found[task], value.numpy(), atol=1e-5)


def test_a_file_of_no_runtime_is_refused_by_name(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "bare").write_text("x")
    for name in ("a.txt", "bare"):
        with pytest.raises(ValueError, match=rf"{name} is of no runtime; allowed: .onnx, .pte"):
            runtime.open_file(tmp_path / name)
    with pytest.raises(ValueError, match=r"no model file or folder .*gone\.onnx"):
        runtime.open_file(tmp_path / "gone.onnx")
    with pytest.raises(ValueError, match="holds no model"):
        runtime.open_file(tmp_path)


@pytest.mark.parametrize("content", [b"", b"ET12", b"0000ET99rest"])
def test_a_damaged_program_is_refused_before_the_runtime_sees_it(tmp_path, content):
    (tmp_path / "a.pte").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.pte is not a readable ExecuTorch program"):
        runtime.open_file(tmp_path / "a.pte")


def test_threads_below_one_are_refused(folder):
    with pytest.raises(ValueError, match="threads 0; allowed: 1 or more"):
        runtime.open_file(folder / "tiny.onnx", threads=0)


def test_what_native_code_writes_comes_out_only_with_a_fault(capfd):
    import os

    with runtime.muted():
        os.write(2, b"chatter")
    assert capfd.readouterr().err == ""
    with pytest.raises(RuntimeError), runtime.muted():
        os.write(2, b"reason")
        raise RuntimeError
    assert capfd.readouterr().err == "reason"


def test_facts_that_are_not_ours_are_none(tmp_path, folder):
    onnx = pytest.importorskip("onnx")
    for text in ("[1]", "{", ""):
        model = onnx.load(folder / "tiny.onnx")
        onnx.helper.set_model_props(model, {"cut": text})
        onnx.save(model, tmp_path / "b.onnx")
        opened = runtime.open_file(tmp_path / "b.onnx")
        assert opened.meta == {} and opened.size == SIZE


def test_parity_is_checked_in_the_files_own_runtime(folder, network, tmp_path):
    class Own(nn.Module):
        def forward(self, image):
            return {k: v + 1 for k, v in network(image).items()}

    assert max(export.check_parity(folder / "tiny.onnx", network, [images(3)]).values()) < 1e-5
    with pytest.raises(ValueError, match=r"tiny\.onnx: output '(depth|scene)' differs"):
        export.check_parity(folder / "tiny.onnx", Own(), [images(3)])


def test_the_tolerance_of_parity_grows_with_outputs_above_one(network, tmp_path):
    class Scaled(nn.Module):
        def __init__(self, off):
            super().__init__()
            self.inner, self.off = network, off

        def forward(self, image):
            return {task: 1e4 * (out / out.abs().max() + self.off) for task, out in self.inner(image).items()}

    export.export_onnx(Scaled(0.0), tmp_path / "large.onnx", images(1), tasks=["scene", "depth"])
    worst = export.check_parity(tmp_path / "large.onnx", Scaled(5e-4), [images(3)])
    assert min(worst.values()) > 1, "far more than the tolerance of outputs up to one"
    with pytest.raises(ValueError, match="differs"):
        export.check_parity(tmp_path / "large.onnx", Scaled(5e-3), [images(3)])
