"""Heads: shapes, the ASPP sum against a plain loop, norms that follow convolutions."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cut.heads import RATES, ASPPHead, LightHead, LinearHead

EARLY, DEEP = torch.randn(2, 6, 16, 24), torch.randn(2, 10, 4, 6)


def test_aspp_is_the_sum_of_four_dilated_branches():
    torch.manual_seed(0)
    head = ASPPHead([6, 10], 3, width=8, dropout=0.5).eval()
    state, expected = head.state_dict(), 0
    for i, rate in enumerate(RATES):
        p = f"branches.{i}."
        x = F.relu(F.conv2d(DEEP, state[p + "0.weight"], state[p + "0.bias"], padding=rate, dilation=rate))
        x = F.relu(F.conv2d(x, state[p + "3.weight"], state[p + "3.bias"]))
        expected = expected + F.conv2d(x, state[p + "6.weight"], state[p + "6.bias"])
    assert RATES == (6, 12, 18, 24)
    torch.testing.assert_close(head([EARLY, DEEP]), expected)


def test_aspp_drops_only_while_training():
    head = ASPPHead([6, 10], 3, width=8, dropout=0.5)
    assert not torch.equal(head([EARLY, DEEP]), head([EARLY, DEEP]))
    head.eval()
    assert torch.equal(head([EARLY, DEEP]), head([EARLY, DEEP]))


def test_a_paper_head_has_its_published_size():
    """cut-method 4.1: each head has 23.07 M to 23.23 M convolution weights."""
    with torch.device("meta"):
        heads = [ASPPHead([64, 512], out) for out in (1, 40)]
    sizes = [sum(m.weight.numel() for m in h.modules() if isinstance(m, nn.Conv2d)) / 1e6 for h in heads]
    assert sizes == pytest.approx([23.07, 23.23], abs=0.01)


def test_light_joins_both_maps_at_the_early_ones_size():
    head = LightHead([6, 10], 3, width=16).eval()
    out = head([EARLY, DEEP])
    assert out.shape == (2, 3, 16, 24)
    assert not torch.equal(out, head([EARLY + 1, DEEP]))
    assert not torch.equal(out, head([EARLY, DEEP + 1]))


def test_light_works_on_one_map():
    assert LightHead([10], 3, width=16).eval()([DEEP]).shape == (2, 3, 4, 6)


def test_every_norm_of_light_follows_a_convolution_and_precedes_a_relu():
    """So a channel whose incoming weights are cut can be followed to zero."""
    head = LightHead([6, 10], 3, width=16)
    modules = [m for part in (head.deep, head.early, head.join) for m in part]
    assert [type(m) for m in modules[::3]] == [nn.Conv2d] * (len(modules) // 3)
    assert all(isinstance(m, nn.BatchNorm2d) for m in modules[1::3])
    assert all(isinstance(m, nn.ReLU) for m in modules[2::3])
    assert all(a.out_channels == b.num_features for a, b in zip(modules[::3], modules[1::3], strict=True))


def test_linear_averages_the_deepest_map():
    head = LinearHead([6, 10], 5).eval()
    expected = DEEP.numpy().mean((2, 3)) @ head.out.weight.detach().numpy().T + head.out.bias.detach().numpy()
    torch.testing.assert_close(head([EARLY, DEEP]), torch.from_numpy(expected))
