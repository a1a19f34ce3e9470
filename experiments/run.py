"""One run: config in, record out.

    python -m experiments.run --config configs/trainer/default.yaml --config configs/data/rooms.yaml \
        --config configs/model/mobilenetv2.yaml --config configs/pruning/cut.yaml --seed_everything 1 --out runs/mine

Every choice is one YAML; ``--print_config`` shows them resolved. A dense run and a pruned run are two runs of this
script: the pruned one starts from the dense one's folder (``--init``). A run whose record exists is not run again; one
that was killed goes on from its last epoch.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from jsonargparse import ArgumentError
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningCLI

from cut import checkpoint, export
from cut.data.base import MultiTaskData
from cut.decomposition import check_tasks
from cut.model import MultiTaskModel
from cut.pruning import Pruning
from cut.records import Record, peak_memory
from cut.rewinding import Checkpoint
from experiments import tracking
from experiments.adaptation import Adaptation, from_start, load_backbone
from experiments.examples import examples
from experiments.experts import FillLibrary
from experiments.history import History, Snapshots, save
from experiments.measure import measure

ROOT = Path(__file__).parent.parent


class CLI(LightningCLI):
    """LightningCLI plus the pruning callback as a group of its own, and what a record needs."""

    def add_arguments_to_parser(self, parser: Any) -> None:
        """Pruning, method name, start, output folders; tasks flow from the data to the model."""
        parser.add_lightning_class_args(Pruning, "pruning")
        parser.link_arguments("data.tasks", "model.init_args.tasks", apply_on="instantiate")
        parser.add_argument("--method", type=str, default="dense", help="name of the method in records and tables")
        parser.add_argument("--init", type=str | None, default=None, help="folder of the dense run to start from")
        parser.add_argument(
            "--out", type=str, default="runs/last", help="folder of this run: checkpoints, logs, models"
        )
        parser.add_argument("--records", type=str, default="experiments/records", help="folder of records")
        parser.add_argument("--id", type=str, default="", help="the record's name; default: made of what the run is")
        parser.add_argument("--group", type=str, default="", help="the table that the run is for, as its group on W&B")
        parser.add_argument(
            "--snapshots", type=list[int], default=[], help="epochs before which the weights are kept, to rewind to"
        )
        parser.add_argument("--export", type=bool, default=True, help="export and time ONNX files too")

    def before_instantiate_classes(self) -> None:
        """Loggers write into the run's folder, W&B under the method's name; no progress bar if none is wanted."""
        if self.config.trainer.enable_progress_bar is False:
            callbacks = self.trainer_defaults["callbacks"]
            self.trainer_defaults["callbacks"] = [c for c in callbacks if not isinstance(c, RichProgressBar)]
        loggers = self.config.trainer.logger
        for logger in loggers if isinstance(loggers, list) else []:
            options = logger.init_args
            if not options.get("save_dir") or options.save_dir == ".":
                options.save_dir = self.config.out
            if logger.class_path.endswith("WandbLogger"):
                job = "dense" if self.config.pruning.budget is None else "prune"
                tracking.prepare(options, f"{self.config.method}-{self.config.seed_everything}", job, self.config.group)
                Path(self.config.out).mkdir(parents=True, exist_ok=True)


def load_dense(model: MultiTaskModel, folder: str | Path) -> str:
    """Load the weights of a dense run into the model; returns the file's name.

    Raises:
        ValueError: If the checkpoint is of another model or other tasks.
    """
    path = Path(folder) / "last.ckpt"
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    mine = model.state_dict()
    wrong = sorted(set(state) ^ set(mine)) + sorted(
        k for k in set(state) & set(mine) if state[k].shape != mine[k].shape
    )
    if wrong:
        raise ValueError(
            f"{path} is of another model or other tasks: {len(wrong)} tensors differ, the first is {wrong[0]!r}"
        )
    model.load_state_dict(state)
    return path.name


def start_of(folder: str | None) -> str | None:
    """The id of the dense run in a folder, None without a folder.

    Raises:
        ValueError: If there is no finished dense run.
    """
    if folder is None:
        return None
    path = Path(folder) / "last.ckpt"
    if not path.exists():
        raise ValueError(f"no dense checkpoint {path}: run the dense model first (--init names its folder)")
    return str(torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("record", "unknown"))


def split_metrics(found: dict[str, Any], split: str) -> dict[str, float]:
    """``{"seg/miou": ...}`` from a trainer's ``{"test/seg/miou": ...}``."""
    start = f"{split}/"
    return {k.removeprefix(start): float(v) for k, v in found.items() if k.startswith(start) and not k.endswith("loss")}


