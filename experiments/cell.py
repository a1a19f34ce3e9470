"""Cell: one run of a grid, as configs and settings; its id is known without running anything."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import yaml

CONFIGS = Path(__file__).parent.parent / "configs"


@cache
def _content(name: str) -> str:
    """A config's content as JSON, so that comments and layout do not matter."""
    path = CONFIGS / f"{name}.yaml"
    if not path.is_file():
        folder = (CONFIGS / name).parent
        raise ValueError(f"no config {name!r}; {folder.name} has {', '.join(sorted(p.stem for p in folder.glob('*')))}")
    return json.dumps(yaml.safe_load(path.read_text()) or {})


def _merge(into: dict[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """``into`` with the entries of ``new``; a new class replaces the old one with its arguments."""
    replaced = "class_path" in new and new["class_path"] != into.get("class_path", new["class_path"])
    result = {} if replaced else dict(into)
    for key, value in new.items():
        old = result.get(key)
        result[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return result


@dataclass(frozen=True)
class Cell:
    """One run of a grid.

    Two cells with the same configs' content, settings and start are the same cell, whatever table asks for them. The
    id does not cover defaults in the code, so that a new option leaves finished cells finished.

    Attributes:
        configs: Names under ``configs/``, without ``.yaml``; later ones win.
        settings: Options on top, dotted, as on the command line.
        start: The dense run whose weights it starts from.

    Raises:
        ValueError: When asked for anything, if a config does not exist.
    """

    configs: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    start: Cell | None = None

    @cached_property
    def config(self) -> dict[str, Any]:
        """Configs and settings merged, without the code's defaults."""
        merged: dict[str, Any] = {}
        for name in self.configs:
            merged = _merge(merged, json.loads(_content(name)))
        for option, value in self.settings.items():
            *path, last = option.split(".")
            place = merged
            for key in path:
                if not isinstance(place.get(key), dict):
                    place[key] = {}
                place = place[key]
            place[last] = value
        return merged

    @property
    def method(self) -> str:
        """The method's name in tables."""
        return str(self.config.get("method", "dense"))

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.config.get("seed_everything", 1))

    @property
    def tasks(self) -> list[str]:
        """The kept tasks."""
        return list(self.config.get("pruning", {}).get("tasks") or self.config["data"]["init_args"]["tasks"])

    @property
    def target(self) -> float | None:
        """The budget's target, None for a dense run."""
        return ((self.config.get("pruning", {}).get("budget") or {}).get("init_args") or {}).get("target")

    @cached_property
    def id(self) -> str:
        """Readable and unique: method, sparsity, tasks, seed and a hash of everything."""
        content = {"config": self.config, "start": self.start.id if self.start else None}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
        amount = f"-{self.target:g}" if self.target else ""
        return f"{self.method}{amount}-{'+'.join(self.tasks)}-{self.seed}-{digest}"

    def argv(self, records: Path, runs: Path) -> list[str]:
        """The command line of :mod:`experiments.run`.

        Args:
            records: Folder of records.
            runs: Folder of the runs' folders.
        """
        line = [part for name in self.configs for part in ("--config", str(CONFIGS / f"{name}.yaml"))]
        for option, value in self.settings.items():
            if value is None and "." in option:  # jsonargparse takes null inside a dataclass for the text 'None'
                option, _, name = option.rpartition(".")
                value = {name: None}  # merged with the other entries, not put in their place
            line.append(f"--{option}={value if isinstance(value, str) else json.dumps(value)}")
        if self.start is not None:
            line.append(f"--init={runs / self.start.id}")
        return [*line, f"--id={self.id}", f"--out={runs / self.id}", f"--records={records}"]
