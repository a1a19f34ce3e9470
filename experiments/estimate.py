"""Estimate: what the tables of the published sets would take on GPUs, from multiply-accumulates and sizes of tensors.

Nothing is measured here: networks and steps are built without memory (shapes only), the work of every cell of a grid is
added up, and an assumed speed turns it into hours. ``python -m experiments.scale --estimate`` prints the result.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cut.cost import macs
from cut.network import MultiTaskNet, NetworkConfig
from experiments import papers
from experiments.cell import CONFIGS, Cell
from experiments.tables import replaced
from experiments.typeset import Table, Text, markdown

PAGE = Path(__file__).parent.parent / "docs/paper-scale.md"
# An A100's peak for dense products, FLOP/s, by the arithmetic that PyTorch uses in 32-bit and in bf16-mixed.
PEAK = {"32-true": 156e12, "bf16-mixed": 312e12}
ARITHMETIC = {"32-true": "TF32", "bf16-mixed": "bf16"}
# The share of it that training reaches: large convolutions, and the depthwise ones of a mobile network.
UTILISATION = {"paper": 0.4, "modern": 0.1}
LOADED = 120.0  # pictures a second that four loader processes decode and augment: what the loaders promise, twice
TRAINING = 3  # forward passes that forward and backward are worth
BYTES_PER_PARAMETER = 16  # float32: weight, gradient, Adam's two moments
SLACK, CONTEXT = 1.15, 1.5e9  # gradients of activations and workspace on top of what is kept; CUDA itself
VALIDATION = 0.1  # share of the training pictures that is held out


@dataclass(frozen=True)
class Pictures:
    """A set's size: training and test pictures, and height and width of a test picture."""

    train: int
    test: int
    size: tuple[int, int]


SETS = {
    "nyuv2": Pictures(795, 654, (480, 640)),
    "cityscapes": Pictures(2975, 500, (256, 512)),
    # Its index is not public in the papers' repositories: 25 and 5 buildings with Taskonomy's mean of 8600 pictures.
    "taskonomy": Pictures(215_000, 43_000, (256, 256)),
}
CLASSES = {"nyuv2": 40, "cityscapes": 19, "taskonomy": 17}


def channels(name: str, tasks: Sequence[str]) -> dict[str, int]:
    """Output channels of a set's tasks."""
    of = {"seg": CLASSES[name], "normal": 3}
    return {t: of.get(t, 1) for t in tasks}


@cache
def _config(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())


def network(model: str, outputs: dict[str, int]) -> MultiTaskNet:
    """The network of a model's config with random weights; call it where tensors take no memory."""
    options = dict(_config(model)["model"]["init_args"]["network"], weights=None)
    return MultiTaskNet(outputs, config=NetworkConfig(**options))


@cache
def _shape(model: str, name: str) -> MultiTaskNet:
    """The network with all of a set's tasks, without memory."""
    with torch.device("meta"):
        return network(model, channels(name, papers.SETS[name].tasks))


@cache
def _macs(model: str, name: str, without: int | None, size: tuple[int, int]) -> int:
    """Multiply-accumulates of one picture through backbone and all heads, but one of so many channels."""
    net = _shape(model, name)
    tasks = list(net.outputs)
    if without is not None:
        tasks.remove(next(t for t, c in net.outputs.items() if c == without))
    net.select(tasks)
    return macs(net, torch.zeros(1, 3, *size, device="meta"))


def forward_macs(model: str, name: str, tasks: Sequence[str], size: tuple[int, int]) -> int:
    """Multiply-accumulates of one picture through backbone and the heads of some tasks."""
    whole = _macs(model, name, None, size)
    dropped = [c for t, c in channels(name, papers.SETS[name].tasks).items() if t not in tasks]
    return whole - sum(whole - _macs(model, name, c, size) for c in dropped)


def parameters(model: str, name: str) -> int:
    """Parameters of backbone and all heads."""
    return sum(p.numel() for p in _shape(model, name).parameters())


@cache
def kept_activations(model: str, name: str, batch: int, crop: int, mixed: bool) -> int:
    """Bytes of what autograd keeps of a forward pass of all tasks with a loss at full size, parameters left out."""
    kept: dict[int, tuple[int, Any]] = {}
    with FakeTensorMode():
        net = network(model, channels(name, papers.SETS[name].tasks))
        own = {t.untyped_storage()._cdata for t in [*net.parameters(), *net.buffers()]}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = (storage.nbytes(), storage)  # held, so that no other gets its number
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            outputs = net(torch.zeros(batch, 3, crop, crop))
            torch.stack([out.float().log_softmax(1).sum() for out in outputs.values()]).sum()
    return sum(size for size, _ in kept.values())


def training_memory(model: str, name: str, batch: int, precision: str) -> float:
    """Bytes on the GPU at the peak of one training step of all tasks with Adam."""
    activations = kept_activations(model, name, batch, papers.SETS[name].crop, precision != "32-true")
    return BYTES_PER_PARAMETER * parameters(model, name) + SLACK * activations + CONTEXT


@dataclass(frozen=True)
class Part:
    """A part of a run's work: floating-point operations on the GPU, and pictures that have to be loaded for them."""

    flops: float
    pictures: float

    def hours(self, speed: float) -> float:
        """Hours at some FLOP/s: loading and computing go on at once, the slower decides."""
        return max(self.flops / speed, self.pictures / LOADED) / 3600


@dataclass(frozen=True)
class Work:
    """What one cell does: training, scoring, and looking at validation and test."""

    train: Part
    score: Part
    evaluate: Part

    def hours(self, speed: float) -> float:
        """Hours of all parts at some FLOP/s."""
        return sum(part.hours(speed) for part in (self.train, self.score, self.evaluate))


