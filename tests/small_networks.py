"""Small multi-task networks of the shapes that compaction must handle, and trained-looking numbers."""

import timm
import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """An inverted residual: expand, depthwise, project, add."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.expand, self.norm1 = nn.Conv2d(width, hidden, 1, bias=False), nn.BatchNorm2d(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False)
        self.norm2 = nn.BatchNorm2d(hidden)
        self.act1, self.act2 = nn.ReLU6(), nn.ReLU6()
        self.project, self.norm3 = nn.Conv2d(hidden, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        y = self.act1(self.norm1(self.expand(x)))
        y = self.act2(self.norm2(self.depthwise(y)))
        return x + self.norm3(self.project(y))


class Gate(nn.Module):
    """Squeeze and excite."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))))


class Head(nn.Module):
    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.out = nn.Conv2d(16, channels, 1)

    def features(self, x):
        return F.relu(self.norm(self.conv(x)))

    def forward(self, x, size):
        return F.interpolate(self.out(self.features(x)), size=size, mode="bilinear", align_corners=False)


class Cnn(nn.Module):
    """Residual adds, depthwise, batch norm, a gate, concatenation, flatten, and several heads on one map."""

    def __init__(self, tasks=("seg", "depth", "normal"), width: int = 24) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width)
        self.block1, self.block2, self.gate = Block(width, 48), Block(width, 48), Gate(width)
        self.low = nn.Sequential(nn.Conv2d(width, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.heads = nn.ModuleDict({t: Head(width + 12, 3) for t in tasks})
        self.scene = nn.Sequential(nn.Conv2d(width, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.classify = nn.Linear(32, 5)

    def forward(self, image):
        x = F.relu(self.norm(self.stem(image)))
        low = self.low(x)
        x = self.gate(self.block2(self.block1(x)))
        both = torch.cat([x, low], 1)
        outputs = {t: head(both, image.shape[-2:]) for t, head in self.heads.items()}
        outputs["scene"] = self.classify(self.scene(x))
        return outputs


class Vit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=0)
        self.seg, self.scene = nn.Conv2d(192, 4, 1), nn.Linear(192, 5)

    def forward(self, image):
        tokens = self.backbone.forward_features(image)
        grid = tokens[:, 1:].transpose(1, 2).reshape(len(image), 192, image.shape[2] // 16, image.shape[3] // 16)
        return {"seg": F.interpolate(self.seg(grid), scale_factor=16), "scene": self.scene(tokens[:, 0])}


def trained(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights, biases and norm statistics, none of them at its initial value."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.copy_(torch.randn(p.shape, generator=g) * 0.3 + 0.4)
            else:
                p.copy_(torch.randn(p.shape, generator=g) * (2 / p[0].numel()) ** 0.5)
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.copy_(torch.randn(m.num_features, generator=g) * 0.5)
                m.running_var.copy_(torch.rand(m.num_features, generator=g) + 0.5)
    return model.eval()


def random_mask(model: nn.Module, sparsity: float, seed: int = 0) -> dict[str, torch.Tensor]:
    """Cuts 40 % of each layer's channels whole; the others keep random weights, at least one each."""
    g = torch.Generator().manual_seed(seed)
    mask = {}
    for name, m in model.named_modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            value = torch.rand(m.weight.shape[0], m.weight[0].numel(), generator=g)
            kept = value < (1 - sparsity) / 0.6
            kept |= value == value.amin(1, keepdim=True)
            alive = torch.rand(len(value), 1, generator=g) < 0.6
            alive[0] = True
            kept &= alive | (len(value) < 8)  # a head's last layer stays connected
            mask[f"{name}.weight"] = kept.view_as(m.weight)
    return mask


def silenced(model: nn.Module, mask: dict[str, torch.Tensor], image: torch.Tensor) -> dict[str, torch.Tensor]:
    """The mask with the biases and norms of dead channels cut too."""
    from cut.masks import silence
    from cut.trace import trace

    return silence(model, mask, trace(model, image, lambda b: b))
