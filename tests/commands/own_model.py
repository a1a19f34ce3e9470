"""A model of someone's own, as ``module:function`` for the command: plain PyTorch, a cross link, own data."""

import torch
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    """A trunk, two heads, and one that reads another's features."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1), nn.ReLU())
        self.low, self.high = nn.Conv2d(width, 8, 3, 1, 1), nn.Conv2d(width, 8, 3, 1, 1)
        self.depth, self.seg = nn.Conv2d(8, 1, 1), nn.Conv2d(16, 2, 1)
        self.count = nn.Linear(width, 3)

    def forward(self, image):
        x = self.trunk(image)
        low, high = F.relu(self.low(x)), F.relu(self.high(x))
        return {
            "seg": F.interpolate(self.seg(torch.cat([low, high], 1)), scale_factor=2.0),
            "depth": F.interpolate(self.depth(low), scale_factor=2.0),
            "count": self.count(x.mean((2, 3))),
        }


def pictures(seed: int, count: int = 4, size: int = 16):
    """Batches (image, labels): what is bright is class 1 and near."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        image = F.interpolate(torch.rand(8, 3, 4, 4, generator=g), (size, size), mode="bilinear")
        bright = image.mean(1, keepdim=True)
        labels = {"seg": (bright[:, 0] > 0.5).long(), "depth": 1 - bright, "count": (bright.mean((1, 2, 3)) * 3).long()}
        found.append((image, labels))
    return found


def accuracy(output, batch):
    return (output.argmax(1) == batch[1]["seg"]).float().mean()


TASKS = {
    "seg": (lambda out, batch: F.cross_entropy(out, batch[1]["seg"]), {"accuracy": accuracy}),
    "depth": lambda out, batch: F.l1_loss(out, batch[1]["depth"]),
    "count": lambda out, batch: F.cross_entropy(out, batch[1]["count"]),
}


def setup():
    """Everything that the command needs."""
    torch.manual_seed(0)
    return Net(), pictures(0), TASKS, pictures(2, 1)[0][0], pictures(1)


def short():
    return Net(), pictures(0)


def untold():
    return Net(), pictures(0), {"seg": TASKS["seg"]}, pictures(2, 1)[0][0]


def odd():
    return Net(), pictures(0), {**TASKS, "depth": "l1"}, pictures(2, 1)[0][0]


def exploding():
    model, loader, tasks, example, test = setup()
    return model, loader, {**tasks, "depth": lambda out, _: out.sum() * float("nan")}, example, test


number = 3


FACTS = {
    "input": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
    "tasks": {"seg": {"classes": ["dark", "bright"]}, "depth": {"kind": "depth", "unit": "m"}},
}


def described():
    """The same, and what its pictures and outputs are; it is judged on what it is trained on."""
    model, loader, tasks, example, _ = setup()
    return model, loader, tasks, example, None, FACTS


def misdescribed():
    return *described()[:5], {"tasks": {"seg": {"kind": "depth"}}}


def described_too_much():
    return *described()[:5], {"tasks": {"pose": {"unit": "m"}}}
