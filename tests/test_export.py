import json

import pytest
import torch
from torch import nn

from cut import export
from cut.network import MultiTaskNet, NetworkConfig
from cut.tasks import classification, depth, segmentation

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SIZE = (32, 48)
TASKS = [segmentation(("wall", "floor", "sofa")), depth(), classification(("kitchen", "study"))]
NAMES = [t.name for t in TASKS]


def images(number, seed=0):
    return torch.randn(number, 3, *SIZE, generator=torch.Generator().manual_seed(seed))


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, image):
        features = self.body(image)
        return {"depth": features[:, :1], "scene": features.mean((2, 3))}


def settled(seed=0):
    """A small network with batch-norm statistics that are not those of a fresh one."""
    torch.manual_seed(seed)
    config = NetworkConfig(backbone="mobilenetv3_small_050", head_width=8)
    network = MultiTaskNet({t.name: t.channels for t in TASKS}, ["scene"], config)
    network.train()
    with torch.no_grad():
        network(images(4, seed=9))
    return network.eval()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def network():
    return settled()


@pytest.fixture(scope="module")
def file(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "new" / "model.onnx"
    meta = export.metadata(TASKS, network.mean, network.std, SIZE)
    return export.export_onnx(network, path, images(1), tasks=NAMES, meta=meta)


def test_one_file_of_the_size_that_is_told(file):
    assert [p.name for p in file.path.parent.iterdir()] == ["model.onnx"]
    assert file.path.stat().st_size == file.bytes
    assert onnx.load(file.path).opset_import[0].version == file.opset


def test_outputs_are_named_by_task_and_the_batch_is_free(file):
    opened = export.session(file.path)
    assert [i.name for i in opened.get_inputs()] == ["image"]
    assert opened.get_inputs()[0].shape[1:] == [3, *SIZE]
    assert [o.name for o in opened.get_outputs()] == NAMES
    for number in (1, 2, 3):
        seg, metres, scene = opened.run(None, {"image": images(number).numpy()})
        assert seg.shape == (number, 3, *SIZE) and metres.shape == (number, 1, *SIZE) and scene.shape == (number, 2)


def test_outputs_equal_those_of_pytorch(file, network):
    worst = export.check_parity(file.path, network, [images(1), images(3, seed=1)], tolerance=1e-4)
    assert set(worst) == set(NAMES) and all(0 <= v <= 1e-4 for v in worst.values())


def test_parity_fails_on_another_network_and_names_the_task(file):
    with pytest.raises(ValueError, match=r"model\.onnx.*'(seg|depth|scene)'"):
        export.check_parity(file.path, settled(seed=5), [images(1)])


def test_metadata_is_read_back(file, network):
    meta = export.read_metadata(export.session(file.path))
    assert meta == export.metadata(TASKS, network.mean, network.std, SIZE)
    assert meta["input"] == {"height": 32, "width": 48, "mean": list(network.mean), "std": list(network.std)}
    assert meta["tasks"]["depth"] == {"kind": "depth", "channels": 1, "classes": [], "unit": "m"}
    json.dumps(meta)


def test_file_tells_nothing_about_where_it_was_made(file):
    content = file.path.read_bytes()
    assert b"site-packages" not in content and b".py" not in content and b"/work" not in content


@pytest.mark.parametrize("training", [True, False])
def test_any_module_is_exported_in_silence_and_keeps_its_mode(training, tmp_path, capfd, recwarn):
    tiny = Tiny().train(training)
    before = {k: v.clone() for k, v in tiny.state_dict().items()}
    export.export_onnx(tiny, tmp_path / "a.onnx", images(1), tasks=["scene", "depth"])
    assert tiny.training == training
    assert all(torch.equal(v, before[k]) for k, v in tiny.state_dict().items())
    out, err = capfd.readouterr()
    assert out == "" and err == "" and not [w for w in recwarn if "onnx" in str(w.message).lower()]


def test_unknown_output_is_refused(network, tmp_path):
    with pytest.raises(ValueError, match="'smell'"):
        export.export_onnx(network, tmp_path / "a.onnx", images(1), tasks=["seg", "smell"])
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_no_model_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no model file"):
        export.session(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(ValueError, match=r"text\.onnx is not a readable"):
        export.session(tmp_path / "text.onnx")


def test_model_without_metadata_is_refused(file, tmp_path):
    model = onnx.load(file.path)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "bare.onnx")
    with pytest.raises(ValueError, match="metadata"):
        export.read_metadata(export.session(tmp_path / "bare.onnx"))


def test_missing_extra_is_named(monkeypatch, network, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match="extra 'export'"):
        export.export_onnx(network, tmp_path / "a.onnx", images(1), tasks=["seg"])


class Spoilt(torch.nn.Module):
    """Puts out one value that is no number."""

    def __init__(self, network, task, value):
        super().__init__()
        self.network, self.task, self.value = network, task, value

    def forward(self, image):
        outputs = dict(self.network(image))
        outputs[self.task] = outputs[self.task].clone()
        outputs[self.task].view(-1)[0] = self.value
        return outputs


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_output_that_is_no_number_fails_at_any_tolerance(file, network, value):
    with pytest.raises(ValueError, match="'depth'"):
        export.check_parity(file.path, Spoilt(network, "depth", value), [images(1)], tolerance=1e9)


def test_parity_over_no_inputs_is_refused(file, network):
    with pytest.raises(ValueError, match="no inputs"):
        export.check_parity(file.path, network, [])


def test_frozen_norm_stays_frozen_and_training_goes_on(file, tmp_path):
    network = settled().train()
    frozen = next(m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)).eval()
    before = [m.training for m in network.modules()]
    export.export_onnx(network, tmp_path / "a.onnx", images(1), tasks=["depth"])
    assert [m.training for m in network.modules()] == before and not frozen.training
    export.parity(file.path, network, [images(1)])
    assert [m.training for m in network.modules()] == before


def test_no_tasks_are_refused(network, tmp_path):
    with pytest.raises(ValueError, match="no tasks"):
        export.export_onnx(network, tmp_path / "a.onnx", images(1), tasks=[])
