"""Attention: the heads of a vision transformer as units.

Known is timm's plain self-attention: one ``qkv`` layer whose rows are three blocks of heads, and a ``proj`` layer that
reads the heads side by side. A head that goes takes its rows of ``qkv`` and its columns of ``proj``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_PARTS = {"qkv", "proj", "q_norm", "k_norm"}


def is_plain(module: Any) -> bool:
    """Whether a module is attention whose heads can be cut: nothing in it but qkv, proj and norms within a head."""
    qkv, proj = getattr(module, "qkv", None), getattr(module, "proj", None)
    if not (isinstance(qkv, nn.Linear) and isinstance(proj, nn.Linear) and hasattr(module, "head_dim")):
        return False
    holders = {name.split(".")[0] for name, _ in module.named_parameters()}
    width = module.num_heads * module.head_dim
    return holders <= _PARTS and (qkv.out_features, proj.in_features) == (3 * width, width)


def plain_attention(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and modules of the attention whose heads can be cut."""
    for name, module in network.named_modules():
        if is_plain(module):
            yield name, module


def other_attention(network: nn.Module) -> Iterator[str]:
    """Names, with kinds, of attention modules of any other form."""
    for name, module in network.named_modules():
        if hasattr(module, "num_heads") and list(module.children()) and not any(map(is_plain, module.modules())):
            yield f"{name} ({type(module).__name__})"


def head_entries(module: Any) -> dict[tuple[str, int], Tensor]:
    """(tensor name within the module, dimension) to the head of each of its entries."""
    columns = torch.arange(module.num_heads).repeat_interleave(module.head_dim)
    entries = {("qkv.weight", 0): columns.repeat(3), ("proj.weight", 1): columns}
    if module.qkv.bias is not None:
        entries["qkv.bias", 0] = columns.repeat(3)
    return entries


def product_macs(module: Any, tokens: int) -> int:
    """Multiply-accumulates of one head's two matrix products for one picture of so many tokens."""
    return 2 * tokens * tokens * int(module.head_dim)


def fit_heads(module: Any) -> None:
    """Set the number of heads of a plain attention from the rows of its ``qkv``.

    Raises:
        ValueError: If the rows are no whole number of heads, or ``proj`` reads another number.
    """
    rows, width = module.qkv.weight.shape[0], module.proj.weight.shape[1]
    heads, rest = divmod(rows, 3 * module.head_dim)
    if rest or not heads or width != heads * module.head_dim:
        raise ValueError(f"attention has {rows} rows of qkv and {width} columns of proj; heads of {module.head_dim}")
    module.num_heads = heads
    if hasattr(module, "attn_dim"):
        module.attn_dim = width
