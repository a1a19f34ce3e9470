"""Runtime: a shipped file in the runtime that runs it, all with one face.

An ``.onnx`` file runs in ONNX Runtime, a ``.pte`` file in ExecuTorch, a folder with a compact model in PyTorch.
Nothing but NumPy is imported until a file is opened: a process that runs an ONNX file holds no PyTorch.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

METADATA_KEY = "cut"
SUFFIXES = {".onnx": "ONNX Runtime", ".pte": "ExecuTorch", "": "PyTorch"}
_PTE_MAGIC = b"ET12"  # in bytes 4 to 8 of every program


@dataclass(frozen=True)
class Opened:
    """A model that is ready to run.

    Attributes:
        runtime: ``"ONNX Runtime"``, ``"ExecuTorch"`` or ``"PyTorch"``.
        run: An input float32 [N, C, H, W], or of whatever form the model takes, to ``{task: array [N, ...]}``.
        meta: The facts stored with it, see :func:`cut.export.metadata`; empty if there are none.
        shape: Of one entry of the input that it is for, ``(C, H, W)`` for pictures; None if it does not say.
    """

    runtime: str
    run: Callable[[np.ndarray], dict[str, np.ndarray]]
    meta: Mapping[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] | None = None

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width in pixels of the pictures that it is for, None if it does not say or takes none."""
        return (self.shape[1], self.shape[2]) if self.shape is not None and len(self.shape) == 3 else None


def kind(path: str | Path) -> str:
    """The runtime that runs a file or folder.

    Raises:
        ValueError: If there is no such file, or its suffix is that of no runtime.
    """
    path = Path(path)
    suffix = "" if path.is_dir() else path.suffix.lower()
    if not path.exists():
        raise ValueError(f"no model file or folder {str(path)!r}")
    if suffix not in SUFFIXES or (not suffix and not path.is_dir()):
        raise ValueError(f"{path} is of no runtime; allowed: .onnx, .pte, or the folder of a compact model")
    return SUFFIXES[suffix]


def open_file(path: str | Path, threads: int = 1, builder: Callable[[], Any] | None = None) -> Opened:
    """Open a model in its runtime, on the CPU.

    Args:
        path: ``.onnx``, ``.pte``, or the folder that :func:`cut.checkpoint.save` wrote.
        threads: Of the runtime; ExecuTorch and PyTorch have one setting for the whole process.
        builder: The dense network of a folder with a foreign model, see :func:`cut.checkpoint.load`.

    Raises:
        ValueError: If the file is missing, damaged or of no runtime, the runtime is not installed, or ``threads``
            is less than one.
    """
    if threads < 1:
        raise ValueError(f"threads {threads}; allowed: 1 or more")
    runtime = kind(path)
    if runtime == "ONNX Runtime":
        return _onnx(Path(path), threads)
    if runtime == "ExecuTorch":
        return _executorch(Path(path), threads)
    return _pytorch(Path(path), threads, builder)


def _shape(meta: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Channels, height and width in the stored facts, if they are there."""
    try:
        stated = meta["input"]
        return len(stated.get("mean", "RGB")), int(stated["height"]), int(stated["width"])
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def _import(extra: str, name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        message = f"this needs the extra {extra!r} (in the project's folder: pip install -e '.[{extra}]'): {error}"
        raise ValueError(message) from error


# ------------------------------------------------------------------------------------------------ ONNX Runtime


def onnx_session(path: str | Path, threads: int = 1) -> Any:
    """An ONNX Runtime session on the CPU.

    Raises:
        ValueError: If ONNX Runtime is missing, or the file is no readable model.
    """
    ort = _import("export", "onnxruntime")
    if not Path(path).is_file():
        raise ValueError(f"no model file {str(path)!r}")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime has many kinds of errors of its own
        raise ValueError(f"{path} is not a readable ONNX model: {str(error).splitlines()[0]}") from error


def _onnx(path: Path, threads: int) -> Opened:
    session = onnx_session(path, threads)
    names = [o.name for o in session.get_outputs()]
    (entry,) = session.get_inputs()
    meta = _parsed(session.get_modelmeta().custom_metadata_map.get(METADATA_KEY, ""))
    fixed = all(isinstance(s, int) for s in entry.shape[1:])
    shape = tuple(entry.shape[1:]) if fixed else _shape(meta)

    def run(image: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(names, session.run(names, {entry.name: image}), strict=True))

    return Opened("ONNX Runtime", run, meta, shape)


def _parsed(text: str) -> dict[str, Any]:
    """Stored facts, empty if they are none of ours."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


# -------------------------------------------------------------------------------------------------- ExecuTorch


def _executorch(path: Path, threads: int) -> Opened:
    with path.open("rb") as file:
        if file.read(8)[4:] != _PTE_MAGIC:
            raise ValueError(f"{path} is not a readable ExecuTorch program")
    with muted():
        runtime = _import("executorch", "executorch.runtime").Runtime.get()
        torch = _import("executorch", "torch")
        native = _import("executorch", "executorch.extension.pybindings.portable_lib")
        # One pool of threads for the process, which may only be changed while nothing runs.
        if native._threadpool_get_thread_count() != threads:
            native._unsafe_reset_threadpool(threads)
        try:
            program = runtime.load_program(path)
            forward = program.load_method("forward")
            stored = METADATA_KEY in program.method_names
            facts = _parsed(program.load_method(METADATA_KEY).execute([])[0]) if stored else {}
        except Exception as error:  # the runtime raises RuntimeError with a number
            raise ValueError(f"{path} is not a readable ExecuTorch program: {error}") from error
    shape = list(forward.metadata.input_tensor_meta(0).sizes())
    names = facts.pop("outputs", None) or [f"output{i}" for i in range(forward.metadata.num_outputs())]

    def run(image: np.ndarray) -> dict[str, np.ndarray]:
        parts = np.split(image, max(1, len(image) // shape[0]))  # the program's own batch size is fixed
        found = [[o.numpy() for o in forward.execute([torch.from_numpy(p)])] for p in parts]
        whole = found[0] if len(found) == 1 else [np.concatenate(o) for o in zip(*found, strict=True)]
        return dict(zip(names, whole, strict=True))

    return Opened("ExecuTorch", run, facts, tuple(shape[1:]))


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Hold back what native code writes to the terminal's error stream; it comes out if an exception leaves."""
    with tempfile.TemporaryFile() as held:
        saved = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        except ValueError:
            raise  # our own, which says what is wrong
        except BaseException:
            held.seek(0)
            os.write(saved, held.read())
            raise
        finally:
            os.dup2(saved, 2)
            os.close(saved)


# ----------------------------------------------------------------------------------------------------- PyTorch


def _pytorch(folder: Path, threads: int, builder: Callable[[], Any] | None) -> Opened:
    torch = importlib.import_module("torch")
    checkpoint = importlib.import_module("cut.checkpoint")
    torch.set_num_threads(threads)
    meta = checkpoint.read_metadata(folder)
    # A network of ours says itself how it is built; the builder is for others that it is compared with.
    model = checkpoint.load(folder, builder if checkpoint.is_foreign(folder) else None)

    def run(image: np.ndarray) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            return {task: value.numpy() for task, value in model(torch.from_numpy(image)).items()}

    return Opened("PyTorch", run, meta, _shape(meta))
