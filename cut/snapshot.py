"""Snapshot: where a long piece of work stands, kept in one file, so that it goes on after it was stopped."""

from __future__ import annotations

import glob
import hashlib
import io
import json
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cut.files import write_atomically

FORMAT = "cut snapshot 1"
_DIGEST_BYTES = 32  # of SHA-256, in front of what torch wrote
_log = logging.getLogger(__name__)


class Snapshot:
    """Sections of plain values and tensors in one file, written whole or not at all, and read without code.

    A file that is damaged is told of and not used. One of other work is never overwritten: it may hold hours of it.

    Args:
        path: The file; it need not exist.
        key: What the work depends on, JSON-able: the same key goes on, another one is refused.
        anew: What the message about other work tells to do.

    Raises:
        ValueError: If the file is of other work; the message names the first difference.
    """

    def __init__(self, path: Path, key: Mapping[str, Any] | None = None, anew: str = "delete it to begin anew") -> None:
        self.path, self.anew = path, anew
        self.key: dict[str, Any] = json.loads(json.dumps(dict(key or {})))
        self._sweep()
        stored = self._read()
        self.sections: dict[str, Any] = stored.get("sections", {})
        if stored:
            self.check("", self.key, stored.get("key"))

    def check(self, what: str, key: Mapping[str, Any], stored: Any) -> None:
        """Compare a key with a stored one.

        Raises:
            ValueError: If they differ.
        """
        stored = stored if isinstance(stored, dict) else {}
        for name in [*key, *stored]:
            if key.get(name) != stored.get(name):
                raise ValueError(
                    f"{self.path} is of another run: {what}{name} was {stored.get(name)!r}, now it is "
                    f"{key.get(name)!r}; {self.anew}"
                )

    def get(self, section: str) -> Any:
        """What was kept under a name, None if nothing was."""
        return self.sections.get(section)

    def keep(self, section: str, value: Any) -> None:
        """Put a section into the file, beside the others.

        Args:
            section: Its name.
            value: Dicts, lists, numbers, strings and tensors only.

        Raises:
            OSError: If it cannot be written; what the file held before is there still.
        """
        self.sections[section] = value
        buffer = io.BytesIO()
        buffer.write(bytes(_DIGEST_BYTES))
        torch.save({"format": FORMAT, "key": self.key, "sections": self.sections}, buffer)
        view = buffer.getbuffer()
        view[:_DIGEST_BYTES] = hashlib.sha256(view[_DIGEST_BYTES:]).digest()
        view.release()
        write_atomically(self.path, buffer.getvalue())

    def remove(self) -> None:
        """Delete the file, and what a killed process left half-written."""
        self.sections = {}
        self.path.unlink(missing_ok=True)
        self._sweep()

    def _sweep(self) -> None:
        """Delete half-written files."""
        for part in self.path.parent.glob(f"{glob.escape(self.path.name)}*.part"):
            part.unlink(missing_ok=True)

    def _read(self) -> dict[str, Any]:
        """What the file holds; nothing if it is missing or damaged."""
        if not self.path.is_file():
            return {}
        content = self.path.read_bytes()
        if hashlib.sha256(content[_DIGEST_BYTES:]).digest() != content[:_DIGEST_BYTES]:
            _log.warning("%s is damaged and cannot be used; beginning anew", self.path)
            return {}
        try:
            stored = torch.load(io.BytesIO(content[_DIGEST_BYTES:]), map_location="cpu", weights_only=True)
            known = stored["format"] == FORMAT and isinstance(stored["sections"], dict)
        except Exception:  # unpickling fails in many ways
            known = False
        if not known:
            _log.warning("%s cannot be read by this version; beginning anew", self.path)
            return {}
        return dict(stored)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Short digest of named tensors: names, types, shapes and values."""
    found = hashlib.sha256()
    for name, value in tensors.items():
        found.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


@contextmanager
def patient() -> Iterator[Callable[[], bool]]:
    """While it lasts, the first Ctrl-C is noted, for the work to stop where it can be kept; the second stops at once.

    Yields:
        Whether to stop. KeyboardInterrupt is raised when the block ends.
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread() or (
        signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield lambda: False
        return

    def note(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if asked:
        raise KeyboardInterrupt
