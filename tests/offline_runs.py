"""Read an offline W&B run back: the records of its ``.wandb`` file, which is a LevelDB log of protocol buffers."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER, PREFIX = 32768, 7, 7  # LevelDB's block and record header; W&B's own file header


def _chunks(content: bytes) -> Iterator[bytes]:
    """Whole messages, put together from their parts in the blocks."""
    at, parts = PREFIX, []
    while at + HEADER <= len(content):
        room = BLOCK - at % BLOCK
        if room < HEADER:  # the rest of a block is padding
            at += room
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        if kind == 0:
            return
        parts.append(content[at + HEADER : at + HEADER + length])
        at += HEADER + length
        if kind in (1, 4):  # full, or last part
            yield b"".join(parts)
            parts = []


def _plain(items: Any) -> dict[str, Any]:
    """W&B's lists of (key or nested key, JSON) as a flat dict with dotted keys."""
    return {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}


def _ended(path: Path) -> list[Any]:
    """The messages of a run's file, once the run's end is among them: W&B's own process may still write."""
    from wandb.proto import wandb_internal_pb2 as messages

    for _ in range(600):
        found = [messages.Record.FromString(chunk) for chunk in _chunks(path.read_bytes())]
        if any(r.WhichOneof("record_type") == "exit" for r in found):
            return found
        time.sleep(0.1)
    raise AssertionError(f"{path} has no end")


def read_run(folder: Path) -> dict[str, Any]:
    """What an offline run holds.

    Args:
        folder: ``offline-run-*``.

    Returns:
        ``run`` (its facts), ``config``, ``history`` (one dict a logged step), ``summary`` and ``artifacts``.
    """
    (path,) = folder.glob("*.wandb")
    found: dict[str, Any] = {"run": None, "config": {}, "history": [], "summary": {}, "artifacts": []}
    for record in _ended(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found["run"] = record.run
            found["config"] |= _plain(record.run.config.update)
        elif kind == "config":
            found["config"] |= _plain(record.config.update)
        elif kind == "history":
            found["history"].append(_plain(record.history.item))
        elif kind == "summary":
            found["summary"] |= _plain(record.summary.update)
        elif kind == "artifact":
            found["artifacts"].append(record.artifact)
    return found
