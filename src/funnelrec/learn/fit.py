"""The training loop: `fit`, read top to bottom.

Reproducible: all randomness of a run comes from a copy of torch's generator that only the training steps use, so
evaluation, logging and checkpoints never change the result. Restartable: kill it at any instant, call `fit` again with
the same arguments, and the weights end up the same to the last bit (on CPU).
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.data.batches import Batches
from funnelrec.learn.checkpoint import CheckpointError, Checkpoints, difference
from funnelrec.learn.losses import Loss, describe, extra_terms
from funnelrec.learn.optim import Optimizers, TableOptimizer, make_optimizers

__all__ = ["FitResult", "NonFiniteError", "TrainingInterrupted", "fit"]


class NonFiniteError(ValueError):
    """A loss or gradient is NaN or infinite; raised before the optimiser's step, so the weights are still good."""

    def __init__(self, message: str, *, step: int, epoch: int, batch: int, examples: list[int], tensor: str) -> None:
        super().__init__(message)
        self.step, self.epoch, self.batch, self.examples, self.tensor = step, epoch, batch, examples, tensor


class TrainingInterrupted(SystemExit):
    """SIGTERM or SIGINT arrived and the run was saved. Uncaught, the process exits with `code` (143 or 130)."""


@dataclass(frozen=True)
class FitResult:
    """What a run came to. `history` has one entry an epoch: epoch, step, loss and what `validate` returned."""

    history: list[dict[str, float]]
    best_epoch: int | None
    best_metric: float | None
    seconds: float
    stopped_by: str  #: "epochs" or "patience"


@dataclass
class _Position:
    """Where a run stands; JSON-able."""

    epoch: int = 0
    batch: int = 0  #: batches of this epoch that are done
    step: int = 0
    loss_sum: float = 0.0  #: over the batches of this epoch, each times its rows
    rows: int = 0
    stale: int = 0  #: epochs since the best one
    best_epoch: int | None = None
    best_metric: float | None = None
    history: list[dict[str, float]] = field(default_factory=list)


def fit(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    *,
    epochs: int,
    lr: float = 1e-3,
    table_lr: float | None = None,
    table: TableOptimizer = "lazy_adam",
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
    schedule: Callable[[int], float] | None = None,
    validate: Callable[[], Mapping[str, float]] | None = None,
    metric: str | None = None,
    minimise: bool = False,
    patience: int | None = None,
    folder: Path | str | None = None,
    checkpoint_every: int | None = None,
    resume: bool = True,
    seed: int = 0,
    bf16: bool = False,
    progress: bool = True,
) -> FitResult:
    """Train `model` in place; it ends in eval mode, with the best weights when `metric` is given, else the last.

    validate: called after each epoch, model in eval mode; returns named numbers. metric: the one of them that chooses
    the best epoch, larger is better unless `minimise`. patience: stop after this many epochs without a new best.
    schedule: step -> factor of the learning rates (learn/schedules.py). clip_norm: bound on the norm of all gradients
    together. folder: where checkpoints go, every `checkpoint_every` steps and after each epoch; with `resume` the run
    goes on from the newest. bf16: the dense arithmetic in bfloat16 where torch thinks it safe. progress: a bar, when
    standard error is a terminal.

    Raises NonFiniteError before a step that would spoil the weights, TrainingInterrupted (exit code 143 or 130) after
    SIGTERM or SIGINT once the step is done and saved, CheckpointError when the folder's run is another one.
    """
    _require(epochs >= 1, f"epochs must be at least 1, received {epochs}")
    _require(patience is None or patience >= 1, f"patience must be at least 1 epoch, received {patience}")
    _require(
        checkpoint_every is None or checkpoint_every >= 1, f"checkpoint_every must be >= 1, received {checkpoint_every}"
    )
    _require(clip_norm is None or clip_norm > 0, f"clip_norm must be positive, received {clip_norm}")
    _require(metric is None or validate is not None, f"metric '{metric}' needs validate=, which returns it")
    _require(patience is None or metric is not None, "patience needs metric=, the number that must improve")
    _require(len(batches) > 0, "there is no batch to train on; the examples are empty or fewer than one batch")
    options = {
        "lr": lr, "table_lr": table_lr, "table": table, "weight_decay": weight_decay, "clip_norm": clip_norm,
        "schedule": None if schedule is None else describe(schedule), "loss": describe(loss), "metric": metric,
        "minimise": minimise, "seed": seed, "bf16": bf16,
    }  # fmt: skip
    started = time.monotonic()
    device = next(model.parameters()).device
    optimizers = make_optimizers(model, lr, table_lr, table, weight_decay)
    at, best = _Position(), None
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        torch.manual_seed(seed)
        store = None if folder is None else stack.enter_context(Checkpoints(folder))
        run = None if store is None else _Run(store, model, optimizers, _description(model, batches, options))
        if run is not None and resume:
            at, best = run.load() or (at, best)
        elif store is not None:
            store.clear()
        signals = stack.enter_context(_signals())
        bar = stack.enter_context(_bar(progress, epochs * len(batches), at.step))

        while at.epoch < epochs and not _out_of_patience(at, patience):
            model.train()
            for batch in batches.epoch(at.epoch, start=at.batch):
                if schedule is not None:
                    optimizers.set_lr_factor(schedule(at.step))
                value = _gradients(model, loss, batch.to(device), optimizers, batches, at, clip_norm, bf16)
                optimizers.step()
                at.step, at.batch = at.step + 1, at.batch + 1
                at.loss_sum, at.rows = at.loss_sum + value * batch.size, at.rows + batch.size
                bar(at, batch.size)
                if signals:
                    _leave(signals[0], run, at, best)
                if run is not None and checkpoint_every is not None and at.step % checkpoint_every == 0:
                    run.save(at, best)

            numbers = _validated(model, validate, metric)
            at.history.append({"epoch": at.epoch, "step": at.step, "loss": at.loss_sum / max(at.rows, 1), **numbers})
            at.stale += 1
            if metric is not None and _better(numbers[metric], at.best_metric, minimise):
                at.best_epoch, at.best_metric, at.stale = at.epoch, numbers[metric], 0
                best = {name: tensor.clone() for name, tensor in _weights(model).items()}
            at.epoch, at.batch, at.loss_sum, at.rows = at.epoch + 1, 0, 0.0, 0
            if signals:
                _leave(signals[0], run, at, best)
            if run is not None:
                run.save(at, best)

        if best is not None:
            _load_weights(model, best)
    optimizers.zero_grad()
    model.eval()
    stopped_by = "patience" if _out_of_patience(at, patience) else "epochs"
    return FitResult(at.history, at.best_epoch, at.best_metric, time.monotonic() - started, stopped_by)