def _evaluate(
    trainer: pl.Trainer, model: MultiTaskModel, data: MultiTaskData, history: History
) -> dict[str, dict[str, float]]:
    """Metrics on validation and test, by the weights as they are; the last epoch's, if it had them."""
    found = {}
    last = history.epochs[-1] if history.epochs else {}
    if any(k.startswith("test/") for k in last):
        return {split: split_metrics(last, split) for split in ("val", "test")}
    for split, run in (("val", trainer.validate), ("test", trainer.test)):
        run(model, datamodule=data, verbose=False)
        found[split] = split_metrics(trainer.callback_metrics, split)
    return found


def _config(cli: CLI) -> dict[str, Any]:
    """The resolved configuration as plain values; folders of this checkout relative to it, so that records travel."""
    config = json.loads(cli.parser.dump(cli.config, skip_none=False, format="json"))
    loggers = config["trainer"].get("logger")
    for place, key in (
        *((logger["init_args"], "save_dir") for logger in (loggers if isinstance(loggers, list) else [])),
        (config, "init"),
        (config, "out"),
        (config, "records"),
        (config["data"].get("init_args") or {}, "root"),
    ):
        if place.get(key) and Path(place[key]).is_relative_to(ROOT):
            place[key] = str(Path(place[key]).relative_to(ROOT))
    return config


