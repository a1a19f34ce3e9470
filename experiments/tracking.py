"""Tracking: a run on Weights & Biases, as a view of its record.

Losses and metrics of every epoch come from Lightning's own logger; what a record knows besides (configuration,
sparsity by component and layer, cost, overlap of the tasks' masks), example predictions and the files are added when
the run has ended. Nothing here is needed by a table: without W&B a record holds the same numbers.
"""

from __future__ import annotations

import netrc
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import lightning.pytorch as pl
from lightning.pytorch.loggers import WandbLogger

from cut.records import Record, commit, machine
from experiments import plots, results

PROJECT = "cut"
PICTURES = 6  # of the table of predictions
SECONDS = 3.0  # to wait for the server
COSTS = ("params", "nonzero", "macs", "bytes")


def summary(record: Record) -> dict[str, float]:
    """A record's numbers, flat: metrics by split, sparsity by component, cost by form, seconds, memory.

    Returns:
        ``test/seg/miou``, ``sparsity/backbone``, ``cost/compact/bytes``, ``cost/compact/latency_ms`` (median),
        ``model/params`` (of the form that the run puts out) and so on, to a number.
    """
    found: dict[str, float] = {
        f"{split}/{key}": value for split, values in record.metrics.items() for key, value in values.items()
    }
    found |= {f"sparsity/{part}": value for part, value in record.sparsity.items()}
    for form, cost in record.cost.items():
        found |= {f"cost/{form}/{key}": float(cost[key]) for key in COSTS if cost.get(key) is not None}
        for key, short in (("median_ms", "latency_ms"), ("p95_ms", "latency_p95_ms")):
            if key in cost.get("latency", {}):
                found[f"cost/{form}/{short}"] = float(cost["latency"][key])
    if record.cost:  # of what the run puts out, whichever form that is
        found |= {f"model/{key}": float(value) for key, value in results.costs(record).items()}
        found["model/latency_ms"] = results.latency(record)
    found |= {f"delta_m/{key}": value for key, value in record.delta_m.items()}
    times = {"score_seconds": record.score_seconds, "finetune_seconds": record.finetune_seconds}
    return {**found, **times, "peak_memory": float(record.peak_memory)}


def facts(record: Record) -> dict[str, Any]:
    """What runs are told apart by, beside the resolved configuration: method, tasks, budget, commit, machine."""
    names = ("method", "backbone", "weights_source", "tasks", "dropped_tasks", "seed", "budget", "commit")
    content = asdict(record)
    own = {"record": record.id, "data_set": record.data, "machine": record.machine, **{n: content[n] for n in names}}
    return {**record.config, **own}


def overlap_rows(record: Record) -> list[Any]:
    """The overlap of the tasks' own masks as rows: layer, pair of tasks, IoU."""
    return [[layer, pair, iou] for layer, pairs in record.mask_overlap.items() for pair, iou in pairs.items()]


def log_record(run: Any, record: Record, history: bool = False) -> None:
    """Put a record into a W&B run: configuration, summary, layers, overlap.

    Args:
        run: A run from ``wandb.init``.
        record: The record.
        history: Whether the numbers of every epoch are logged too; a live run has them already.
    """
    import wandb

    run.config.update(facts(record), allow_val_change=True)
    for epoch in record.history if history else ():
        run.log(epoch, step=int(epoch["step"]))
    layers: Any = [[n, record.layer_component.get(n, ""), s] for n, s in record.layer_sparsity.items()]
    tables: dict[str, Any] = {}
    if layers:
        table = wandb.Table(columns=["layer", "component", "sparsity"], data=layers)
        tables["layers"] = table
        tables["layers_chart"] = wandb.plot.bar(table, "layer", "sparsity", title="Sparsity by layer")
    if record.mask_overlap:
        tables["overlap"] = wandb.Table(columns=["layer", "tasks", "iou"], data=overlap_rows(record))
        tables["overlap_map"] = wandb.Image(plots.overlap_map(record), caption="IoU of the tasks' own masks by layer")
    if tables:
        run.log(tables)
    run.summary.update(summary(record))


