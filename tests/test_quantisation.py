import json

import numpy as np
import pytest
import torch

from cut import export
from cut.data.synthetic import Synthetic
from cut.evaluation import evaluate, evaluate_file
from cut.network import MultiTaskNet, NetworkConfig
from cut.quantisation import has_vnni, quantise_onnx
from cut.runtime import open_file
from tests.small_networks import trained
from tests.test_structured import halved_vit, relative

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
TASKS = ("seg", "depth", "scene")


@pytest.fixture(scope="module")
def data():
    return Synthetic(TASKS, num=24, batch_size=5)


@pytest.fixture(scope="module")
def network(data):
    """A small network of ours, its norms fitted to the pictures."""
    torch.manual_seed(0)
    config = NetworkConfig("resnet10t", head_width=16)
    net = trained(MultiTaskNet({t.name: t.channels for t in data.tasks}, ["scene"], config)).train()
    with torch.no_grad():
        for batch in data.score_batches(4):
            net(batch["image"])
    return net.eval()


@pytest.fixture(scope="module")
def pictures(data):
    return [batch["image"] for batch in data.score_batches(3)]


@pytest.fixture(scope="module")
def file(network, data, pictures, tmp_path_factory):
    path = tmp_path_factory.mktemp("int8") / "float.onnx"
    meta = export.metadata(data.tasks, network.mean, network.std, data.size)
    return export.export_onnx(network, path, pictures[0], tasks=TASKS, meta=meta)


@pytest.fixture(scope="module")
def int8(file, pictures):
    return quantise_onnx(file.path, file.path.with_name("int8.onnx"), pictures)


def test_the_file_is_nearly_four_times_smaller(file, int8):
    assert int8.bytes == int8.path.stat().st_size < 0.3 * file.bytes
    assert int8.opset == file.opset


def test_names_facts_and_free_batch_stay(file, int8):
    before, after = export.session(file.path), export.session(int8.path)
    assert export.read_metadata(after) == export.read_metadata(before)
    assert [o.name for o in after.get_outputs()] == list(TASKS)
    for count in (1, 3):
        assert len(after.run(None, {"image": np.zeros((count, 3, 32, 32), np.float32)})[0]) == count


def test_weights_are_int8_by_channel_and_the_outputs_layers_float(int8):
    model = onnx.load(int8.path)
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    scales = [t for n, t in tensors.items() if n.endswith("_scale") and t.ndim == 1 and len(t) > 1]
    assert sum(t.dtype == np.int8 for t in tensors.values()) >= 10 and len(scales) >= 10
    made = {value: node for node in model.graph.node for value in node.output}
    for output in model.graph.output:
        assert made[output.name].op_type != "DequantizeLinear"
    assert b"site-packages" not in int8.path.read_bytes()


def test_outputs_are_close(int8, network, pictures):
    outputs = open_file(int8.path).run(pictures[0].numpy())
    with torch.no_grad():
        expected = network(pictures[0])
    for task, value in expected.items():
        error = np.abs(outputs[task] - value.numpy()).mean() / value.numpy().std()
        assert error < 0.15, task


@pytest.mark.slow
def test_a_vision_transformer_cut_by_heads_and_neurons(tmp_path):
    """Whose weights are those of products of matrices: int8, too, by channel, in what is left of every block."""
    small, pictures, expected = halved_vit()
    before = export.export_onnx(small, tmp_path / "float.onnx", pictures[0][:1], tasks=list(expected))
    export.check_parity(before.path, small, pictures)
    after = quantise_onnx(before.path, tmp_path / "int8.onnx", pictures)
    found = open_file(after.path).run(pictures[0].numpy())
    assert 0 < relative(found, expected) < 0.15
    tensors = [t for t in onnx.load(after.path).graph.initializer if t.data_type == onnx.TensorProto.INT8]
    shapes = [tuple(t.dims) for t in tensors if t.name.endswith("_quantized")]
    layers = [m for b in small.backbone.model.blocks for m in (b.attn.qkv, b.attn.proj, b.mlp.fc1, b.mlp.fc2)]
    for layer in layers:
        shapes.remove((layer.in_features, layer.out_features))
    weights = sum(layer.weight.numel() for layer in layers)
    assert before.bytes - after.bytes > 2 * weights, "three bytes of each are saved; nodes that are added take some"


