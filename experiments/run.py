"""One run: config in, record out.

    python -m experiments.run --config configs/trainer/demo.yaml --config configs/data/rooms.yaml \
        --config configs/model/mobilenetv2.yaml --config configs/pruning/cut.yaml --seed_everything 1 --out runs/mine

Every choice is one YAML; ``--print_config`` shows them resolved. A dense run and a pruned run are two runs of this script:
the pruned one starts from the dense one's folder (``--init``). A run whose record exists is not run again; one that was
killed goes on from its last epoch.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI

from cut import checkpoint
from cut.compact import compact
from cut.cost import Cost, cost, latency
from cut.data.base import MultiTaskData
from cut.decomposition import owners, prunable
from cut.masks import component_sparsity, layer_sparsity, overlap, task_masks
from cut.model import MultiTaskModel
from cut.network import MultiTaskNet
from cut.pruning import Pruning
from cut.records import Record, config_hash


class CLI(LightningCLI):
    """LightningCLI plus the pruning callback as a group of its own, and what a record needs."""

    def add_arguments_to_parser(self, parser: Any) -> None:
        """Pruning, method name, start, output folders; tasks flow from the data to the model."""
        parser.add_lightning_class_args(Pruning, "pruning")
        parser.link_arguments("data.tasks", "model.init_args.tasks", apply_on="instantiate")
        parser.add_argument("--method", type=str, default="dense", help="name of the method in records and tables")
        parser.add_argument("--init", type=str | None, default=None, help="folder of the dense run to start from")
        parser.add_argument("--out", type=str, default="runs/last", help="folder of this run: checkpoints, logs, models")
        parser.add_argument("--records", type=str, default="experiments/records", help="folder of records")


class History(pl.Callback):
    """Metrics of every epoch, for the record; kept in checkpoints, so that a resumed run has them all."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, Any]] = []
        self.seconds = 0.0
        self._start = 0.0

    def state_dict(self) -> dict[str, Any]:
        """The epochs so far and the seconds they took."""
        return {"epochs": self.epochs, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the epochs of a checkpoint."""
        self.epochs, self.seconds = list(state_dict["epochs"]), float(state_dict["seconds"])

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the epoch's numbers; validation has run by now."""
        self.seconds += time.perf_counter() - self._start
        found = {k: round(float(v), 6) for k, v in trainer.callback_metrics.items()}
        self.epochs.append({"epoch": trainer.current_epoch, **found})


def load_dense(model: MultiTaskModel, folder: str | Path) -> str:
    """Load the weights of a dense run into the model; returns the file's name.

    Raises:
        ValueError: If there is no such checkpoint, or it is of another model or other tasks.
    """
    path = Path(folder) / "last.ckpt"
    if not path.exists():
        raise ValueError(f"no dense checkpoint {path}: run the dense model first (--init names its folder)")
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    mine = model.state_dict()
    wrong = sorted(set(state) ^ set(mine)) + sorted(k for k in set(state) & set(mine) if state[k].shape != mine[k].shape)
    if wrong:
        raise ValueError(f"{path} is of another model or other tasks: {len(wrong)} tensors differ, the first is {wrong[0]!r}")
    model.load_state_dict(state)
    return path.name


def split_metrics(found: dict[str, Any], split: str) -> dict[str, float]:
    """``{"seg/miou": ...}`` from a trainer's ``{"test/seg/miou": ...}``."""
    start = f"{split}/"
    return {k.removeprefix(start): float(v) for k, v in found.items() if k.startswith(start) and not k.endswith("/loss")}


def _numbers(measured: Cost) -> dict[str, Any]:
    return {k: v for k, v in asdict(measured).items() if v is not None}


def measure(
    network: MultiTaskNet, pruning: Pruning, batch: dict[str, torch.Tensor], losses: Any, folder: Path, metadata: dict[str, Any]
) -> dict[str, Any]:
    """Compact the network, save it, and count: sparsity per component and layer, mask overlap, and the cost of all forms."""
    tasks = list(pruning.tasks or network.outputs)
    image = batch["image"][:1]
    network.eval().select(list(network.outputs))
    used = owners(network, batch, losses, list(losses))
    result: dict[str, Any] = {"cost": {"dense_all_heads": _cost(network, image)}}
    network.select(tasks)
    small = compact(network, tasks, pruning.mask, batch)
    kept_heads = compact(network, tasks, {}, batch)
    result["cost"]["kept_heads"] = _cost(kept_heads, image)
    folder.mkdir(parents=True, exist_ok=True)
    size = checkpoint.save(small, folder / "compact", metadata=metadata)
    result["cost"]["compact"] = _cost(small, image) | {"bytes": size}
    network.select(list(network.outputs))
    result["sparsity"] = component_sparsity(network, pruning.mask, used, tasks)
    result["layer_sparsity"] = layer_sparsity(network, pruning.mask)
    weights = prunable(network)
    result["layer_component"] = {
        n: next((t for t in used if n in used[t]), "") if sum(n in u for u in used.values()) == 1 else "backbone"
        for n in weights
    }
    if len(pruning.scores) > 1:
        keep = 1 - result["sparsity"]["kept"]
        result["mask_overlap"] = overlap(task_masks(pruning.scores, keep))
    network.select(tasks)
    return result


def _cost(network: torch.nn.Module, image: torch.Tensor) -> dict[str, Any]:
    """Cost and latency of a network for one picture, on one thread."""
    numbers = _numbers(cost(network, image))
    with torch.no_grad():
        numbers["latency"] = asdict(latency(lambda: network(image), threads=1))
    return numbers
