"""Checkpoint: save and load a compact network without pickle.

The file (:mod:`cut.modelfile`) holds what was removed and the shape of every tensor. Loading builds the dense
network again, removes the same parts, sets the same sizes and fills in the tensors. Our own dense network is built
without memory for its parameters, so that loading takes what the file holds and not what its dense form would.

A network is built from the file only if it is our own :class:`cut.network.MultiTaskNet`; for any other network the
caller gives a ``builder``. A file never names code to import.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cut.attention import fit_heads, plain_attention
from cut.modelfile import DTYPES, is_shape, read_spec, read_tensors, write
from cut.norms import is_channel_norm, partial, put, widths
from cut.sizes import can_shrink, sizes
from cut.stub import Structure, Stub, TaskSubset

_OWN, _FOREIGN = "multitasknet", "foreign"
# Numbers in the dense form, and in those of its tensors that must be made because a file does not hold them.
_MAX_DEPTH, _MAX_DENSE, _MAX_MADE = 16, 1 << 31, 1 << 25
_SINCE: dict[str, Any] = {"norms": {}}  # entries that older files lack, with what they mean by that


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    metadata: Mapping[str, Any] | None = None,
    sparse: bool | None = None,
) -> int:
    """Write a model, compact or not, to a folder as ``model.json`` and ``model.safetensors``.

    Args:
        model: The network; tied weights are stored once.
        folder: Where to; made if missing. Other files in it are left alone.
        metadata: JSON-able facts to keep with the model, see :func:`read_metadata`.
        sparse: Store a tensor as bit mask and non-zero values: None = where that is smaller, False = never,
            True = every floating-point tensor.

    Returns:
        Bytes on disk of the two files.

    Raises:
        ValueError: If the model has state that is not a tensor, or metadata that is not JSON-able.
        OSError: If the files cannot be written; the folder is then as it was.
    """
    network = model.module if isinstance(model, TaskSubset) else model
    tensors, aliases = _state(network)
    modules = dict(network.named_modules(remove_duplicate=False))
    own = _own_spec(network)
    spec = {
        "kind": _FOREIGN if own is None else _OWN,
        "network": own,
        "tasks": _filter(model),
        "entries": {n: list(m) for n, m in modules.items() if isinstance(m, nn.ModuleDict)},
        "stubs": {n: m.structure for n, m in modules.items() if isinstance(m, Stub)},
        "norms": widths(network),
        "aliases": aliases,
        "metadata": dict(metadata or {}),
    }
    return write(Path(folder), spec, tensors, sparse)


def load(folder: str | Path, builder: Callable[[], nn.Module] | None = None) -> nn.Module:
    """The saved model in eval mode on the CPU; its outputs are those of the model that was saved, to the bit.

    Args:
        folder: What :func:`save` wrote.
        builder: Returns the dense network that the model was made from. Not needed for a
            :class:`cut.network.MultiTaskNet`.

    Raises:
        ValueError: If the files are missing, damaged or do not fit the network; the message says which.
    """
    folder = Path(folder)
    spec = read_spec(folder)
    _check_spec(spec, builder)
    network = builder() if builder is not None else _build_own(spec["network"])
    _check_fit(network, spec["tensors"])
    tensors = read_tensors(folder, spec)
    network = _filled(network, spec, tensors)
    if builder is None and any(t.is_meta for t in _tensors(network)):
        network = _filled(_build_own(spec["network"], computed=True), spec, tensors)
    if spec["tasks"] is not None and spec["kind"] == _OWN:
        network.select(spec["tasks"])  # type: ignore[operator]
    elif spec["tasks"] is not None:
        network = TaskSubset(network, spec["tasks"])
    network.eval()
    if builder is None:
        _check_runs(network)
    return network


def read_metadata(folder: str | Path) -> dict[str, Any]:
    """What was given to :func:`save` as metadata.

    Raises:
        ValueError: If the folder holds no valid model file.
    """
    metadata = read_spec(Path(folder)).get("metadata")
    if not isinstance(metadata, dict):
        raise ValueError(f"{folder}: 'metadata' must be an object")
    return metadata


def is_foreign(folder: str | Path) -> bool:
    """Whether a saved model can only be loaded with a builder: it is no :class:`cut.network.MultiTaskNet`.

    Raises:
        ValueError: If the folder holds no valid model file.
    """
    return read_spec(Path(folder)).get("kind") != _OWN


# ---------------------------------------------------------------------------------------------------- saving


def _state(network: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors by name, each once, and further names of tied ones: {further name: first name}."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, value in network.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise ValueError(f"cannot save {name!r}: {type(value).__name__} is not a tensor")
        if id(value) in first:
            aliases[name] = first[id(value)]
        else:
            first[id(value)] = name
            tensors[name] = value.detach().clone()
    return tensors, aliases


def _filter(model: Any) -> list[str] | None:
    """The tasks that a wrapper, or the selection in our own network, leaves; None if it leaves all."""
    if isinstance(model, TaskSubset):
        return list(model.tasks)
    if _own_spec(model) is None or set(model.heads) <= set(model.active):
        return None
    return [task for task in model.heads if task in model.active]


def _own_spec(network: Any) -> dict[str, Any] | None:
    """The specification of our own network, None for any other."""
    module = sys.modules.get("cut.network")  # never imported: then it cannot be one of ours
    return network.spec() if module is not None and type(network) is module.MultiTaskNet else None


# -------------------------------------------------------------------------------------------------- checking


def _check_spec(spec: Mapping[str, Any], builder: Callable[[], nn.Module] | None) -> None:
    """Refuse a description that does not follow the schema, before anything is built."""
    strings = (str,)
    checks = {
        "kind": lambda v: v in (_OWN, _FOREIGN),
        "network": lambda v: isinstance(v, dict) if spec.get("kind") == _OWN else v is None,
        "tasks": lambda v: v is None or (_is_list_of(v, strings) and len(v) == len(set(v)) > 0),
        "entries": lambda v: isinstance(v, dict) and all(_is_list_of(keys, strings) for keys in v.values()),
        "stubs": lambda v: isinstance(v, dict) and all(_is_structure(s, _MAX_DEPTH) for s in v.values()),
        "norms": lambda v: isinstance(v, dict) and all(type(n) is int for n in v.values()),
        "aliases": lambda v: (
            isinstance(v, dict) and all(isinstance(n, str) and n in spec["tensors"] for n in v.values())
        ),
        "metadata": lambda v: isinstance(v, dict),
    }
    for key, check in checks.items():
        if (key not in spec and key not in _SINCE) or not check(spec.get(key, _SINCE.get(key))):
            raise ValueError(f"the model file is not valid: {key!r} is missing or has a wrong value")
    if spec["kind"] == _FOREIGN and builder is None:
        raise ValueError("the model file is of a foreign network: give load() a builder of the dense network")


def _check_fit(network: nn.Module, entries: Mapping[str, Any]) -> None:
    """Refuse tensors that are larger than the dense network's, or of another kind, before any is read."""
    for name, dense in network.state_dict(keep_vars=True).items():
        if name not in entries:
            continue
        shape, dtype = entries[name]["shape"], getattr(torch, entries[name]["dtype"])
        larger = len(shape) != dense.ndim or any(s > d for s, d in zip(shape, dense.shape, strict=True))
        if larger or dtype.is_floating_point != dense.is_floating_point():
            found, wanted = f"{tuple(shape)} of {dtype}", f"{tuple(dense.shape)} of {dense.dtype}"
            raise ValueError(f"the model file does not fit the network: {name} is {found}, dense it is {wanted}")


