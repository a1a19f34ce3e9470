"""The multi-task network: one timm backbone, one head per task, outputs by task name."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from cut import backbones, weights
from cut.decomposition import check_tasks
from cut.heads import ASPPHead, LightHead, LinearHead

HEADS, RESIZES = ("light", "aspp"), ("never", "patch")
SIDE = 64  # pixels of a small picture: every stage of a CNN of stride 32 has a map of more than one position


@dataclass(frozen=True)
class NetworkConfig:
    """What a network is built from; all of it plain numbers and words, so that a file can carry it.

    Attributes:
        backbone: Any timm model name.
        weights: None (random), ``"timm"`` (timm's own download), ``"cache"`` (fetched by ``make weights``),
            ``"auto"`` (cache if there, else random) or the path of a state-dict file.
        output_stride: Stride of the deepest map, where the backbone can be dilated.
        head: ``"light"`` or the paper's ``"aspp"``.
        head_width: Channels inside a dense head.
        dropout: Dropout probability in the heads.
        img_size: Height and width of the pictures, for backbones with a grid of patches: the grid is built for the
            nearest multiple of the patch. Without it a plain ViT follows the picture, others keep timm's own size.
        resize: What happens to a picture that is not of the size that the grid of patches needs: ``"patch"`` resizes
            it bilinearly (to ``img_size``'s grid, else to the nearest multiple of the patch), ``"never"`` refuses it.

    Raises:
        ValueError: For a head, head width, dropout, size or resize that is not allowed.
    """

    backbone: str = "mobilenetv2_100"
    weights: str | None = None
    output_stride: int | None = None
    head: Literal["light", "aspp"] = "light"
    head_width: int = 64
    dropout: float = 0.0
    img_size: tuple[int, int] | None = None
    resize: Literal["never", "patch"] = "never"

    def __post_init__(self) -> None:
        for field, value, allowed in (("head", self.head, HEADS), ("resize", self.resize, RESIZES)):
            if value not in allowed:
                raise ValueError(f"{field} {value!r}; allowed: {', '.join(map(repr, allowed))}")
        if self.head_width < 1:
            raise ValueError(f"head_width {self.head_width}; allowed: 1 or more channels")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout}; allowed: 0 <= dropout < 1")
        if self.img_size is not None:
            if len(self.img_size) != 2 or min(self.img_size) < 1:
                raise ValueError(f"img_size {self.img_size}; allowed: a height and a width in pixels")
            # A list, as JSON and YAML give it, becomes the tuple that it was.
            object.__setattr__(self, "img_size", (int(self.img_size[0]), int(self.img_size[1])))


class MultiTaskNet(nn.Module):
    """A backbone shared by all tasks and a head for each.

    Deleting an entry of ``heads`` is how a task is dropped for good; :meth:`select` only stops running it.

    Args:
        outputs: Task to output channels.
        image_level: Tasks with one label per picture; the others are dense.
        config: What to build from.

    Attributes:
        active: The tasks whose heads run.
        weights_source: Where the backbone's weights came from, for records: ``"random"``, ``"timm"``, or the
            ``weights`` entry and the name of the file that was read.
        mean: Of the pictures that the backbone expects, per channel.
        std: Likewise.

    Raises:
        ValueError: For no task, a task name that a module cannot have, an unknown image-level task, or what the
            backbone, its weights or the config do not allow.
    """

    def __init__(
        self,
        outputs: Mapping[str, int],
        image_level: Collection[str] = (),
        config: NetworkConfig | None = None,
    ) -> None:
        super().__init__()
        config = config or NetworkConfig()
        if not outputs:
            raise ValueError("a multi-task network needs at least one task; got none")
        unknown = sorted(set(image_level) - set(outputs))
        if unknown:
            raise ValueError(f"unknown image-level task {unknown[0]!r}; the tasks are {sorted(outputs)}")
        bad = [t for t in outputs if not t or "." in t or hasattr(nn.ModuleDict, t)]
        if bad:
            raise ValueError(f"task name {bad[0]!r}; allowed: not empty, no dot, no attribute of torch's ModuleDict")
        self.config, self.image_level = config, tuple(t for t in outputs if t in image_level)
        grid = self._grid(config.img_size, backbones.probe(config.backbone)[2]) if config.img_size else None
        self.backbone, self.channels = backbones.create(
            config.backbone, config.output_stride, grid, config.weights == "timm"
        )
        self.patch, self.nhwc = backbones.patch_size(self.backbone), backbones.is_nhwc(self.backbone)
        self.dynamic = backbones.is_dynamic(self.backbone)
        self.weights_source = self._load(config.weights)
        self.heads = nn.ModuleDict({t: self._head(t, c) for t, c in outputs.items()})
        self._channels_out = dict(outputs)
        self.active: list[str] = list(outputs)
        pretrained = getattr(self.backbone, "pretrained_cfg", None) or getattr(self.backbone, "default_cfg", None) or {}
        self.mean = tuple(pretrained.get("mean", (0.485, 0.456, 0.406)))
        self.std = tuple(pretrained.get("std", (0.229, 0.224, 0.225)))

    @property
    def outputs(self) -> dict[str, int]:
        """Task to output channels, of the heads that are there."""
        return {t: self._channels_out[t] for t in self.heads}

    def _grid(self, size: tuple[int, int], patch: tuple[int, int] | None) -> tuple[int, int]:
        """The sides nearest to ``size`` that are multiples of the patch."""
        if patch is None or all(s % p == 0 for s, p in zip(size, patch, strict=True)):
            return size
        if self.config.resize == "never":
            raise ValueError(
                f"pictures of {size[0]}x{size[1]} are no multiple of {self.config.backbone}'s "
                f"patch {patch[0]}x{patch[1]}; "
                "choose other sides or resize='patch'"
            )
        return max(1, round(size[0] / patch[0])) * patch[0], max(1, round(size[1] / patch[1])) * patch[1]

    def _head(self, task: str, channels: int) -> nn.Module:
        config = self.config
        if task in self.image_level:
            return LinearHead(self.channels, channels, config.dropout)
        kind = ASPPHead if config.head == "aspp" else LightHead
        return kind(self.channels, channels, config.head_width, config.dropout)

    def _load(self, source: str | None) -> str:
        """Load the backbone's weights; returns where they came from, for the record."""
        if source is None:
            return "random"
        if source == "timm":
            return "timm"
        found = weights.find(self.config.backbone, source)
        if found is None:
            return "random"
        weights.load(self.backbone, found)
        return f"{source}:{Path(found).name}"

    def select(self, tasks: Sequence[str]) -> None:
        """Run only the heads of these tasks from now on.

        Raises:
            ValueError: If the selection is empty, or names an unknown task or one twice.
        """
        self.active = check_tasks(tasks, set(self.heads))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Outputs of the selected tasks.

        Args:
            image: [B, 3, H, W], normalised with ``mean`` and ``std``.

        Returns:
            Dense tasks [B, C, H, W] at the picture's resolution, image-level tasks [B, C].
        """
        size = image.shape[-2:]
        maps = backbones.nchw(self.backbone(self._fitted(image)), self.nhwc)
        outputs = {}
        for task, head in self.heads.items():
            if task not in self.active:
                continue
            out = head(maps)
            if task not in self.image_level:
                out = F.interpolate(out, size=size, mode="bilinear", align_corners=False)
            outputs[task] = out
        return outputs

    def _fitted(self, image: Tensor) -> Tensor:
        """The picture at a size the backbone takes; never cropped."""
        if self.patch is None:
            return image
        sides = (int(image.shape[-2]), int(image.shape[-1]))
        target = self._grid(sides, self.patch) if self.dynamic else backbones.grid_pixels(self.backbone)
        if target == sides:
            return image
        if self.config.resize == "never":
            raise ValueError(
                f"pictures of {sides[0]}x{sides[1]} do not fit {self.config.backbone}, built for "
                f"{target[0]}x{target[1]}; set img_size, or resize='patch'"
            )
        return F.interpolate(image, size=target, mode="bilinear", align_corners=False)

    def spec(self) -> dict[str, Any]:
        """Everything that :meth:`from_spec` needs to build the same network, as JSON-able values."""
        return {"outputs": self.outputs, "image_level": list(self.image_level), "config": asdict(self.config)}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> MultiTaskNet:
        """The network that a spec describes, with random weights; no weight file is read.

        Raises:
            ValueError: If the spec holds unknown or wrong entries.
        """
        try:
            config = dict(spec["config"], weights=None)
            outputs = {str(t): int(c) for t, c in spec["outputs"].items()}
            image_level = [t for t in spec["image_level"] if t in outputs]
            return cls(outputs, image_level, NetworkConfig(**config))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a network spec: {error}") from error


def picture_size(network: MultiTaskNet) -> tuple[int, int]:
    """Height and width of a picture that the network takes: ``img_size`` if it is set, else a small one."""
    if network.config.img_size is not None:
        return network.config.img_size
    if network.patch is None:
        return SIDE, SIDE
    if network.dynamic:
        return 2 * network.patch[0], 2 * network.patch[1]
    return backbones.grid_pixels(network.backbone)