def _gradients(
    model: nn.Module,
    loss: Loss,
    batch: Batch,
    optimizers: Optimizers,
    batches: Batches,
    at: _Position,
    clip_norm: float | None,
    bf16: bool,
) -> float:
    """The loss of a batch; its checked and clipped gradients are left on the parameters."""
    optimizers.zero_grad()
    with torch.autocast(next(iter(batch.values())).device.type, torch.bfloat16) if bf16 else nullcontext():
        total = loss(model, batch)
        for term in extra_terms(model, batch).values():
            total = total + term
    value = float(total.detach())
    if not math.isfinite(value):
        raise _non_finite("loss", value, batch, batches, at)
    total.backward()  # type: ignore[no-untyped-call]
    values = []
    for parameter in model.parameters():
        if parameter.grad is not None:
            if parameter.grad.is_sparse:
                parameter.grad = parameter.grad.coalesce()  # a row that occurs twice counts once in the norm
                values.append(parameter.grad.values())
            else:
                values.append(parameter.grad)
    norm = float(torch.nn.utils.get_total_norm(values))
    if not math.isfinite(norm):
        raise _non_finite("gradient", norm, batch, batches, at, model)
    if clip_norm is not None and norm > clip_norm:
        for gradient in values:
            gradient.mul_(clip_norm / norm)
    return value


def _non_finite(
    what: str, value: float, batch: Batch, batches: Batches, at: _Position, model: nn.Module | None = None
) -> NonFiniteError:
    """The error that says where it happened and which numbers of the batch or of the model are to blame."""
    where = [f"parameter {name} (gradient)" for name, p in _bad_gradients(model)]
    for name, tensor in batch.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            rows = (~tensor.isfinite()).flatten(1).any(1) if tensor.dim() > 1 else ~tensor.isfinite()
            where.append(f"batch.{name} in rows {_some(rows.nonzero().squeeze(1).tolist())}")
    tensor_name = where[0] if where else what
    examples = _example_numbers(batches, at)
    message = (
        f"the {what} is {value} at step {at.step}, epoch {at.epoch}, batch {at.batch} "
        f"(examples {_some(examples)}); not finite: {', '.join(where) or what}. "
        "The step was not taken; look at these rows, or lower lr, or set clip_norm"
    )
    return NonFiniteError(message, step=at.step, epoch=at.epoch, batch=at.batch, examples=examples, tensor=tensor_name)


def _bad_gradients(model: nn.Module | None) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in () if model is None else model.named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad.values() if parameter.grad.is_sparse else parameter.grad
            if not bool(gradient.isfinite().all()):
                yield name, gradient


def _example_numbers(batches: Batches, at: _Position) -> list[int]:
    indices = getattr(batches, "_indices", None)
    return [] if indices is None else [int(i) for i in next(iter(indices(at.epoch, at.batch)))]


def _some(numbers: list[int], most: int = 8) -> str:
    return ", ".join(map(str, numbers[:most])) + (f", … {len(numbers)} in all" if len(numbers) > most else "")