def _check_runs(network: Any) -> None:
    """Refuse one of our networks whose layers do not fit each other: a picture has to go through.

    A small one, or, since some backbones take one size only, one of the size that theirs was made for.
    """
    from timm.models import get_pretrained_cfg

    from cut.network import picture_size

    made_for = get_pretrained_cfg(network.config.backbone)
    pictures = [picture_size(network), *([made_for.input_size[-2:]] if made_for else [])]
    dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
    problem: Exception | None = None
    for size in pictures:
        try:
            with torch.no_grad():
                network(torch.zeros(1, 3, *size, dtype=dtype))
            return
        except Exception as error:  # layers that do not fit each other fail in many ways
            problem = problem or error
    raise ValueError(f"the model file is not valid: no picture goes through its network: {problem}") from problem


def _is_list_of(value: Any, types: tuple[type, ...]) -> bool:
    return isinstance(value, list) and all(isinstance(entry, types) for entry in value)


def _is_structure(value: Structure, depth: int) -> bool:
    """Whether a JSON value is what :func:`cut.stub.structure_of` returns."""
    if value is None:
        return True
    if not isinstance(value, dict) or depth == 0:
        return False
    if set(value) == {"tensor", "dtype"}:
        return is_shape(value["tensor"], lowest=-1) and value["dtype"] in list(DTYPES)
    if set(value) == {"dict"}:
        return isinstance(value["dict"], dict) and all(_is_structure(v, depth - 1) for v in value["dict"].values())
    if set(value) in ({"tuple"}, {"list"}):
        entries = next(iter(value.values()))
        return isinstance(entries, list) and all(_is_structure(v, depth - 1) for v in entries)
    return False


