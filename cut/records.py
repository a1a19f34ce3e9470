"""Records: one JSON per run, written once at the end, atomically.

Tables, figures and reports read records and nothing else.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from cut.files import write_atomically

SCHEMA = 1
# What a run's numbers do not depend on: places, devices, loggers, progress.
_NOT_HASHED = {
    "out",
    "records",
    "init",
    "config",
    "id",
    "group",
    "export",
    "snapshots",
    "num_workers",
    "logger",
    "accelerator",
    "devices",
    "strategy",
}
_NOT_HASHED |= {
    "default_root_dir",
    "enable_progress_bar",
    "enable_model_summary",
    "log_every_n_steps",
    "num_nodes",
    "root",
}


def _pruned(config: Any) -> Any:
    """The part of a config that the hash covers."""
    if isinstance(config, Mapping):
        # Callbacks change a run, but none is the same as no entry.
        return {
            k: _pruned(v) for k, v in config.items() if k not in _NOT_HASHED and not (k == "callbacks" and v is None)
        }
    return [_pruned(v) for v in config] if isinstance(config, (list, tuple)) else config


def config_hash(config: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits of a resolved config, without paths, devices, workers and loggers.

    Example:
        >>> config_hash({"a": 1, "out": "x"}) == config_hash({"out": "y", "a": 1})
        True
    """
    text = json.dumps(_pruned(config), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def commit() -> tuple[str, bool]:
    """The repository's commit, and whether files differ from it; ("unknown", False) outside a repository."""
    here = Path(__file__).parent

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *args], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown", False


def machine() -> dict[str, Any]:
    """Processor, cores and versions."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        processor = lines[0].split(":", 1)[1].strip() if lines else processor
    versions = {p: importlib.metadata.version(p) for p in ("torch", "lightning", "timm")}
    return {"processor": processor, "cores": os.cpu_count(), "python": platform.python_version(), **versions}


def peak_memory() -> int:
    """The process's own peak resident memory so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # unlike ru_maxrss, not inherited from the process that started this one
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass
class Record:
    """Everything that is known about one run.

    Attributes:
        method: Name in tables.
        data: Name, seed, sizes of the data.
        backbone: timm name.
        weights_source: Where the backbone's first weights came from.
        tasks: Kept tasks.
        dropped_tasks: Tasks of the dense model that were not kept.
        seed: Of the run.
        config: Resolved and complete.
        budget: ``target`` and ``achieved``.
        sparsity: Of backbone, each kept head, the kept part, and the whole model with dropped heads counted.
        layer_sparsity: Weight name to sparsity.
        layer_component: Weight name to backbone or the head's task.
        mask_overlap: Weight name to IoU of the tasks' own masks.
        cost: By form (``dense_all_heads``, ``kept_heads``, ``compact``): params, nonzero, macs, bytes and
            latency; where it was exported also ``onnx``: bytes, latency and difference from PyTorch.
        metrics: By split: ``"seg/miou"`` to value.
        higher_is_better: Direction of each metric.
        history: Numbers of every epoch.
        score_seconds: Time for scoring.
        finetune_seconds: Time for training.
        peak_memory: Of the process, in bytes.
        checkpoint: Folder of the run's files.
        delta_m: Against the dense record, where a table computed it.
        name: The id, if the run was given one; else it is made of the entries below.
        start: Id of the record of the dense run that this one started from; empty for none.
        newtask: Of a run for a task that the dense run never saw: seconds and memory until the sub-network was ready,
            similarities, neighbours, and the metrics after some steps (:mod:`experiments.adaptation`).
    """

    method: str
    data: dict[str, Any]
    backbone: str
    weights_source: str
    tasks: list[str]
    seed: int
    config: dict[str, Any]
    metrics: dict[str, dict[str, float]]
    higher_is_better: dict[str, bool]
    dropped_tasks: list[str] = field(default_factory=list)
    budget: dict[str, Any] = field(default_factory=dict)
    sparsity: dict[str, float] = field(default_factory=dict)
    layer_sparsity: dict[str, float] = field(default_factory=dict)
    layer_component: dict[str, str] = field(default_factory=dict)
    mask_overlap: dict[str, dict[str, float]] = field(default_factory=dict)
    cost: dict[str, dict[str, Any]] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    score_seconds: float = 0.0
    finetune_seconds: float = 0.0
    peak_memory: int = 0
    checkpoint: str = ""
    delta_m: dict[str, float] = field(default_factory=dict)
    name: str = ""
    start: str = ""
    newtask: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=machine)
    commit: str = field(default_factory=lambda: commit()[0])
    dirty: bool = field(default_factory=lambda: commit()[1])
    time: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    schema: int = SCHEMA

    @property
    def id(self) -> str:
        """Readable and unique: data, method, sparsity, tasks, seed and the config's hash."""
        if self.name:
            return self.name
        target = self.budget.get("target")
        amount = "dense" if not target else f"{target:g}"
        name = f"{self.data.get('name', 'data')}-{self.method}-{amount}-{'+'.join(self.tasks)}-{self.seed}"
        return f"{name}-{config_hash(self.config)}"

    def write(self, folder: str | Path) -> Path:
        """Write the record as ``<id>.json``.

        Raises:
            ValueError: If a number is not finite.
            OSError: If it cannot be written; nothing is left then.
        """
        path = Path(folder) / f"{self.id}.json"
        try:
            text = json.dumps({"id": self.id, **asdict(self)}, indent=1, allow_nan=False)
        except ValueError as error:
            raise ValueError(f"record {self.id} holds a number that is not finite: {error}") from error
        write_atomically(path, text + "\n")
        return path


def read(path: str | Path) -> Record:
    """One record.

    Raises:
        ValueError: Naming the file, if it is damaged or of another schema.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']}, expected {SCHEMA}")
        known = {f.name for f in fields(Record)}
        return Record(**{k: v for k, v in content.items() if k in known})
    except (json.JSONDecodeError, KeyError, TypeError, ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"record {path} is damaged: {error}") from error


def load(folder: str | Path) -> pd.DataFrame:
    """All records of a folder, one row each, nested entries as dotted columns."""
    rows = [{"id": r.id, **asdict(r)} for r in (read(p) for p in sorted(Path(folder).glob("*.json")))]
    return pd.json_normalize(rows, max_level=2)
