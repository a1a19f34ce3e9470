"""What is unknown reaches neither loss nor metric, in every layout and both protocols, padding included."""

from pathlib import Path

import pytest
import torch
from layout_files import load

from cut.data.augmentation import Augmentation

FAMILIES = ("corrected", "legacy")


def unknown(kind: str, label: torch.Tensor) -> torch.Tensor:
    """Pixels [B, 1, H, W] without a label, as :mod:`cut.data.batch` writes them."""
    if kind == "segmentation":
        return (label == 255)[:, None]
    return label.isnan() if kind == "map" else (label == 0).all(1, keepdim=True)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_predictions_there_change_nothing(published: tuple[str, Path], legacy: bool, padded: bool) -> None:
    layout, root = published
    augmentation = Augmentation(scale=(0.5, 0.5), crop=(20, 24), pad=True) if padded else Augmentation()
    data = load(layout, root, batch_size=3, legacy=legacy, augmentation=augmentation)
    batch = next(iter(data.train_dataloader()))
    generator = torch.Generator().manual_seed(2)
    for task in data.tasks:
        label = batch[task.name]
        void = unknown(task.kind, label)
        assert not void.all() and (void.any() or (task.kind == "map" and not padded))
        output = torch.randn(len(label), task.channels, *label.shape[-2:], generator=generator, requires_grad=True)
        other = torch.where(void, 50 * torch.randn(output.shape, generator=generator), output.detach())
        loss = task.loss(output, batch)
        torch.testing.assert_close(task.loss(other, batch), loss.detach(), rtol=0, atol=0)
        (gradient,) = torch.autograd.grad(loss, output)
        assert (gradient.masked_select(void) == 0).all() and (gradient != 0).any()
        for family in FAMILIES:
            if family == "corrected" and legacy and task.name == "normal":
                continue  # normals as published have no such metrics
            first, second = task.metrics(family), task.metrics(family)
            first.update(output.detach(), label)
            second.update(other, label)
            changed, values = second.compute(), first.compute()
            for name, value in values.items():
                torch.testing.assert_close(changed[name], value, rtol=0, atol=0, equal_nan=True)
            assert any(v.isfinite() for v in values.values())