# -------------------------------------------------------------------------------------------------- building


def _build_own(spec: dict[str, Any], computed: bool = False) -> nn.Module:
    """Our own dense network, without memory for what the file holds, so that no size can hurt.

    Args:
        spec: The specification.
        computed: Make the tensors that a network computes for itself and no file holds, such as the positions of
            windows and of tokens. Only after the file has been compared with the network that has none.

    Raises:
        ValueError: If the specification is not valid, or its network too large.
    """
    from cut.network import MultiTaskNet

    try:
        with torch.device("meta"):
            network = MultiTaskNet.from_spec(spec)
        parameters = sum(p.numel() for p in network.parameters())
        others = sum(t.numel() for t in _tensors(network)) - parameters
        if parameters + others > _MAX_DENSE:
            raise ValueError(f"its dense form has {parameters + others} numbers; at most {_MAX_DENSE} are allowed")
        if not computed:
            return network
        if others > _MAX_MADE:
            raise ValueError(f"{others} of its numbers are no parameters; at most {_MAX_MADE} are allowed")
        with _parameters_without_memory():
            return MultiTaskNet.from_spec(spec)
    except Exception as error:  # timm raises many kinds for names and sizes that it does not know
        raise ValueError(f"the network in the model file cannot be built: {error}") from error


