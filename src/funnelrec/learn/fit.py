"""The training loop: `fit`, read top to bottom.

Reproducible: all randomness of a run comes from a copy of torch's generator that only the training steps use, so
evaluation, logging and checkpoints never change the result. Restartable: kill it at any instant, call `fit` again with
the same arguments, and the weights end up the same to the last bit (on CPU).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.data.batches import Batches
from funnelrec.learn.checkpoint import Checkpoints, Position, Run, describe_run, load_weights, weights_of
from funnelrec.learn.guard import (
    NonFiniteError,
    TrainingInterrupted,
    catch_signals,
    clip,
    collect_gradients,
    require_finite,
)
from funnelrec.learn.losses import Loss, describe, extra_terms
from funnelrec.learn.memory import kept_memory
from funnelrec.learn.optim import Optimizers, TableOptimizer, make_optimizers
from funnelrec.learn.progress import progress_bar
from funnelrec.learn.regularise import RowL2

__all__ = ["FitResult", "NonFiniteError", "TrainingInterrupted", "fit"]


@dataclass(frozen=True)
class FitResult:
    """What a run came to. `history` has one entry an epoch: epoch, step, loss and what `validate` returned."""

    history: list[dict[str, int | float]]
    best_epoch: int | None
    best_metric: float | None
    seconds: float
    stopped_by: str  #: "epochs" or "patience"


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
    momentum: float = 0.0,
    table_l2: float | RowL2 = 0.0,
    ftrl: Mapping[str, Mapping[str, float]] | None = None,
    proximal: Mapping[str, Mapping[str, float]] | None = None,
    lr_factors: Mapping[str, float] | None = None,
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
    schedule: step -> factor of the learning rates, FTRL's apart (learn/schedules.py). table_l2, ftrl, proximal:
    penalties on table rows, and parameters with an optimiser of their own (learn/optim.py, make_optimizers).
    lr_factors: what the learning rate of a part of the model is multiplied by, {"layer1": 0.1} for all of "layer1.…".
    clip_norm: bound on the norm of all gradients together. folder: where checkpoints go, every `checkpoint_every` steps
    and after each epoch; with `resume` the run goes on from the newest. bf16: the dense arithmetic in bfloat16 where
    torch thinks it safe.
    progress: a bar, when standard error is a terminal.
    While it trains, memory that it frees stays with the process (learn/memory.py).

    Raises NonFiniteError before a step that would spoil the weights, TrainingInterrupted (exit code 143 or 130) after
    SIGTERM or SIGINT once the step is done and saved, CheckpointError when the folder's run is another one.
    """
    _check(epochs, patience, checkpoint_every, clip_norm, validate, metric, batches)
    options = {
        "lr": lr, "table_lr": table_lr, "table": table, "weight_decay": weight_decay,
        "momentum": momentum, "clip_norm": clip_norm,
        "schedule": None if schedule is None else describe(schedule), "loss": describe(loss), "metric": metric,
        "minimise": minimise, "seed": seed, "bf16": bf16, "table_l2": repr(table_l2),
        "ftrl": _plain(ftrl), "proximal": _plain(proximal), "lr_factors": dict(lr_factors or {}),
    }  # fmt: skip
    started = time.monotonic()
    optimizers = make_optimizers(
        model, lr, table_lr, table, weight_decay,
        momentum=momentum, table_l2=table_l2, ftrl=ftrl, proximal=proximal, lr_factors=lr_factors,
    )  # fmt: skip
    device = next(model.parameters()).device
    at, best = Position(), None
    with ExitStack() as stack:
        stack.enter_context(kept_memory())
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        torch.manual_seed(seed)
        store = None if folder is None else stack.enter_context(Checkpoints(folder))
        run = None if store is None else Run(store, model, optimizers, describe_run(model, batches, options))
        if run is not None and resume:
            at, best = run.load() or (at, best)
        elif store is not None:
            store.clear()
        signals = stack.enter_context(catch_signals())
        bar = stack.enter_context(progress_bar(progress, epochs * len(batches), at.step))

        while at.epoch < epochs and not _out_of_patience(at, patience):
            model.train()
            for batch in batches.epoch(at.epoch, start=at.batch):
                if schedule is not None:
                    optimizers.set_lr_factor(schedule(at.step))
                value = _step(model, loss, optimizers, batch.to(device), batches, at, clip_norm, bf16)
                at.end_step(value, batch.size)
                bar(at, batch.size)
                if signals:
                    _leave(signals[0], run, at, best)
                if run is not None and checkpoint_every is not None and at.step % checkpoint_every == 0:
                    run.save(at, best)

            numbers = _validated(model, validate, metric)
            if at.end_epoch(numbers, metric, minimise):
                best = {name: tensor.clone() for name, tensor in weights_of(model).items()}
            if signals:
                _leave(signals[0], run, at, best)
            if run is not None:
                run.save(at, best)

        if best is not None:
            load_weights(model, best)
    optimizers.zero_grad()
    model.eval()
    stopped_by = "patience" if _out_of_patience(at, patience) else "epochs"
    return FitResult(at.history, at.best_epoch, at.best_metric, time.monotonic() - started, stopped_by)


def _step(
    model: nn.Module,
    loss: Loss,
    optimizers: Optimizers,
    batch: Batch,
    batches: Batches,
    at: Position,
    clip_norm: float | None,
    bf16: bool,
) -> float:
    """Loss, gradients, and one update of the weights unless a number is not finite."""
    optimizers.zero_grad()
    device = next(iter(batch.values())).device.type
    with torch.autocast(device, torch.bfloat16) if bf16 else nullcontext():
        total = loss(model, batch)
        for term in extra_terms(model, batch).values():
            total = total + term
    require_finite("loss", total, batch, batches, at)
    total.backward()  # type: ignore[no-untyped-call]
    gradients = collect_gradients(model)
    norm = torch.nn.utils.get_total_norm(gradients)
    require_finite("gradient", norm, batch, batches, at, model)
    clip(gradients, norm, clip_norm)
    optimizers.step()
    return float(total.detach())


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


def _out_of_patience(at: Position, patience: int | None) -> bool:
    return patience is not None and at.stale >= patience


def _plain(options: Mapping[str, Mapping[str, float]] | None) -> dict[str, dict[str, float]] | None:
    return None if options is None else {name: dict(values) for name, values in options.items()}


def _leave(number: int, run: Run | None, at: Position, best: dict[str, Tensor] | None) -> None:
    if run is not None:
        run.save(at, best)
    raise TrainingInterrupted(128 + number)


def _check(
    epochs: int,
    patience: int | None,
    checkpoint_every: int | None,
    clip_norm: float | None,
    validate: object,
    metric: str | None,
    batches: Batches,
) -> None:
    for name, value in (("epochs", epochs), ("patience", patience), ("checkpoint_every", checkpoint_every)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, received {value}")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm must be positive, received {clip_norm}")
    if metric is not None and validate is None:
        raise ValueError(f"metric '{metric}' needs validate=, the function that returns it")
    if patience is not None and metric is None:
        raise ValueError("patience needs metric=, the name of the number that must improve")
    if len(batches) == 0:
        raise ValueError("there is no batch to train on: no examples, or fewer than one batch and drop_last=True")