def parsed(argv: Sequence[str]) -> CLI:
    """The command line as objects."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*args parameter is intended to run.*")
        return CLI(
            MultiTaskModel,
            MultiTaskData,
            run=False,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            trainer_defaults={
                "callbacks": [History(), RichProgressBar(), ModelCheckpoint(enable_version_counter=False)]
            },
            seed_everything_default=1,
            args=list(argv),
            parser_kwargs={"exit_on_error": False},
        )


def _quiet() -> None:
    """Leave out what Lightning says about hardware it does not use, and advice that does not apply to small sets."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    os.environ.setdefault("WANDB_SILENT", "true")
    for message in (
        ".*does not have many workers.*",
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*Experiment logs directory .* exists.*",
        ".*lr_scheduler.step.*before.*optimizer.step.*",
        ".*There is a wandb run already in progress.*",
        ".*number of training batches .* is smaller than the logging interval.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def run(argv: Sequence[str]) -> Path:
    """One run.

    Args:
        argv: The command line; see the module's docstring.

    Returns:
        The record's path.

    Raises:
        ValueError: For a bad configuration, selection, budget or checkpoint.
        KeyboardInterrupt: If the user stopped the run; the next call goes on from the last finished epoch.
    """
    _quiet()
    cli = parsed(argv)
    for logger in cli.trainer.loggers:  # Lightning passes on an option that W&B warns about
        getattr(logger, "_wandb_init", {}).pop("anonymous", None)
    options, model, data = cli.config, cli.model, cli.datamodule
    trainer: Any = cli.trainer
    pruning = next(c for c in trainer.callbacks if isinstance(c, Pruning))
    config = _config(cli)
    # What paths hide: which pictures, and which weights were there to start from.
    config |= {"data_id": data.description.get("hash"), "weights_source": model.network.weights_source}
    config["start"] = start_of(options.init)  # another dense model makes another run, wherever it lies
    seed = int(options.seed_everything)
    folder = Path(options.out)
    kept = check_tasks(list(model.tasks) if pruning.tasks is None else pruning.tasks, list(model.tasks))
    pruning.tasks = kept
    target = getattr(pruning.budget, "target", getattr(pruning.budget, "ratio", None))
    record = Record(
        method=options.method,
        data=data.description,
        backbone=model.network.config.backbone,
        weights_source=model.network.weights_source,
        tasks=kept,
        dropped_tasks=[t for t in model.tasks if t not in kept],
        seed=seed,
        config=config,
        budget={"target": target, "achieved": 0.0},
        metrics={},
        higher_is_better={k: v for k, v in model.higher_is_better.items() if k.split("/")[0] in kept},
        checkpoint=folder.name,
        name=options.id,
        start=config["start"] or "",
    )
    path = Path(options.records) / f"{record.id}.json"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    adaptation = _prepared(trainer, model, pruning, options.init, folder)
    if isinstance(pruning.rewind, Checkpoint):
        pruning.rewind.folder = options.init
    dense = model.network if pruning.budget is None else copy.deepcopy(model.network)
    history = next(c for c in trainer.callbacks if isinstance(c, History))
    last = folder / f"{record.id}.ckpt"
    saver = next(c for c in trainer.callbacks if isinstance(c, ModelCheckpoint))
    trainer.callbacks.append(Snapshots(folder, options.snapshots))
    saver.dirpath, saver.filename = str(folder), record.id
    _train(trainer, model, data, pruning, last)
    record.metrics = _evaluate(trainer, model, data, history)
    if adaptation is not None:
        record.newtask = adaptation.told(record.metrics["test"], trainer.global_step)
    if trainer.global_rank:
        return path
    meta = export.metadata([model.tasks[t] for t in kept], data.mean, data.std, _size(data))
    batch = data.score_batches(1, min(4, data.batch_size))[0]
    found = measure(model.network, dense, pruning, batch, model.losses, folder, meta, options.export)
    for key, value in found.items():
        setattr(record, key, value)
    record.budget["achieved"] = record.sparsity["kept"] if pruning.mask else 0.0
    record.history, record.finetune_seconds = history.epochs, round(history.seconds, 2)
    record.score_seconds, record.peak_memory = round(pruning.score_seconds, 2), peak_memory()
    save({"state_dict": model.state_dict(), "record": record.id}, folder / "last.ckpt")
    last.unlink(missing_ok=True)
    record.write(options.records)
    _track(trainer, data, record, path, folder)
    return path


def _prepared(
    trainer: Any, model: MultiTaskModel, pruning: Pruning, init: str | None, folder: Path
) -> Adaptation | None:
    """Load what the run starts from, and give callbacks that need one their folder; returns that of a new task."""
    for callback in trainer.callbacks:
        if isinstance(callback, FillLibrary):
            callback.folder = folder
    adaptation = next((c for c in trainer.callbacks if isinstance(c, Adaptation)), None)
    if adaptation is not None:  # an epoch begins for it when the cut is made
        trainer.callbacks.remove(adaptation)
        trainer.callbacks.append(adaptation)
    if init is not None and adaptation is None:
        load_dense(model, init)
    elif init is not None:
        load_backbone(model, init)
    if init is not None:
        from_start(pruning, init)
    return adaptation


def _train(trainer: pl.Trainer, model: MultiTaskModel, data: MultiTaskData, pruning: Pruning, last: Path) -> None:
    """Fit, from a checkpoint if there is one; with no epochs at all, only select and cut."""
    if trainer.max_epochs:
        try:
            trainer.fit(model, datamodule=data, ckpt_path=str(last) if last.exists() else None, weights_only=True)
        except SystemExit:  # how Lightning ends after Ctrl-C
            raise KeyboardInterrupt from None
        if trainer.interrupted:
            raise KeyboardInterrupt
        return
    model.select(pruning.tasks or list(model.tasks))
    if pruning.budget is not None:
        trainer.validate(model, datamodule=data, verbose=False)  # gives the trainer its data
        pruning.prune(trainer, model)


def _track(trainer: pl.Trainer, data: MultiTaskData, record: Record, path: Path, folder: Path) -> None:
    """Close the loggers; first, W&B gets what Lightning has not told it."""
    for logger in trainer.loggers:
        logger.finalize("success")
    for logger in tracking.loggers(trainer):
        model = checkpoint.load(folder / "compact").eval()
        tracking.log_record(logger.experiment, record)
        shown = examples(data, {"prediction": model}, record.tasks, tracking.PICTURES)
        tracking.log_examples(logger.experiment, shown)
        tracking.log_files(logger.experiment, record, path, folder / "compact")
        tracking.close(logger.experiment)


def _size(data: MultiTaskData) -> tuple[int, int]:
    """Height and width of the test pictures."""
    height, width = data.splits["test"][0, 0]["image"].shape[-2:]  # training pictures may be crops
    return int(height), int(width)


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; 2 for bad input, 130 if stopped by the user."""
    try:
        path = run(list(sys.argv[1:] if argv is None else argv))
    except (ValueError, ArgumentError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last finished epoch", file=sys.stderr)
        return 130
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