@cache
def _work(name: str, model: str, recipe: str, tasks: tuple[str, ...]) -> Work:
    """See :func:`work`."""
    options, crop, of = _config(recipe), papers.SETS[name].crop, SETS[name]
    trainer, batch = options["trainer"], options["data"]["init_args"]["batch_size"]
    trained = batch * trainer["max_steps"]
    scored = batch * options.get("pruning", {}).get("batches", 0)
    looks = trainer["max_steps"] // (trainer["limit_train_batches"] * trainer["check_val_every_n_epoch"])
    seen = looks * (VALIDATION * of.train + of.test)
    forward = forward_macs(model, name, tasks, (crop, crop))
    # One forward pass for all tasks, and for each a backward pass through its own part.
    per_task = sum(forward_macs(model, name, (t,), (crop, crop)) for t in tasks)
    return Work(
        train=Part(2 * TRAINING * forward * trained, trained),
        score=Part(2 * (forward + 2 * per_task) * scored, scored),
        evaluate=Part(2 * forward_macs(model, name, tasks, of.size) * seen, seen),
    )


def work(name: str, cell: Cell) -> Work:
    """What one cell of a published set's grid computes, two operations for a multiply-accumulate.

    Every pruned cell is counted as if its method scored each kept task by gradient, as CUT's does: an upper bound.
    """
    tasks = tuple(cell.settings.get("pruning.tasks") or papers.SETS[name].tasks)
    return _work(name, cell.configs[2], cell.configs[-1], tasks)


def unique(cells: Sequence[Cell]) -> list[Cell]:
    """Cells that differ, by what they are configured with; no config of the data is read."""
    return list({(c.configs, json.dumps(dict(c.settings), sort_keys=True)): c for c in cells}.values())


def grid_cells(name: str, recipe: papers.Recipe) -> list[Cell]:
    """The cells of a set's full grid, one seed, each once, dense ones first."""
    grid = papers.grid(name, recipe)
    cells = [*grid.longer.values(), *(c for row in grid.rows for run in row.runs for c in run)]
    return unique([one for c in cells for one in (c.start, c) if one is not None])


def speed(recipe: papers.Recipe, precision: str) -> float:
    """Assumed FLOP/s."""
    return UTILISATION[recipe] * PEAK[precision]


def precision_of(cell: Cell) -> str:
    """The precision that the cell's recipe asks for."""
    return str(_config(cell.configs[-1])["trainer"].get("precision", "32-true"))


def _row(*cells: str) -> list[Text]:
    return [Text(c) for c in cells]


def _hours(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def networks() -> Table:
    """One row per set and recipe: size, cost and memory of the dense training of all tasks."""
    body = []
    for name, of in papers.SETS.items():
        for recipe in papers.RECIPES:
            cell = papers.dense(name, recipe)
            batch = _config(cell.configs[-1])["data"]["init_args"]["batch_size"]
            model, tasks = cell.configs[2], of.tasks
            forward = forward_macs(model, name, tasks, (of.crop, of.crop))
            rates = [speed(recipe, p) / (2 * TRAINING * forward) for p in PEAK]
            memory = [training_memory(model, name, batch, p) / 1e9 for p in PEAK]
            body.append(
                _row(
                    of.name,
                    recipe,
                    f"{len(tasks)}",
                    f"{parameters(model, name) / 1e6:.1f}",
                    f"{batch} of {of.crop}x{of.crop}",
                    f"{forward / 1e9:.1f}",
                    " / ".join(f"{r:.0f}" for r in rates),
                    " / ".join(f"{m:.0f}" for m in memory),
                )
            )
    head = ["set", "recipe", "tasks", "parameters M", "batch", "GMACs a picture"]
    head += ["pictures a second, TF32 / bf16", "memory GB, 32-bit / bf16-mixed"]
    return Table("Dense training, estimated", head, body, labels=2)


def tables() -> Table:
    """One row per set and recipe: runs and A100 hours of the full grid, one seed."""
    body = []
    for name, of in papers.SETS.items():
        for recipe in papers.RECIPES:
            cells = grid_cells(name, recipe)
            found = [work(name, c) for c in cells]
            precision = precision_of(cells[0])
            rate = speed(recipe, precision)
            dense = [w.hours(rate) for w, c in zip(found, cells, strict=True) if c.start is None]
            pruned = [w.hours(rate) for w, c in zip(found, cells, strict=True) if c.start is not None]
            parts = [sum(getattr(w, p).hours(rate) for w in found) for p in ("train", "score", "evaluate")]
            body.append(
                _row(
                    of.name,
                    recipe,
                    f"{len(dense)} + {len(pruned)}",
                    ARITHMETIC[precision],
                    _hours(sum(dense)),
                    f"{60 * min(pruned):.1f} to {60 * max(pruned):.1f}",
                    " + ".join(map(_hours, parts)),
                    _hours(sum(parts)),
                    _hours(sum(w.hours(speed(recipe, "bf16-mixed")) for w in found)),
                )
            )
    head = ["set", "recipe", "runs, dense + pruned", "arithmetic", "dense h", "minutes a pruned run"]
    head += ["train + score + evaluate h", "all h", "all h in bf16"]
    return Table("The full tables, estimated", head, body, labels=4)


def page() -> str:
    """Both tables as Markdown, as the page holds them.

    Raises:
        ValueError: If a grid names a config that does not exist.
    """
    return (
        f"Dense training of all tasks, estimated for one A100:\n\n{markdown(networks())}\n"
        f"Whole tables with one seed, estimated for one A100:\n\n{markdown(tables())}"
    )


def updated(text: str, tables: str) -> str:
    """A page with its estimates replaced.

    Raises:
        ValueError: If it has no place for them.
    """
    return replaced(text, "estimate", tables)
