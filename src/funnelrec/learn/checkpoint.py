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
import math
import os
import platform
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from funnelrec.data.batches import Batches
from funnelrec.learn.optim import Optimizers

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "Position",
    "Run",
    "describe_run",
    "difference",
    "load_weights",
    "weights_of",
]

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


@dataclass
class Position:
    """Where a run stands; JSON-able."""

    epoch: int = 0
    batch: int = 0  #: batches of this epoch that are done
    step: int = 0
    loss_sum: float = 0.0  #: over the batches of this epoch, each times its rows
    rows: int = 0
    stale: int = 0  #: epochs since the best one
    best_epoch: int | None = None
    best_metric: float | None = None
    history: list[dict[str, int | float]] = field(default_factory=list)

    def end_step(self, loss: float, rows: int) -> None:
        """Count one more batch."""
        self.step, self.batch = self.step + 1, self.batch + 1
        self.loss_sum, self.rows = self.loss_sum + loss * rows, self.rows + rows

    def end_epoch(self, numbers: Mapping[str, float], metric: str | None, minimise: bool) -> bool:
        """Write the epoch down and go to the next; True when it is the best so far by `metric`."""
        self.history.append(
            {"epoch": self.epoch, "step": self.step, "loss": self.loss_sum / max(self.rows, 1), **numbers}
        )
        value = math.nan if metric is None else numbers[metric]
        before = -math.inf if self.best_metric is None else self.best_metric * (-1 if minimise else 1)
        improved = value * (-1 if minimise else 1) > before  # never true for NaN
        self.stale += 1
        if improved:
            self.best_epoch, self.best_metric, self.stale = self.epoch, value, 0
        self.epoch, self.batch, self.loss_sum, self.rows = self.epoch + 1, 0, 0.0, 0
        return improved


class Run:
    """A run and its checkpoints: what is saved, and how it is put back."""

    def __init__(
        self, store: Checkpoints, model: nn.Module, optimizers: Optimizers, description: dict[str, Any]
    ) -> None:
        self.store, self.model, self.optimizers, self.description = store, model, optimizers, description

    def save(self, at: Position, best: dict[str, Tensor] | None) -> None:
        """Write weights, optimiser, random generator, position and the best weights so far."""
        state = self.optimizers.state_dict()
        groups = {"weights": weights_of(self.model), "optimizer": state["tensors"], "rng": _rng(self.model)}
        if best is not None:
            groups["best"] = best
        values = {"run": self.description, "position": asdict(at), "optimizer": state["values"]}
        self.store.save(at.step, groups, values)

    def load(self) -> tuple[Position, dict[str, Tensor] | None] | None:
        """Put back the newest checkpoint, in place; its position and best weights, or None when there is none."""
        found = self.store.load()
        if found is None:
            return None
        groups, values = found
        changes = difference(values["run"], self.description)
        if changes:
            raise CheckpointError(
                f"the run in {self.store.folder} is another one ({'; '.join(changes)}); "
                "undo the change, choose another folder, or pass resume=False to start anew"
            )
        load_weights(self.model, groups["weights"])
        self.optimizers.load_state_dict({"tensors": groups.get("optimizer", {}), "values": values["optimizer"]})
        _set_rng(groups["rng"], self.model)
        best = groups.get("best")
        return Position(**values["position"]), None if best is None else {k: v.clone() for k, v in best.items()}


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
    """One level of names. Parts of a larger tensor are copied: safetensors refuses shared memory."""
    flat = {}
    for group, tensors in groups.items():
        for name, tensor in tensors.items():
            whole = tensor.detach().cpu().contiguous()
            flat[f"{group}/{name}"] = whole if whole.untyped_storage().nbytes() == whole.nbytes else whole.clone()
    return flat


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


def describe_run(model: nn.Module, batches: Batches, options: dict[str, Any]) -> dict[str, Any]:
    """What must be the same for a run to be continued."""
    examples = batches.examples
    fingerprint = getattr(getattr(examples, "dataset", None), "fingerprint", None)
    return {
        "model": f"{type(model).__module__}.{type(model).__qualname__}",
        "modules": {name: f"{type(m).__name__}({m.extra_repr()})" for name, m in model.named_modules() if name},
        "weights": {name: [str(t.dtype), *t.shape] for name, t in weights_of(model).items()},
        "data": {
            "examples": type(examples).__qualname__, "number": len(examples), "fingerprint": fingerprint,
            "batch_size": batches.batch_size, "shuffle": batches.shuffle, "seed": batches.seed,
            "drop_last": batches.drop_last, "block": batches.block,
        },
        "fit": options,
    }  # fmt: skip


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers; a tensor that has two names is listed once."""
    seen: set[tuple[int, int]] = set()
    weights = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.numel())
        if tensor.numel() == 0 or key not in seen:
            weights[name] = tensor
            seen.add(key)
    return weights


def load_weights(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Copy what `weights_of` gave back into the model, in place."""
    with torch.no_grad():
        for name, tensor in weights_of(model).items():
            tensor.copy_(saved[name])


def _rng(model: nn.Module) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {"cpu": torch.get_rng_state()} | (
        {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    )


def _set_rng(states: Mapping[str, Tensor], model: nn.Module) -> None:
    torch.set_rng_state(states["cpu"].clone())
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].clone(), next(model.parameters()).device)
