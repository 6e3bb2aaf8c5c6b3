"""Checkpoints: one folder each, safetensors + JSON, on disk whole or not at all.

    run/
      lock                        held by the trainer that is using the folder
      step-000000001200/          the newest; its predecessor is kept too
        tensors.safetensors         every tensor, named "group/name"
        state.json                  everything that is no tensor
        manifest.json               SHA-256 of the two

A checkpoint is written under a temporary name, its files and the folder are flushed to the disk, and only then does it
get its name. safetensors notices neither a flipped bit nor half a file, so nothing is read before its digest agrees.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["CheckpointError", "Checkpoints", "difference"]

TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
PREFIX, TEMPORARY, DOOMED = "step-", ".writing-", ".deleting-"

Groups = Mapping[str, Mapping[str, Tensor]]


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, read or used for this run."""


class Checkpoints:
    """The checkpoints of one run, for one trainer at a time: use it as a context manager, which holds the lock.

    Entering raises CheckpointError when another process holds the folder. A lock whose process has died is no
    obstacle: the operating system releases it.
    """

    def __init__(self, folder: Path | str, *, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, received {keep}")
        self.folder = Path(folder)
        self.keep = keep
        self._lock: int | None = None

    def __enter__(self) -> Checkpoints:
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.pread(lock, 400, 0).decode(errors="replace") or "unknown"
            os.close(lock)
            raise CheckpointError(
                f"another trainer is using {self.folder} ({owner}); wait for it, stop it, or choose another folder"
            ) from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"pid {os.getpid()} on {platform.node()}".encode(), 0)
        self._lock = lock
        for leftover in (*self.folder.glob(f"{TEMPORARY}*"), *self.folder.glob(f"{DOOMED}*")):
            shutil.rmtree(leftover)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def save(self, step: int, groups: Groups, state: Mapping[str, Any]) -> Path:
        """Write the checkpoint of `step` and drop the oldest. On failure the earlier checkpoints are untouched.

        `groups` maps group -> name -> tensor; `state` is JSON-able. Raises CheckpointError when it cannot be written
        (a full disk).
        """
        final, temporary = self.folder / f"{PREFIX}{step:012d}", self.folder / f"{TEMPORARY}{step:012d}"
        try:
            temporary.mkdir()
            save_file(_flat(groups), temporary / TENSORS)
            (temporary / STATE).write_text(json.dumps(state, allow_nan=True, separators=(",", ":")))
            digests = {name: _digest(temporary / name) for name in (TENSORS, STATE)}
            (temporary / MANIFEST).write_text(json.dumps(digests, separators=(",", ":")))
            for path in (temporary / TENSORS, temporary / STATE, temporary / MANIFEST, temporary):
                _flush(path)
            if final.exists():
                self._remove(final)
            temporary.rename(final)
            _flush(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(
                f"could not write the checkpoint of step {step} in {self.folder} ({error}); the earlier ones are whole"
            ) from error
        for old in self.all()[: -self.keep]:
            self._remove(old)
        return final

    def load(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
        """The newest whole checkpoint as (groups, state), or None when there is none.

        A damaged one is passed over with a warning. Raises CheckpointError, with the reason for each, when there are
        checkpoints and all are damaged.
        """
        reasons = []
        for path in reversed(self.all()):
            try:
                return _read(path)
            except (OSError, ValueError, SafetensorError) as error:
                reasons.append(f"{path.name}: {error}")
                warnings.warn(f"damaged checkpoint passed over, {reasons[-1]}", stacklevel=2)
        if reasons:
            raise CheckpointError(
                f"every checkpoint in {self.folder} is damaged ({'; '.join(reasons)}); "
                "remove them to start anew, or pass resume=False"
            )
        return None

    def all(self) -> list[Path]:
        """The folders of the finished checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob(f"{PREFIX}*") if path.is_dir())

    def clear(self) -> None:
        """Remove every checkpoint."""
        for path in self.all():
            self._remove(path)

    def _remove(self, path: Path) -> None:
        doomed = path.with_name(f"{DOOMED}{path.name}")  # never a half-deleted checkpoint under a valid name
        path.rename(doomed)
        shutil.rmtree(doomed)


def difference(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """What differs between two descriptions of a run, one line an entry."""
    lines = []
    for key in sorted({*saved, *current}):
        old, new = saved.get(key, "(absent)"), current.get(key, "(absent)")
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += [f"{key}.{line}" for line in difference(old, new)]
        elif old != new:
            lines.append(f"{key}: {old} -> {new}")
    return lines


def _flat(groups: Groups) -> dict[str, Tensor]:
    return {
        f"{group}/{name}": tensor.detach().cpu().contiguous()
        for group, tensors in groups.items()
        for name, tensor in tensors.items()
    }


def _read(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    digests = json.loads((path / MANIFEST).read_text())
    if not isinstance(digests, dict) or sorted(digests) != sorted((TENSORS, STATE)):
        raise ValueError(f"{MANIFEST} does not name {TENSORS} and {STATE}")
    for name, expected in digests.items():
        found = _digest(path / name)
        if found != expected:
            raise ValueError(f"SHA-256 of {name} is {found[:12]}…, {MANIFEST} says {str(expected)[:12]}…")
    groups: dict[str, dict[str, Tensor]] = {}
    for full, tensor in load_file(path / TENSORS).items():
        group, _, name = full.partition("/")
        groups.setdefault(group, {})[name] = tensor
    state: dict[str, Any] = json.loads((path / STATE).read_text())
    return groups, state


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Force a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
