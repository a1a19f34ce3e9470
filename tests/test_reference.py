"""Reference mode against a naive re-implementation of the published procedure (arXiv 2504.09803, released form)."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cut.budget import KeepRatio, Size
from cut.decomposition import owners, prunable
from cut.fusion import Vote
from cut.scores import Sensitivity
from tests.small_networks import Cnn, Vit, trained

RATIO = 0.3


def batches(seed: int = 0, count: int = 3):
    g = torch.Generator().manual_seed(seed)
    return [
        {
            "image": torch.randn(2, 3, 32, 32, generator=g),
            "seg": torch.randint(3, (2, 32, 32), generator=g),
            "depth": torch.rand(2, 3, 32, 32, generator=g),
            "normal": torch.rand(2, 3, 32, 32, generator=g),
            "scene": torch.randint(5, (2,), generator=g),
        }
        for _ in range(count)
    ]


LOSSES = {
    "seg": lambda out, batch: F.cross_entropy(out, batch["seg"]),
    "depth": lambda out, batch: F.l1_loss(out, batch["depth"]),
    "normal": lambda out, batch: F.mse_loss(out, batch["normal"]),
    "scene": lambda out, batch: F.cross_entropy(out, batch["scene"]),
}


class Masked(nn.Module):
    """A layer whose frozen weight is multiplied by a trainable mask of ones."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.mask = layer, nn.Parameter(torch.ones_like(layer.weight))
        for p in layer.parameters():
            p.requires_grad_(False)

    def forward(self, x):
        weight = self.layer.weight * self.mask
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, self.layer.bias)
        return self.layer._conv_forward(x, weight, self.layer.bias)


def naive(model, data, selected, votes, ratio, head_of):
    """Mask parameters, one full forward and one backward per task and batch, a global top-k per sub-model, votes.

    ``head_of`` gives the task whose head a weight is in, or None for the backbone. Returns name to bool for the
    backbone and the selected heads.
    """
    names = list(prunable(model))
    net = copy.deepcopy(model).train()
    layers = {}
    for name in names:
        parent, _, attribute = name.removesuffix(".weight").rpartition(".")
        holder = net.get_submodule(parent)
        layers[name] = Masked(getattr(holder, attribute))
        setattr(holder, attribute, layers[name])
    task_keep = {}
    for task in selected:
        mine = [n for n in names if head_of(n) in (None, task)]
        total = {n: torch.zeros_like(layers[n].mask) for n in mine}
        for batch in data:
            net.zero_grad(set_to_none=True)
            LOSSES[task](net(batch["image"])[task], batch).backward()
            for n in mine:
                if layers[n].mask.grad is not None:
                    total[n] += layers[n].mask.grad.abs()
        flat = torch.cat([total[n].flatten() for n in mine])
        flat = flat / flat.sum()
        threshold = torch.topk(flat, int(ratio * len(flat)), sorted=True).values[-1]
        parts = flat.split([total[n].numel() for n in mine])
        task_keep[task] = {n: (p >= threshold).view_as(total[n]) for n, p in zip(mine, parts, strict=True)}
    kept = {}
    for n in names:
        if head_of(n) is None:
            kept[n] = torch.stack([task_keep[t][n] for t in selected]).sum(0) >= votes
        elif head_of(n) in selected:
            kept[n] = task_keep[head_of(n)][n]
    return kept


class DenseCnn(Cnn):
    """The CNN with its dense heads only."""

    def __init__(self) -> None:
        super().__init__(tasks=("seg", "depth", "normal"))
        del self.scene, self.classify

    def forward(self, image):
        x = F.relu(self.norm(self.stem(image)))
        both = torch.cat([self.gate(self.block2(self.block1(x))), self.low(x)], 1)
        return {t: head(both, image.shape[-2:]) for t, head in self.heads.items()}


def cnn():
    torch.manual_seed(0)
    in_head = lambda name: name.split(".")[1] if name.startswith("heads.") else None  # noqa: E731
    return trained(DenseCnn()), ["seg", "depth", "normal"], in_head


class Vit3(Vit):
    """A ViT with a third, dense task."""

    def __init__(self) -> None:
        super().__init__()
        self.seg = nn.Conv2d(192, 3, 1)
        self.depth = nn.Conv2d(192, 3, 1)

    def forward(self, image):
        tokens = self.backbone.forward_features(image)
        grid = tokens[:, 1:].transpose(1, 2).reshape(len(image), 192, image.shape[2] // 16, image.shape[3] // 16)
        up = {t: F.interpolate(getattr(self, t)(grid), scale_factor=16) for t in ("seg", "depth")}
        return {**up, "scene": self.scene(tokens[:, 0])}


def vit():
    torch.manual_seed(0)
    model = Vit3()
    return (
        model,
        ["seg", "depth", "scene"],
        lambda n: n.split(".")[0] if not n.startswith("backbone") else None,
    )


@pytest.mark.parametrize("build", [cnn, vit])
@pytest.mark.parametrize("selected", [1, 2, 3])
@pytest.mark.parametrize("votes", [1, 2, 3])
def test_reference_mode_gives_the_reference_masks(build, selected, votes):
    model, tasks, head_of = build()
    data, losses = batches(), {t: LOSSES[t] for t in tasks}
    chosen = tasks[:selected]
    expected = naive(model, data, chosen, votes, RATIO, head_of)

    scores = Sensitivity(mode="train")(model, data, losses, chosen)
    used = owners(model, data[0], losses, tasks)
    shared = frozenset(n for n in prunable(model) if sum(n in u for u in used.values()) > 1)
    mask = KeepRatio(RATIO, votes).mask(scores, Vote(0.5), Size(0, shared=shared))

    assert set(mask) == set(expected)
    for name in expected:
        assert torch.equal(mask[name], expected[name]), name


def test_scores_equal_the_gradient_of_a_mask_of_ones():
    model, tasks, _head_of = cnn()
    data = batches(count=2)
    scores = Sensitivity()(model, data, {t: LOSSES[t] for t in tasks}, tasks)
    net = copy.deepcopy(model).eval()
    total = torch.zeros_like(net.block1.project.weight)
    for batch in data:
        layer = net.block1.project
        mask = torch.ones_like(layer.weight, requires_grad=True)
        handle = layer.register_forward_hook(lambda m, a, o, mask=mask: F.conv2d(a[0], m.weight * mask))
        loss = LOSSES["seg"](net(batch["image"])["seg"], batch)
        total += torch.autograd.grad(loss, mask)[0].abs()
        handle.remove()
    torch.testing.assert_close(scores["seg"]["block1.project.weight"], total, rtol=1e-5, atol=1e-8)
