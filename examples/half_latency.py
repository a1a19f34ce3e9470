"""A plain PyTorch model of three tasks, cut to two of them at half its latency: python examples/half_latency.py."""

import sys

import torch
import torch.nn.functional as F
from torch import nn

import cut
from cut.recovery import recover
from cut.speed import prune_to_latency


def conv(a, b, stride=1):
    return nn.Sequential(nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())


class Net(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.trunk = nn.Sequential(conv(3, 32, 2), conv(32, width, 2), conv(width, 2 * width), conv(2 * width, width))
        self.shape, self.near = conv(width, width), conv(2 * width, width)
        self.seg, self.depth, self.count = nn.Conv2d(width, 3, 1), nn.Conv2d(width, 1, 1), nn.Linear(width, 4)

    def forward(self, image):
        x = self.trunk(image)
        shape = self.shape(x)
        near = self.near(torch.cat([x, shape], 1))  # the cross link: depth reads what segmentation found
        seg, depth = (F.interpolate(y, scale_factor=4.0) for y in (self.seg(shape), self.depth(near)))
        return {"seg": seg, "depth": depth, "count": self.count(x.mean((2, 3)))}


def pictures(seed, count=8, size=64):
    draw, (y, x) = torch.Generator().manual_seed(seed), torch.meshgrid(2 * [torch.linspace(0, 1, size)], indexing="ij")
    seg, far = torch.zeros(count, size, size, dtype=torch.long), torch.full((count, size, size), 4.0)
    there = torch.rand(3, count, 1, 1, generator=draw) < 0.7
    for kind, drawn in zip((1, 2, 2), there, strict=True):  # a disc and two boxes in front of a wall
        left, top, near = torch.rand(3, count, 1, 1, generator=draw)
        away = torch.stack([x - left, y - top])
        inside = drawn & ((away.norm(dim=0) if kind == 1 else away.abs().amax(0)) < 0.2)
        seg, far = seg.masked_fill(inside, kind), torch.where(inside, 1 + 2 * near, far)
    image = torch.stack([far / 4, 1 - far / 4, (far < 4).float()], 1)
    image = image + 0.1 * torch.randn(image.shape, generator=draw)
    return {"image": image, "seg": seg, "depth": far[:, None], "count": there.sum(0).view(-1)}


if __name__ == "__main__":
    folder, steps = sys.argv[1] if len(sys.argv) > 1 else "runs/half", int(sys.argv[2]) if len(sys.argv) > 2 else 150
    torch.manual_seed(0)
    model, batches, tasks = Net(), [pictures(i) for i in range(50)], ["seg", "depth"]
    score = {"seg": F.cross_entropy, "depth": F.l1_loss, "count": F.cross_entropy}
    losses = {t: lambda out, batch, t=t: score[t](out, batch[t]) for t in score}
    recover(model, batches, losses, list(losses), steps=steps, lr=3e-3)  # any training loop will do
    mask, found = prune_to_latency(model, batches[:10], losses, tasks, "0.5x")
    recover(model, batches, losses, tasks, steps=steps, lr=3e-3, mask=mask)
    small = cut.compact(model, tasks, mask, batches[0])
    cut.save(small, folder)
    cut.export_onnx(small, f"{folder}/half.onnx", batches[0]["image"], tasks=tasks)
    print(f"{folder}/half.onnx takes {found.reading.value:.2f} of the dense model's time")
