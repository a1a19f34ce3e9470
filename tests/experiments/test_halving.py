"""Halving: the model of the bench has half the multiply-accumulates and equal outputs."""

import pytest
import torch

from cut.cost import macs
from experiments.halving import ROUNDING, halved


@pytest.mark.slow
def test_half_of_the_multiply_accumulates_with_rounded_widths_and_equal_outputs():
    dense, masked, small, picture = halved((64, 64))
    assert 0.45 < macs(small, picture) / macs(dense, picture) <= 0.5
    convs = [m for n, m in small.backbone.named_modules() if isinstance(m, torch.nn.Conv2d)]
    assert all(m.out_channels % ROUNDING == 0 for m in convs)
    with torch.no_grad():
        for task, want in masked(picture).items():
            assert (small(picture)[task] - want).abs().max() <= 1e-4 * want.abs().max()
