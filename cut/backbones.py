"""Backbones: any timm model as a pyramid of feature maps, one early and one deep, always NCHW."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import timm
import torch
from torch import Tensor, nn

EARLY_STRIDE = 4


@lru_cache(maxsize=32)
def probe(name: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, int] | None]:
    """Strides and indices of a timm model's feature maps, and its patch if it has a fixed grid; no memory is used.

    Raises:
        ValueError: If timm has no such model, or it gives no feature maps.
    """
    if not timm.is_model(name):  # takes names with a pretrained tag too, such as resnet18.a1_in1k
        near = timm.list_models(f"*{name.split('_')[0].split('.')[0]}*")[:8]
        raise ValueError(f"timm has no model {name!r}; similar ones: {near}")
    try:
        with torch.device("meta"):
            model = timm.create_model(name, features_only=True)
    except (NotImplementedError, RuntimeError, AssertionError) as error:
        raise ValueError(f"backbone {name!r} gives no feature maps: {_reason(error)}") from error
    info: Any = model.feature_info
    return tuple(info.reduction()), tuple(info.out_indices), patch_size(model)


def create(
    name: str,
    output_stride: int | None = None,
    img_size: tuple[int, int] | None = None,
    pretrained: bool = False,
) -> tuple[nn.Module, list[int]]:
    """A timm backbone that returns an early map (stride 4 where it has one) and its deepest map.

    Args:
        name: Any timm model name.
        output_stride: Stride of the deepest map, by dilation, for backbones that can.
        img_size: Height and width, for backbones with a grid of patches (ViTs, Swin). Without it a plain ViT resizes
            its position grid to each picture, any other keeps the grid timm made it for.
        pretrained: Whether timm downloads its weights.

    Returns:
        The backbone, whose forward gives the list of maps, and the maps' channels.

    Raises:
        ValueError: If timm has no such model, or it cannot give feature maps, that stride or that size.
    """
    strides, indices, patch = probe(name)
    options: dict[str, Any] = {"features_only": True, "pretrained": pretrained}
    if output_stride is not None:
        options["output_stride"] = output_stride
    if img_size is not None:
        options["img_size"] = img_size
    early = next((i for i, s in enumerate(strides) if s >= EARLY_STRIDE), 0)
    options["out_indices"] = [indices[early], indices[-1]] if early < len(strides) - 1 else [indices[-1]]
    asked = f"output_stride={output_stride}, img_size={img_size}, pretrained={pretrained}"
    try:
        model = _create(name, patch is not None and img_size is None, options)
    except (TypeError, NotImplementedError, RuntimeError, AssertionError) as error:
        raise ValueError(f"backbone {name!r} gives no feature maps with {asked}: {_reason(error)}") from error
    info: Any = model.feature_info
    reached = info.reduction()[-1]
    if output_stride is not None and reached != output_stride:
        raise ValueError(f"backbone {name!r} cannot have output_stride={output_stride}: its deepest map has {reached}")
    for module in model.modules():
        if isinstance(getattr(module, "attention_bias_cache", None), dict):
            module.register_forward_hook(_forget)
    return model, list(info.channels())


def _forget(module: Any, *_: Any) -> None:
    """Drop what timm's attention with biases keeps of its weights in eval mode.

    It would be of other weights after a cut, and of a graph that a second backward pass or a copy cannot have.
    """
    module.attention_bias_cache = {}


def _create(name: str, dynamic: bool, options: dict[str, Any]) -> Any:
    """The timm model, with a position grid that follows the picture if it has that option and ``dynamic`` asks."""
    if dynamic:
        try:
            return timm.create_model(name, dynamic_img_size=True, **options)
        except TypeError:  # Swin and others have no such option
            pass
    return timm.create_model(name, **options)


def _reason(error: Exception) -> str:
    """What an error says; timm's assertions often say nothing."""
    return str(error) or type(error).__name__


def patch_size(backbone: nn.Module) -> tuple[int, int] | None:
    """The patch of a backbone with a fixed grid of patches, else None."""
    embed = _patches(backbone)
    if embed is None or embed.grid_size is None:
        return None
    height, width = embed.patch_size
    return int(height), int(width)


def grid_pixels(backbone: nn.Module) -> tuple[int, int]:
    """Height and width in pixels of the grid of patches that a backbone was built for."""
    embed = _patches(backbone)
    (rows, columns), (height, width) = embed.grid_size, embed.patch_size
    return int(rows * height), int(columns * width)


def is_dynamic(backbone: nn.Module) -> bool:
    """Whether the backbone takes pictures of any size that is a multiple of its patch."""
    return any(getattr(m, "dynamic_img_size", False) for m in backbone.modules())


def _patches(backbone: nn.Module) -> Any:
    """The module that cuts pictures into patches, or None."""
    return next((m for m in backbone.modules() if hasattr(m, "patch_size") and hasattr(m, "grid_size")), None)


def is_nhwc(backbone: nn.Module) -> bool:
    """Whether the backbone's maps have their channels last."""
    return str(getattr(backbone, "output_fmt", "NCHW")).endswith("NHWC")


def nchw(maps: Sequence[Tensor], nhwc: bool) -> list[Tensor]:
    """Feature maps with channels second, whatever the backbone's own order is."""
    return [m.permute(0, 3, 1, 2).contiguous() if nhwc else m for m in maps]
