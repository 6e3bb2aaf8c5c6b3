"""Spool: events appended to a file, a line of JSON each, on disk before they are confirmed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import orjson

__all__ = ["Spool", "SpoolFull"]

MAX_BYTES = 256 * 2**20


class SpoolFull(OSError):
    """The file has reached its bound; move it away and the spool begins a new one."""


class Spool:
    """Appends to `file`, which never grows beyond `max_bytes`. A half line that a crash left behind is cut off."""

    def __init__(self, file: Path, max_bytes: int = MAX_BYTES) -> None:
        self.file = file
        self.max_bytes = max_bytes
        self._lock = Lock()
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            _cut_half_line(file)

    def append(self, events: Sequence[Mapping[str, Any]]) -> None:
        """All of them or none. Raises SpoolFull; OSError when the disk refuses."""
        lines = b"".join(orjson.dumps(e) + b"\n" for e in events)
        with self._lock:
            # Opened anew each time: whoever collects the events may have moved the file away.
            descriptor = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                size = os.fstat(descriptor).st_size
                if size + len(lines) > self.max_bytes:
                    raise SpoolFull(f"the spool holds {size} of {self.max_bytes} bytes; move {self.file.name} away")
                try:
                    if os.write(descriptor, lines) != len(lines):
                        raise OSError(f"the disk took a part of {len(lines)} bytes")
                    os.fsync(descriptor)
                except OSError:
                    os.ftruncate(descriptor, size)
                    raise
            finally:
                os.close(descriptor)


def _cut_half_line(file: Path) -> None:
    content = file.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with file.open("r+b") as opened:
            opened.truncate(whole)
