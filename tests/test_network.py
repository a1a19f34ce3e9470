"""Networks: shapes for CNN and ViT, selection, specs, and refusals."""

import copy

import pytest
import torch

from cut import backbones
from cut.network import MultiTaskNet, NetworkConfig

OUTPUTS = {"seg": 7, "depth": 1, "scene": 5}


def build(**options) -> MultiTaskNet:
    torch.manual_seed(0)
    return MultiTaskNet(OUTPUTS, ["scene"], NetworkConfig(**options)).eval()


@pytest.mark.parametrize(
    "options",
    [
        {"backbone": "mobilenetv2_100", "output_stride": 16},
        {"backbone": "resnet18", "head": "aspp", "head_width": 16},
        {"backbone": "tf_efficientnet_lite0"},
        {"backbone": "vit_tiny_patch16_224", "img_size": (64, 96)},
        {"backbone": "swin_tiny_patch4_window7_224", "img_size": (64, 96)},
    ],
    ids=lambda o: o["backbone"],
)
def test_outputs_have_the_pictures_size(options):
    net = build(**options)
    out = net(torch.randn(2, 3, 64, 96))
    assert {t: tuple(o.shape) for t, o in out.items()} == {
        "seg": (2, 7, 64, 96),
        "depth": (2, 1, 64, 96),
        "scene": (2, 5),
    }


def test_channels_last_maps_come_out_channels_first():
    net = build(backbone="swin_tiny_patch4_window7_224", img_size=(64, 96))
    raw = net.backbone(torch.randn(1, 3, 64, 96))
    assert raw[0].shape[-1] == net.channels[0]
    assert backbones.nchw(raw, net.nhwc)[0].shape[1] == net.channels[0]


def test_the_papers_network_has_its_published_size():
    """peers: 90.70 M parameters for NYU-v2's three tasks."""
    with torch.device("meta"):
        net = MultiTaskNet(
            {"seg": 40, "normal": 3, "depth": 1},
            config=NetworkConfig("resnet34", output_stride=8, head="aspp", head_width=1024),
        )
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(90.70, abs=0.01)


def test_a_vit_resizes_or_refuses_but_never_crops():
    with pytest.raises(ValueError, match=r"60x90 are no multiple .* patch 16x16"):
        build(backbone="vit_tiny_patch16_224", img_size=(60, 90))
    net = build(backbone="vit_tiny_patch16_224", img_size=(60, 90), resize="patch")
    assert net(torch.randn(1, 3, 60, 90))["seg"].shape[-2:] == (60, 90)
    fixed = build(backbone="vit_tiny_patch16_224", img_size=(64, 96))
    with pytest.raises(ValueError, match="64x80 do not fit"):
        fixed(torch.randn(1, 3, 64, 80))


def test_a_vit_without_a_size_follows_the_picture():
    net = build(backbone="vit_tiny_patch16_224")
    assert net(torch.randn(1, 3, 64, 96))["seg"].shape[-2:] == (64, 96)
    with pytest.raises(ValueError, match=r"60x90 are no multiple .* patch 16x16"):
        net(torch.randn(1, 3, 60, 90))


def test_resizing_is_to_the_nearest_multiple_of_the_patch():
    net = build(backbone="vit_tiny_patch16_224", resize="patch")
    image = torch.randn(1, 3, 60, 90)
    resized = torch.nn.functional.interpolate(image, (64, 96), mode="bilinear", align_corners=False)
    assert torch.equal(net(image)["scene"], net(resized)["scene"])


def test_a_fixed_grid_names_the_size_it_was_built_for():
    swin = build(backbone="swin_tiny_patch4_window7_224")
    with pytest.raises(ValueError, match="64x96 do not fit swin_tiny_patch4_window7_224, built for 224x224"):
        swin(torch.randn(1, 3, 64, 96))


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_output_stride_is_the_deepest_maps(stride):
    net = build(backbone="resnet18", output_stride=stride)
    assert net.backbone(torch.randn(1, 3, 64, 64))[-1].shape[-1] == 64 // stride


def test_selected_heads_only_are_run():
    net = build()
    image, ran = torch.randn(1, 3, 64, 64), []
    for task, head in net.heads.items():
        head.register_forward_hook(lambda *_, task=task: ran.append(task))
    full = net(image)
    ran.clear()
    net.select(["depth"])
    part = net(image)
    assert ran == ["depth"]
    assert torch.equal(part["depth"], full["depth"])
    for selection, message in [
        ([], "no tasks"),
        (["flow"], "unknown task 'flow'"),
        (["seg", "seg"], "twice"),
    ]:
        with pytest.raises(ValueError, match=message):
            net.select(selection)


def test_a_deleted_head_is_gone_from_outputs_and_spec():
    net = build()
    del net.heads["seg"]
    assert set(net(torch.randn(1, 3, 64, 64))) == {"depth", "scene"}
    assert net.spec()["outputs"] == {"depth": 1, "scene": 5}


def test_a_spec_rebuilds_the_same_network():
    import json

    net = build(backbone="vit_tiny_patch16_224", img_size=(60, 90), resize="patch")
    again = MultiTaskNet.from_spec(json.loads(json.dumps(net.spec()))).eval()
    again.load_state_dict(net.state_dict())
    image = torch.randn(1, 3, 60, 90)
    assert all(torch.equal(a, b) for a, b in zip(net(image).values(), again(image).values(), strict=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build(backbone="mobilnet"), "timm has no model 'mobilnet'"),
        (lambda: build(head="fancy"), "head 'fancy'"),
        (lambda: build(resize="crop"), "resize 'crop'; allowed: 'never', 'patch'"),
        (lambda: build(head_width=0), "head_width 0"),
        (lambda: build(dropout=1.0), "dropout 1.0"),
        (lambda: build(img_size=(0, 96)), r"img_size \(0, 96\)"),
        (lambda: build(backbone="resnet18", output_stride=5), "'resnet18' gives no feature maps with output_stride=5"),
        (lambda: MultiTaskNet({"keys": 3}), "task name 'keys'"),
        (lambda: MultiTaskNet({"a.b": 3}), "task name 'a.b'"),
        (
            lambda: build(backbone="vit_tiny_patch16_224", output_stride=8),
            "gives no feature maps with output_stride=8",
        ),
        (lambda: MultiTaskNet({}), "at least one task"),
        (lambda: MultiTaskNet({"seg": 3}, ["scene"]), "unknown image-level task 'scene'"),
        (lambda: MultiTaskNet.from_spec({"outputs": {"seg": 3}}), "not a network spec"),
        (
            lambda: MultiTaskNet.from_spec({"outputs": {"seg": 3}, "image_level": [], "config": {"run": "x"}}),
            "not a network",
        ),
        (lambda: build(weights="/nowhere.pth"), "no weight file '/nowhere.pth'"),
    ],
)
def test_bad_choices_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_attention_keeps_nothing_of_weights_that_change():
    """timm's attention with biases holds them, as of its last forward pass, while it is in eval mode."""
    network = MultiTaskNet({"seg": 3}, config=NetworkConfig("levit_128s")).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d):
            torch.nn.init.ones_(module.weight)  # a fresh network switches its branches off
    image = torch.randn(1, 3, 224, 224)
    for _ in range(2):  # a second backward pass has a graph of its own
        network(image)["seg"].sum().backward()
    twin = copy.deepcopy(network)
    before = twin(image)["seg"]
    with torch.no_grad():
        for name, bias in twin.named_parameters():
            if name.endswith("attention_biases"):
                bias.normal_()
    assert not torch.equal(twin(image)["seg"], before)