def test_seven_bit_weights_for_cpus_that_overflow(file, int8, pictures, monkeypatch):
    def widest(path):
        return max(
            int(np.abs(onnx.numpy_helper.to_array(t)).max())
            for t in onnx.load(path).graph.initializer
            if t.data_type == onnx.TensorProto.INT8 and t.name.endswith("_quantized")
        )

    def written(name, **options):
        return quantise_onnx(file.path, int8.path.with_name(name), pictures[:1], **options).path

    assert widest(written("r.onnx", reduce_range=True)) <= 64 < widest(written("f.onnx", reduce_range=False))
    monkeypatch.setattr("cut.quantisation.has_vnni", lambda: False)
    assert widest(written("d.onnx")) <= 64


def test_vnni_is_read_from_the_flags():
    assert has_vnni("flags : fpu avx512_vnni avx2") and has_vnni("flags : avx_vnni")
    assert not has_vnni("flags : fpu avx2 avx512f") and not has_vnni("flags: xavx_vnnix")
    assert isinstance(has_vnni(), bool)


def test_refusals_come_before_the_work(file, tmp_path, pictures):
    with pytest.raises(ValueError, match=r"method 'best'; allowed: 'minmax', 'entropy', 'percentile'"):
        quantise_onnx(file.path, tmp_path / "a.onnx", pictures, method="best")
    with pytest.raises(ValueError, match="no calibration pictures"):
        quantise_onnx(file.path, tmp_path / "a.onnx", [])
    with pytest.raises(ValueError, match="no model file"):
        quantise_onnx(tmp_path / "none.onnx", tmp_path / "a.onnx", pictures)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ evaluation


def naive(network, data, split="test"):
    """Metrics over all pictures at once."""
    data.setup(split)
    batches = list(data.test_dataloader() if split == "test" else data.val_dataloader())
    images = torch.cat([b["image"] for b in batches])
    with torch.no_grad():
        outputs = network(images)
    seg = outputs["seg"].argmax(1)
    labels = {t: torch.cat([b[t] for b in batches]) for t in TASKS}
    known = labels["depth"] > 0
    return {
        "seg/pixel_acc": (seg == labels["seg"])[labels["seg"] != 255].double().mean().item(),
        "depth/abs": (outputs["depth"] - labels["depth"]).abs()[known].double().mean().item(),
        "scene/accuracy": (outputs["scene"].argmax(1) == labels["scene"]).double().mean().item(),
    }


def test_metrics_of_a_file_against_a_naive_evaluation(file, network, data):
    found = evaluate_file(file.path, data)
    assert {k.split("/")[0] for k in found} == set(TASKS)
    for key, value in naive(network, data).items():
        scale = 0.01 if key.startswith(("seg", "scene")) else 1
        assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-6) or found[key] * scale == pytest.approx(
            value, rel=1e-4
        ), key


def test_int8_loses_little_and_both_families_are_there(file, int8, data):
    before, after = evaluate_file(file.path, data), evaluate_file(int8.path, data)
    assert set(before) == set(after) and before != after
    assert after["depth/abs"] == pytest.approx(before["depth/abs"], rel=0.2)
    assert set(evaluate_file(int8.path, data, family="legacy", tasks=["seg"])) == {"seg/miou", "seg/pixel_acc"}


def test_validation_is_another_split(file, data):
    assert evaluate_file(file.path, data, split="val") != evaluate_file(file.path, data)


def test_evaluation_refuses_what_it_cannot_judge(file, data):
    opened = open_file(file.path)
    with pytest.raises(ValueError, match="unknown task 'pose'"):
        evaluate_file(file.path, data, tasks=["pose"])
    with pytest.raises(ValueError, match="split 'train'; allowed"):
        evaluate_file(file.path, data, split="train")
    with pytest.raises(ValueError, match="no tasks"):
        evaluate(opened, [], [])
    with pytest.raises(ValueError, match="no pictures"):
        evaluate(opened, [], data.tasks)
    normals = Synthetic(("normal",)).tasks
    batch = data.score_batches(1)[0]
    with pytest.raises(ValueError, match="no output 'normal'"):
        evaluate(opened, [batch], normals)
    with pytest.raises(ValueError, match="no label 'seg'"):
        evaluate(opened, [{"image": batch["image"]}], [t for t in data.tasks if t.name == "seg"])
    assert json.loads(json.dumps(evaluate_file(file.path, data)))