def _tensors(network: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and tensors that modules have as mere attributes."""
    attributes = (value for module in network.modules() for value in vars(module).values())
    return chain(network.parameters(), network.buffers(), (v for v in attributes if isinstance(v, Tensor)))


class _Uninitialised(TorchFunctionMode):
    """Leaves out what would write into a parameter of a single number."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call it, or give what it would write into back."""
        named = kwargs or {}
        target = args[0] if args else named.get("tensor")  # as torch.nn.init passes it
        name = getattr(func, "__name__", "")
        writes = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        if writes and isinstance(target, Tensor) and target.numel() > 1 and not any(target.stride()):
            return target
        return func(*args, **named)


@contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """What this thread builds has parameters of one number each, shown as many; its other tensors are made.

    On the meta device they would take that of the parameters, as timm looks at these to find its device.
    """
    thread = threading.get_ident()

    def emptied(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or threading.get_ident() != thread:
            return None  # as it is
        one = torch.zeros((), dtype=parameter.dtype)
        return nn.Parameter(one.expand(parameter.shape), parameter.requires_grad)

    hook: Any = emptied
    handle = nn.modules.module.register_module_parameter_registration_hook(hook)
    try:
        with _Uninitialised():
            yield
    finally:
        handle.remove()


def _filled(network: nn.Module, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    """The dense network without what the file lists as removed, and with the file's tensors."""
    _remove_parts(network, spec)
    _count_cut(network, spec, tensors)
    _fill(network, tensors, spec["aliases"])
    return network


def _remove_parts(network: nn.Module, spec: Mapping[str, Any]) -> None:
    """Delete the entries and put in the stubs that the file lists."""
    modules = dict(network.named_modules(remove_duplicate=False))
    dicts = {n for n, m in modules.items() if isinstance(m, nn.ModuleDict)}
    for name, keys in spec["entries"].items():
        if name not in dicts or not set(keys) <= set(modules[name]._modules):
            raise ValueError(f"the network does not fit the model file: it has no entries {keys} in {name!r}")
        for key in set(modules[name]._modules) - set(keys):
            del modules[name]._modules[key]
    for name, structure in spec["stubs"].items():
        if not name or name not in modules:
            raise ValueError(f"the network does not fit the model file: it has no module {name!r}")
        parent, _, key = name.rpartition(".")
        modules[parent]._modules[key] = Stub(structure)


def _count_cut(network: nn.Module, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Norms that count cut channels in the place of whole ones; the file says what a norm that lost any counts."""
    norms = {n: m for n, m in network.named_modules() if n and is_channel_norm(m)}
    counted = spec.get("norms", {})
    if set(counted) - set(norms):
        raise ValueError(
            f"the network does not fit the model file: it has no norms {sorted(set(counted) - set(norms))}"
        )
    for name, norm in norms.items():
        weight = tensors.get(spec["aliases"].get(f"{name}.weight", f"{name}.weight"))
        left = norm.normalized_shape[0] if weight is None else weight.numel()
        full = counted.get(name, left if left == norm.normalized_shape[0] else None)
        if full not in (left, norm.normalized_shape[0]):
            raise ValueError(f"the model file does not fit the network: norm {name!r} of {left} channels counts {full}")
        if full > left:
            put(network, name, partial(norm))


def _fill(network: nn.Module, tensors: Mapping[str, Tensor], aliases: Mapping[str, str]) -> None:
    """Give every layer its sizes and every name its tensor; names must agree exactly."""
    names = {*tensors, *aliases}
    different = names ^ set(network.state_dict())
    if different:
        raise ValueError(f"the network does not fit the model file: tensors {sorted(different)[:3]} differ")
    filled: dict[str, Tensor] = {}
    attention = list(plain_attention(network))  # known as such by its dense sizes
    for prefix, module in network.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        own = {k: tensors[aliases.get(dot + k, dot + k)] for k in _own_tensors(module) if dot + k in names}
        _set_sizes(module, own, prefix)
        for key, value in own.items():
            first = aliases.get(dot + key, dot + key)
            if key in module._parameters:
                parameter = nn.Parameter(value, value.is_floating_point())
                module._parameters[key] = filled.setdefault(first, parameter)  # type: ignore[assignment]
            else:
                module._buffers[key] = filled.setdefault(first, value)
    for name, module in attention:
        try:
            fit_heads(module)
        except ValueError as error:
            raise ValueError(f"the model file does not fit the network: {name}: {error}") from error


def _own_tensors(module: nn.Module) -> list[str]:
    """Names of a module's own parameters and buffers, without those of its children."""
    return [k for k, v in [*module._parameters.items(), *module._buffers.items()] if v is not None]


def _set_sizes(module: nn.Module, own: Mapping[str, Tensor], name: str) -> None:
    """Set a layer's size attributes from its tensors' shapes, after checking that it can have such shapes."""
    for key, value in own.items():
        dense = getattr(module, key).shape
        if value.shape != dense and not can_shrink(module, key, value.shape):
            found, wanted = tuple(value.shape), tuple(dense)
            raise ValueError(f"the model file does not fit the network: {name}.{key} is {found}, dense it is {wanted}")
    layer_sizes = sizes(module, own)
    emitted = next(iter(layer_sizes.values()), None)
    for key, value in own.items():
        if value.ndim == 1 and emitted is not None and emitted not in (len(value), value.shape):
            raise ValueError(f"the model file is not valid: {name}.{key} has {len(value)} channels, not {layer_sizes}")
    for attribute, size in layer_sizes.items():
        setattr(module, attribute, size)
