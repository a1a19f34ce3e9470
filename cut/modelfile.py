"""Model file: a folder of two files, ``model.json`` (a description) and ``model.safetensors`` (the tensors).

Nothing in it is code. A tensor with many zeros is stored as a packed bit mask and its non-zero values if that
is smaller. All is checked before a tensor is read: the description against a schema and its own digest, the
tensors' file against size and digest, and every name, shape and dtype against the description.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SPEC, TENSORS = "model.json", "model.safetensors"
FORMAT = "cut model 1"
DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_MAX_SPEC_BYTES, _MAX_ELEMENTS, _MAX_RANK = 1 << 26, 1 << 33, 8
_BITS, _VALUES = "/bits", "/values"  # behind a tensor's name: the two parts of a sparse one
_HEADER_BYTES = 160  # what two entries instead of one cost in the file's header, about


# --------------------------------------------------------------------------------------------------- packing


def pack(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A tensor as packed bits (1 = not zero, first bit highest, uint8) and its non-zero values, in order.

    Negative zeros come back as zeros.

    Example:
        >>> bits, values = pack(torch.tensor([[0.0, 3.0], [0.0, 5.0]]))
        >>> bits.tolist(), values.tolist()
        ([80], [3.0, 5.0])
        >>> unpack(bits, values, [2, 2]).tolist()
        [[0.0, 3.0], [0.0, 5.0]]
    """
    flat = tensor.detach().cpu().flatten()
    kept = flat != 0
    return torch.from_numpy(np.packbits(kept.numpy())), flat[kept]


def unpack(bits: Tensor, values: Tensor, shape: list[int]) -> Tensor:
    """The tensor that :func:`pack` took apart.

    Raises:
        ValueError: If there are more or fewer values than bits set.
    """
    flat = torch.zeros(_numel(shape), dtype=values.dtype)
    unpacked = np.unpackbits(bits.numpy())
    if unpacked[flat.numel() :].any() or int(unpacked.sum()) != values.numel():
        raise ValueError("a sparse tensor's bit mask and values do not fit")
    flat[torch.from_numpy(unpacked[: flat.numel()]).bool()] = values
    return flat.view(shape)


def _pays(tensor: Tensor) -> bool:
    """Whether the sparse form is smaller."""
    if not tensor.is_floating_point():
        return False
    sparse = tensor.numel() / 8 + int(torch.count_nonzero(tensor)) * tensor.itemsize + _HEADER_BYTES
    return sparse < tensor.numel() * tensor.itemsize


# --------------------------------------------------------------------------------------------------- writing