def _validated(
    model: nn.Module, validate: Callable[[], Mapping[str, float]] | None, metric: str | None
) -> dict[str, float]:
    """What `validate` returns, with the training's random numbers out of its reach."""
    if validate is None:
        return {}
    model.eval()
    with torch.random.fork_rng():
        numbers = {name: float(value) for name, value in validate().items()}
    if metric is not None and metric not in numbers:
        raise ValueError(f"validate returned no '{metric}'; it returned {', '.join(numbers) or 'nothing'}")
    return numbers


def _better(value: float, best: float | None, minimise: bool) -> bool:
    if math.isnan(value):
        return False
    return best is None or (value < best if minimise else value > best)


def _out_of_patience(at: _Position, patience: int | None) -> bool:
    return patience is not None and at.stale >= patience


class _Run:
    """A run and its checkpoints: what is saved, and how it is put back."""

    def __init__(
        self, store: Checkpoints, model: nn.Module, optimizers: Optimizers, description: dict[str, Any]
    ) -> None:
        self.store, self.model, self.optimizers, self.description = store, model, optimizers, description
        self.saved_step: int | None = None

    def save(self, at: _Position, best: dict[str, Tensor] | None) -> None:
        state = self.optimizers.state_dict()
        groups = {"weights": _weights(self.model), "optimizer": state["tensors"], "rng": _rng(self.model)}
        if best is not None:
            groups["best"] = best
        values = {"run": self.description, "position": asdict(at), "optimizer": state["values"]}
        self.store.save(at.step, groups, values)

    def load(self) -> tuple[_Position, dict[str, Tensor] | None] | None:
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
        _load_weights(self.model, groups["weights"])
        self.optimizers.load_state_dict({"tensors": groups.get("optimizer", {}), "values": values["optimizer"]})
        _set_rng(groups["rng"], self.model)
        best = groups.get("best")
        return _Position(**values["position"]), None if best is None else {k: v.clone() for k, v in best.items()}


def _description(model: nn.Module, batches: Batches, options: dict[str, Any]) -> dict[str, Any]:
    """What must be the same for a run to be continued."""
    examples = batches.examples
    fingerprint = getattr(getattr(examples, "dataset", None), "fingerprint", None)
    return {
        "model": f"{type(model).__module__}.{type(model).__qualname__}",
        "modules": repr(model),
        "weights": {name: [str(t.dtype), *t.shape] for name, t in _weights(model).items()},
        "data": {
            "examples": type(examples).__qualname__, "number": len(examples), "fingerprint": fingerprint,
            "batch_size": batches.batch_size, "shuffle": batches.shuffle, "seed": batches.seed,
            "drop_last": batches.drop_last, "block": batches.block,
        },
        "fit": options,
    }  # fmt: skip


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers; a tensor that has two names is listed once."""
    seen: set[tuple[int, int]] = set()
    weights = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.numel())
        if tensor.numel() == 0 or key not in seen:
            weights[name] = tensor
            seen.add(key)
    return weights


def _load_weights(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in _weights(model).items():
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


@contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that SIGTERM or SIGINT is added to, instead of ending the process; a second one ends it at once.

    Handlers can only be set in the main thread; elsewhere the list stays empty.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for which in before:
            signal.signal(which, signal.SIG_DFL)

    for which in before:
        signal.signal(which, note)
    try:
        yield received
    finally:
        for which, handler in before.items():
            signal.signal(which, handler if handler is not None else signal.SIG_DFL)


def _leave(number: int, run: _Run | None, at: _Position, best: dict[str, Tensor] | None) -> None:
    if run is not None:
        run.save(at, best)
    raise TrainingInterrupted(128 + number)


@contextmanager
def _bar(wanted: bool, total: int, done: int) -> Iterator[Callable[[_Position, int], None]]:
    """A function to call after each step; it draws at most ten times a second, and nothing when not on a terminal."""
    console = Console(stderr=True)
    if not (wanted and console.is_terminal):
        yield lambda at, rows: None
        return
    columns = (
        TextColumn("epoch {task.fields[epoch]}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[speed]:,.0f} rows/s  loss {task.fields[loss]:.4f}  {task.fields[best]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total, completed=done, epoch=0, speed=0.0, loss=math.nan, best="")
        last, since = time.monotonic(), 0

        def advance(at: _Position, rows: int) -> None:
            nonlocal last, since
            since += rows
            now = time.monotonic()
            if now - last >= 0.1 or at.step == total:
                best = "" if at.best_metric is None else f"best {at.best_metric:.4f} (epoch {at.best_epoch})"
                progress.update(
                    task, completed=at.step, epoch=at.epoch, speed=since / max(now - last, 1e-9),
                    loss=at.loss_sum / max(at.rows, 1), best=best,
                )  # fmt: skip
                last, since = now, 0

        yield advance


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
