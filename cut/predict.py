"""Predict: run an exported or a compact model on one's own picture and draw what every task sees."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from cut import drawing

Runner = Callable[[np.ndarray], dict[str, np.ndarray]]
REPEATS = 5


@dataclass
class Prediction:
    """What a model says about a picture.

    Attributes:
        picture: uint8 [H, W, 3] at the model's input size.
        outputs: Task to array: logits, vectors, metres, responses.
        meta: The model's own facts, see :func:`cut.export.metadata`.
        milliseconds: Median time of a run.
    """

    picture: np.ndarray
    outputs: dict[str, np.ndarray]
    meta: dict[str, Any]
    milliseconds: float


def read_picture(path: str | Path) -> Image.Image:
    """A picture of any kind as RGB, turned upright.

    Raises:
        ValueError: If there is no such file or it is no picture.
    """
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip instead of scale
                upright = Image.fromarray((np.asarray(upright) / 257).round().clip(0, 255).astype(np.uint8))
            if "A" in upright.getbands() or "transparency" in upright.info:
                upright = upright.convert("RGBA")
                white = Image.new("RGBA", upright.size, "white")
                return Image.alpha_composite(white, upright).convert("RGB")
            return upright.convert("RGB")
    except FileNotFoundError as error:
        raise ValueError(f"no picture {str(path)!r}") from error
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a readable picture: {error}") from error


def open_model(path: str | Path) -> tuple[Runner, dict[str, Any]]:
    """A runner for an ONNX file, an ExecuTorch program or a folder with a compact model, and the model's facts.

    Raises:
        ValueError: If it is neither, or it carries no facts on its input and tasks.
    """
    path = Path(path)
    runner, meta = _compact(path) if path.is_dir() else _file(path)
    return runner, checked(meta, path)


def checked(meta: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """The facts, if they hold all that a prediction needs.

    Args:
        meta: See :func:`cut.export.metadata`.
        path: What they are of, for the error.

    Raises:
        ValueError: If they do not.
    """
    try:
        size = [int(meta["input"][k]) for k in ("height", "width")]
        numbers = [float(v) for k in ("mean", "std") for v in meta["input"][k]]
        tasks = {t: (str(f["kind"]), [str(c) for c in f["classes"]], str(f["unit"])) for t, f in meta["tasks"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} carries no usable facts on its pictures and tasks ({error!r}); see cut.export.metadata"
        ) from error
    if len(numbers) not in (0, 6) and len(meta["input"]["mean"]) == len(meta["input"]["std"]):
        raise ValueError(f"{path} takes pictures of {len(numbers) // 2} channels; predict reads and draws those of 3")
    if min(size) < 1 or len(numbers) != 6 or min(numbers[3:]) <= 0 or not tasks:
        raise ValueError(f"{path} carries no usable facts on its input: {meta['input']}")
    return meta


def _file(path: Path) -> tuple[Runner, dict[str, Any]]:
    from cut.runtime import open_file

    opened = open_file(path)
    return opened.run, dict(opened.meta)


def _compact(folder: Path) -> tuple[Runner, dict[str, Any]]:
    from cut import checkpoint

    meta = checkpoint.read_metadata(folder)
    return runner_of(checkpoint.load(folder)), meta


def runner_of(network: Any) -> Runner:
    """A runner for a PyTorch network, put in eval mode."""
    import torch

    network.eval()

    def runner(image: np.ndarray) -> dict[str, np.ndarray]:
        with torch.no_grad():
            return {t: v.numpy() for t, v in network(torch.from_numpy(image)).items()}

    return runner


def predict(model: str | Path, picture: str | Path) -> Prediction:
    """Run a model's file on a picture; see :func:`predict_with`.

    Args:
        model: An ONNX file from :func:`cut.export.export_onnx`, a program from
            :func:`cut.executorch.export_executorch`, or a folder from :func:`cut.checkpoint.save`.
        picture: Any picture file.

    Raises:
        ValueError: If either cannot be read.
    """
    image = read_picture(picture)
    return predict_with(*open_model(model), image, model)


def predict_with(runner: Runner, meta: dict[str, Any], image: Image.Image, name: str | Path) -> Prediction:
    """Run a model on a picture, resized to the model's input and normalised as in training.

    Args:
        runner: The model.
        meta: Its facts, as :func:`checked` lets them pass.
        image: See :func:`read_picture`.
        name: What the model is called, for the error.

    Raises:
        ValueError: If the model does not put out what its facts say.
    """
    facts = meta["input"]
    fitted = np.asarray(image.resize((facts["width"], facts["height"]), Image.Resampling.BILINEAR))
    scaled = (fitted.astype(np.float32) / 255 - np.array(facts["mean"], np.float32)) / np.array(
        facts["std"], np.float32
    )
    batch = np.ascontiguousarray(scaled.transpose(2, 0, 1)[None])
    outputs = runner(batch)  # the first run also plans memory
    odd = sorted(set(outputs) ^ set(meta["tasks"]))
    if odd:
        raise ValueError(f"{name} does not put out what its facts say: {odd[0]!r} is only on one side")
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        runner(batch)
        times.append(1e3 * (time.perf_counter() - start))
    return Prediction(fitted, {t: v[0] for t, v in outputs.items()}, meta, statistics.median(times))


def _class_name(facts: Mapping[str, Any], index: int) -> str:
    """A class's name, or its number where the model carries no names."""
    return facts["classes"][index] if index < len(facts["classes"]) else str(index)