def write(folder: Path, spec: Mapping[str, Any], tensors: Mapping[str, Tensor], sparse: bool | None) -> int:
    """Write the two files, all or nothing.

    Args:
        folder: Made if missing; other files in it are left alone.
        spec: JSON-able description; the entries ``format``, ``tensors`` and the digests are added here.
        tensors: Name to tensor, no two of which share memory.
        sparse: None: each tensor in the smaller form; False: none sparse; True: all of floating point.

    Returns:
        The size of the two files in bytes.

    Raises:
        ValueError: If something cannot be stored: a dtype, a name, or a description that is not JSON-able.
        OSError: If writing fails; then nothing has changed.
    """
    entries: dict[str, dict[str, Any]] = {}
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in DTYPES or tensor.layout != torch.strided:
            raise ValueError(f"cannot store {name!r} of {dtype}, {tensor.layout}; allowed: dense {list(DTYPES)}")
        value = tensor.detach().cpu()
        packed = _pays(value) if sparse is None else sparse and value.is_floating_point()
        entries[name] = {"shape": list(value.shape), "dtype": dtype, "sparse": packed}
        parts = (
            zip((name + _BITS, name + _VALUES), pack(value), strict=True) if packed else [(name, value.contiguous())]
        )
        for key, part in parts:
            if key in stored:
                raise ValueError(f"cannot store two tensors under the name {key!r}")
            stored[key] = part
    try:
        full = json.loads(json.dumps({**spec, "format": FORMAT, "tensors": entries}, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the description of the model is not JSON-able: {error}") from error
    return _write_files(folder, full, stored)


def _write_files(folder: Path, spec: dict[str, Any], stored: dict[str, Tensor]) -> int:
    """Write both files into a folder beside, then move them in place."""
    staging = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file")
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        save_file(stored, staging / TENSORS)
        (staging / TENSORS).chmod(0o666 & ~_umask())  # as any file that is written, not for its owner alone
        spec["tensors_bytes"] = (staging / TENSORS).stat().st_size
        spec["tensors_sha256"] = _sha256(staging / TENSORS)
        spec["sha256"] = _digest(spec)
        (staging / SPEC).write_text(json.dumps(spec, indent=1), encoding="utf-8")
        size = sum((staging / name).stat().st_size for name in (TENSORS, SPEC))
        if folder.exists():
            for name in (TENSORS, SPEC):  # if stopped in between, the digest tells that the two do not fit
                os.replace(staging / name, folder / name)
        else:
            staging.chmod(0o777 & ~_umask())
            os.replace(staging, folder)
        return size
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot save the model to {folder}: {error}") from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(spec: Mapping[str, Any]) -> str:
    """Digest of a description without its own digest."""
    body = {key: value for key, value in spec.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


# --------------------------------------------------------------------------------------------------- reading


def read_spec(folder: Path) -> dict[str, Any]:
    """The checked description.

    Raises:
        ValueError: If the file is missing, damaged or of another kind; the message names what is wrong.
    """
    path = folder / SPEC
    if not path.is_file() or not (folder / TENSORS).is_file():
        raise ValueError(f"{folder} holds no model: {SPEC} and {TENSORS} are needed")
    if path.stat().st_size > _MAX_SPEC_BYTES:
        raise ValueError(f"{path} is larger than {_MAX_SPEC_BYTES} bytes")
    try:
        spec = json.loads(path.read_bytes(), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(spec, dict) or spec.get("format") != FORMAT:
        raise ValueError(f"{path} does not describe a model of the format {FORMAT!r}")
    if spec.get("sha256") != _digest(spec):
        raise ValueError(f"{path} is damaged: its digest does not fit")
    _check_entries(spec.get("tensors"), path)
    return spec


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not allowed")


def _check_entries(entries: Any, path: Path) -> None:
    """Refuse tensor entries that are not names with sane shapes and known dtypes."""
    if not isinstance(entries, dict):
        raise ValueError(f"{path}: 'tensors' must map names to shapes")
    total = 0
    for name, entry in entries.items():
        if not isinstance(entry, dict) or set(entry) != {"shape", "dtype", "sparse"}:
            raise ValueError(f"{path}: the entry of tensor {name!r} needs shape, dtype and sparse")
        if not is_shape(entry["shape"]):
            raise ValueError(f"{path}: tensor {name!r} has the shape {entry['shape']!r}; whole numbers >= 0 are needed")
        if entry["dtype"] not in list(DTYPES) or not isinstance(entry["sparse"], bool):
            raise ValueError(f"{path}: tensor {name!r} has dtype {entry['dtype']!r}; allowed: {list(DTYPES)}")
        total += _numel(entry["shape"])
    if total > _MAX_ELEMENTS:
        raise ValueError(f"{path}: {total} numbers in all; at most {_MAX_ELEMENTS} are allowed")


def is_shape(value: Any, lowest: int = 0) -> bool:
    """Whether a JSON value is a list of at most 8 whole numbers of a size that a tensor can have."""
    return (
        isinstance(value, list)
        and len(value) <= _MAX_RANK
        and all(type(size) is int and lowest <= size <= _MAX_ELEMENTS for size in value)
    )


def _numel(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def read_tensors(folder: Path, spec: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors that a description lists, exactly.

    Raises:
        ValueError: If the file is truncated or changed, or holds other tensors than the description says.
    """
    path = folder / TENSORS
    size = path.stat().st_size
    if size != spec.get("tensors_bytes"):
        raise ValueError(
            f"{path} has {size} bytes instead of {spec.get('tensors_bytes')}: truncated or of another model"
        )
    if _sha256(path) != spec.get("tensors_sha256"):
        raise ValueError(f"{path} is damaged or of another model: its digest does not fit")
    try:
        with safe_open(path, framework="pt") as file:
            _check_stored(file, spec["tensors"], path)
            return {name: _read(file, name, entry) for name, entry in spec["tensors"].items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    except (RuntimeError, MemoryError) as error:  # what a few bytes say may take more memory than there is
        raise ValueError(f"{path} cannot be read: {error}") from error


def _check_stored(file: Any, entries: Mapping[str, Any], path: Path) -> None:
    """Compare the names, shapes and dtypes in the file with the description, before any tensor is read."""
    expected: dict[str, tuple[str, list[int] | None]] = {}
    for name, entry in entries.items():
        dtype = DTYPES[entry["dtype"]]
        if entry["sparse"]:
            expected[name + _BITS] = ("U8", [-(-_numel(entry["shape"]) // 8)])
            expected[name + _VALUES] = (dtype, None)
        else:
            expected[name] = (dtype, entry["shape"])
    different = set(expected) ^ set(file.keys())
    if different:
        raise ValueError(f"{path} does not hold the tensors that {SPEC} lists: {sorted(different)[:3]} differ")
    for key, (dtype, shape) in expected.items():
        found = file.get_slice(key)
        if found.get_dtype() != dtype or (shape is not None and list(found.get_shape()) != shape):
            raise ValueError(f"{path}: {key!r} is {found.get_dtype()} {found.get_shape()} instead of {dtype} {shape}")


def _read(file: Any, name: str, entry: Mapping[str, Any]) -> Tensor:
    if entry["sparse"]:
        return unpack(file.get_tensor(name + _BITS), file.get_tensor(name + _VALUES), entry["shape"])
    # Into memory of its own, aligned as any tensor's: a kernel may round differently on unaligned data.
    return file.get_tensor(name).clone()