def log_examples(run: Any, examples: Sequence[Mapping[str, Any]]) -> None:
    """A table of example predictions: the picture, and each task's label and prediction side by side.

    Args:
        run: A run from ``wandb.init``.
        examples: From :func:`experiments.examples.examples`.
    """
    import wandb

    if not examples:
        return
    columns = [(task, who) for task, panels in examples[0]["tasks"].items() for who in panels]
    table = wandb.Table(columns=["id", "picture", *(f"{task} {who}" for task, who in columns)])
    for example in examples:
        cells = [example["tasks"][task][who] for task, who in columns]
        drawn = [c if isinstance(c, str) else wandb.Image(c) for c in cells]
        table.add_data(example["id"], wandb.Image(example["picture"]), *drawn)
    run.log({"predictions": table})


def log_files(run: Any, record: Record, written: Path, model: Path | None = None) -> None:
    """The record and the compact model as artifacts of the run.

    Args:
        run: A run from ``wandb.init``.
        record: The record.
        written: Its file.
        model: Folder of the compact model.
    """
    import wandb

    about = {"method": record.method, "tasks": record.tasks, "budget": record.budget}
    artifact = wandb.Artifact(f"record-{run.id}", type="record", metadata=about)
    artifact.add_file(str(written), name=written.name)
    run.log_artifact(artifact)
    if model is not None and model.is_dir():
        artifact = wandb.Artifact(f"compact-{run.id}", type="model", metadata={**about, **summary(record)})
        artifact.add_dir(str(model))
        run.log_artifact(artifact)


def has_key(address: str) -> bool:
    """Whether W&B's key for a server is in the environment or in the user's netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(address) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def why_offline(address: str) -> str | None:
    """Why a run cannot go to the server right now, in a few words; None if it can.

    Without a key W&B would ask for one or fail, and without a network it would wait for minutes.

    Args:
        address: The server's, ``https://...``.
    """
    parts = urlsplit(address)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    if not has_key(host):
        return "there is no key (see wandb login)"
    try:
        socket.create_connection((host, port), SECONDS).close()
    except OSError as error:
        return f"{host} cannot be reached ({error})"
    return None


def prepare(options: Any, name: str, job: str, group: str) -> None:
    """Fill in what a W&B logger's options leave open, and keep the run offline where the server cannot be had.

    Args:
        options: The logger's ``init_args``; changed in place.
        name: The run's name.
        job: ``dense``, ``prune`` or ``bench``.
        group: The table that the run is for; empty for none.
    """
    options.name = options.get("name") or name
    options.job_type = options.get("job_type") or job
    options.group = options.get("group") or group or None
    if not options.get("offline") and os.environ.get("WANDB_MODE") not in ("offline", "disabled"):
        import wandb

        reason = why_offline(wandb.setup().settings.base_url)
        if reason is not None:
            print(f"W&B: {reason}; the run is kept offline", file=sys.stderr)
            options.offline = True


def log_bench(rows: Sequence[Mapping[str, Any]], folder: Path, project: str = PROJECT) -> None:
    """The measured promises as one W&B run with job type ``bench``: a table, and each value in the summary.

    Args:
        rows: As in ``runs/bench.json``: ``name``, ``value``, ``target``, ``ok``, ``detail``.
        folder: Where W&B's own files go.
        project: On W&B.
    """
    import wandb

    reason = why_offline(wandb.setup().settings.base_url)
    folder.mkdir(parents=True, exist_ok=True)
    mode: Any = "offline" if reason else None
    run = wandb.init(project=project, name="bench", group="bench", job_type="bench", dir=folder, mode=mode)
    names = ("name", "value", "target", "ok", "detail")
    run.config.update({"commit": commit()[0], "machine": machine()})
    run.log({"promises": wandb.Table(columns=list(names), data=[[r[n] for n in names] for r in rows])})
    run.summary.update({r["name"]: r["value"] for r in rows})
    close(run)


def loggers(trainer: pl.Trainer) -> list[WandbLogger]:
    """The trainer's W&B loggers."""
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]


def close(run: Any) -> None:
    """Finish a W&B run, and say where it lies if it is offline."""
    offline, folder = run.offline, Path(run.dir).parent
    run.finish()
    if offline:
        print(f"W&B run kept offline in {folder}; upload it with: wandb sync {folder}")
