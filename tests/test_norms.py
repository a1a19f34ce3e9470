"""Norms that have lost channels: the function of a whole norm whose other channels are zero; files; what is known."""

import copy
import json

import pytest
import torch
from timm.layers import LayerNorm2d
from torch import nn

from cut import checkpoint, modelfile
from cut.compact import compact
from cut.export import check_parity, export_onnx
from cut.network import MultiTaskNet, NetworkConfig
from cut.norms import PartialNorm, is_channel_norm, partial, whole_width
from cut.units import find_groups, weight_mask
from tests.small_networks import trained
from tests.test_hostile_files import rewrite


def norm_of(kind, bias):
    norm = kind(12, bias=bias) if kind is nn.LayerNorm else kind(12)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(12) + 0.5)
        if norm.bias is not None:
            norm.bias.copy_(torch.randn(12))
    return norm


@pytest.mark.parametrize("kind, bias", [(nn.LayerNorm, True), (nn.LayerNorm, False), (LayerNorm2d, True)])
@pytest.mark.parametrize("left", [[0, 1, 2], [11], [1, 4, 7, 8, 10]])
def test_outputs_and_gradients_are_those_of_the_whole_norm_whose_other_channels_are_zero(kind, bias, left):
    torch.manual_seed(0)
    whole = norm_of(kind, bias).double()
    dim, shape = (1, (2, 12, 3, 4)) if kind is LayerNorm2d else (-1, (2, 5, 12))
    x = torch.randn(shape, dtype=torch.float64)
    gone = torch.ones(12, dtype=torch.bool)
    gone[left] = False
    x.index_fill_(dim, gone.nonzero().squeeze(1), 0)
    smaller = copy.deepcopy(whole)
    for name, p in list(smaller.named_parameters()):
        setattr(smaller, name, nn.Parameter(p[left]))
    smaller = partial(smaller)
    assert (smaller.full, smaller.normalized_shape) == (12, (len(left),)) and whole_width(smaller) == 12
    big, small = x.clone().requires_grad_(), x.index_select(dim, torch.tensor(left)).requires_grad_()
    want, got = whole(big).index_select(dim, torch.tensor(left)), smaller(small)
    assert got.shape == small.shape
    torch.testing.assert_close(got, want)
    (want * want.detach().cos()).sum().backward()
    (got * got.detach().cos()).sum().backward()
    torch.testing.assert_close(small.grad, big.grad.index_select(dim, torch.tensor(left)))
    torch.testing.assert_close(smaller.weight.grad, whole.weight.grad[left])


def test_it_can_lose_channels_again_and_still_counts_all():
    once = PartialNorm(8, 12)
    once.weight, once.bias = nn.Parameter(once.weight[:3]), nn.Parameter(once.bias[:3])
    twice = partial(once)
    x = torch.zeros(2, 12)
    x[:, :3] = torch.randn(2, 3)
    assert twice.full == 12
    torch.testing.assert_close(twice(x[:, :3]), nn.LayerNorm(12)(x)[:, :3])


def test_norms_of_other_forms_are_not_taken_for_it():
    class Own(nn.LayerNorm):
        def forward(self, x):
            return x - x.mean()

    others = [nn.LayerNorm((3, 4)), nn.LayerNorm(4, elementwise_affine=False), nn.GroupNorm(1, 4), Own(4)]
    assert (
        not any(map(is_channel_norm, others)) and is_channel_norm(nn.LayerNorm(4)) and is_channel_norm(LayerNorm2d(4))
    )


def halved(backbone):
    """A network with its stages' or its embedding's widths halved, compact, with the masked one's outputs."""
    torch.manual_seed(0)
    grid = (32, 32) if "vit" in backbone else None
    network = trained(MultiTaskNet({"seg": 4}, config=NetworkConfig(backbone, head_width=8, img_size=grid)))
    image = torch.randn(2, 3, 32, 32)
    groups = [g for g in find_groups(network, image) if any("norm" in s.name for s in g.slots) and "head" not in g.name]
    kept = {g.name: torch.arange(g.units) % 2 == 0 for g in groups}
    mask = weight_mask(network, groups, kept)
    masked = copy.deepcopy(network)
    with torch.no_grad():
        for name, p in masked.named_parameters():
            p.mul_(mask.get(name, torch.ones(())))
        return compact(network, ["seg"], mask, image), image, masked(image)


@pytest.mark.parametrize("backbone", ["test_vit", "test_convnext"])
def test_a_network_cut_in_its_width_is_small_saved_loaded_and_exported(backbone, tmp_path):
    small, image, want = halved(backbone)
    norms = [m for m in small.modules() if isinstance(m, nn.LayerNorm)]
    assert norms and all(isinstance(m, PartialNorm) and m.full == 2 * m.normalized_shape[0] for m in norms)
    with torch.no_grad():
        torch.testing.assert_close(small(image)["seg"], want["seg"], atol=1e-4, rtol=1e-4)
        checkpoint.save(small, tmp_path / "small")
        loaded = checkpoint.load(tmp_path / "small")
        assert torch.equal(loaded(image)["seg"], small(image)["seg"])
        again = compact(loaded, ["seg"], None, image)
        torch.testing.assert_close(again(image)["seg"], want["seg"], atol=1e-4, rtol=1e-4)
    export_onnx(small, tmp_path / "small.onnx", image, tasks=["seg"])
    assert set(check_parity(tmp_path / "small.onnx", small, [image])) == {"seg"}


def forget_one(norms):
    norms.pop(next(iter(norms)))


@pytest.mark.parametrize(
    "change",
    [
        lambda norms: norms.update(dict.fromkeys(norms, 40)),
        lambda norms: norms.update(dict.fromkeys(norms, True)),
        lambda norms: norms.update(dict.fromkeys(norms, "os.system")),
        lambda norms: norms.update({"heads.seg.out": 64}),
        lambda norms: norms.update({"": 64}),
        forget_one,
    ],
)
def test_a_file_that_says_wrongly_what_a_norm_counts_is_refused(change, tmp_path):
    small, *_ = halved("test_vit")
    checkpoint.save(small, tmp_path)
    assert set(json.loads((tmp_path / modelfile.SPEC).read_text())["norms"].values()) == {64}
    rewrite(tmp_path, lambda spec: change(spec["norms"]))
    with pytest.raises(ValueError, match=r"norm|'norms'"):
        checkpoint.load(tmp_path)