def describe(found: Prediction) -> dict[str, dict[str, Any]]:
    """A few numbers for each task: classes by area, depth range, and the like."""
    result: dict[str, dict[str, Any]] = {}
    for task, values in found.outputs.items():
        facts: Mapping[str, Any] = found.meta["tasks"][task]
        if facts["kind"] == "segmentation":
            index, count = np.unique(values.argmax(0), return_counts=True)
            shares = {
                _class_name(facts, i): round(float(c / count.sum()), 4) for i, c in zip(index, count, strict=True)
            }
            result[task] = dict(sorted(shares.items(), key=lambda kv: -kv[1]))
        elif facts["kind"] == "classification":
            odds = np.exp(values - values.max())
            order = np.argsort(-odds)[:3]
            result[task] = {_class_name(facts, i): round(float(odds[i] / odds.sum()), 4) for i in order}
        elif facts["kind"] == "normals":
            unit = values / np.linalg.norm(values, axis=0).clip(1e-6)
            result[task] = {
                "facing_camera": round(float((unit[2] > 0.7).mean()), 4),
                "facing_up": round(float((unit[1] > 0.7).mean()), 4),
            }
        else:
            result[task] = {
                k: round(float(f(values)), 3) for k, f in (("min", np.min), ("mean", np.mean), ("max", np.max))
            }
            if facts["unit"]:
                result[task]["unit"] = facts["unit"]
    return result


def draw(found: Prediction) -> Image.Image:
    """The picture and every dense task's prediction side by side, and a legend of the classes found."""
    panels, below = [("picture", found.picture)], None
    scale = max(1, round(288 / found.picture.shape[1]))
    for task, values in found.outputs.items():
        facts = found.meta["tasks"][task]
        if facts["kind"] == "classification":
            best = int(values.argmax())
            panels[0] = (f"picture: {_class_name(facts, best)}", found.picture)
        if facts["kind"] in ("classification", "numbers"):  # one for the whole picture
            continue
        panels.append(_panel(task, facts["kind"], values))
        if facts["kind"] == "segmentation":
            present = np.unique(values.argmax(0)).tolist()
            below = ([_class_name(facts, i) for i in range(len(values))], present)
    width = len(panels) * (found.picture.shape[1] * scale + 8) - 8
    return drawing.sheet(panels, drawing.legend(below[0], below[1], width) if below else None, scale)


def _panel(task: str, kind: str, values: np.ndarray) -> tuple[str, np.ndarray]:
    """A dense task's prediction and its title."""
    title, near, far = task, 0.5, 6.0
    if kind == "depth":
        values = np.maximum(values, 1e-3)  # 0 would be drawn as unknown, which a prediction never is
        near, far = float(values.min()), float(values.max())
        title = f"{task}: {near:.1f} m (light) to {far:.1f} m"
    if kind == "map" and (values.min() < 0 or values.max() > 1):  # of a model of one's own, in units of its own
        low, high = float(values.min()), float(values.max())
        title = f"{task}: {low:.3g} (dark) to {high:.3g}"
        values = (values - low) / max(high - low, 1e-6)
    return title, drawing.output(kind, values, near, far)


def save(picture: Image.Image, path: str | Path) -> None:
    """Write a picture whole or not at all; the suffix says in which format.

    Raises:
        ValueError: If the suffix is that of no picture format.
        OSError: If it cannot be written; nothing is left then.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=path.suffix)
    os.close(handle)
    try:
        picture.save(temporary)
        Path(temporary).chmod(0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
