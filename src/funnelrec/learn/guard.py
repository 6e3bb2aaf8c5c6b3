"""What may end a run before its time: a number that is not finite, or a signal."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.core.nn.embedding import coalesced
from funnelrec.data.batches import Batches
from funnelrec.learn.checkpoint import Position

__all__ = ["NonFiniteError", "TrainingInterrupted", "catch_signals", "clip", "collect_gradients", "require_finite"]


class NonFiniteError(ValueError):
    """A loss or gradient is NaN or infinite; raised before the optimiser's step, so the weights are still good."""

    def __init__(self, message: str, *, step: int, epoch: int, batch: int, examples: list[int], tensor: str) -> None:
        super().__init__(message)
        self.step, self.epoch, self.batch, self.examples, self.tensor = step, epoch, batch, examples, tensor


class TrainingInterrupted(SystemExit):
    """SIGTERM or SIGINT arrived and the run was saved. Uncaught, the process exits with `code` (143 or 130)."""


def collect_gradients(model: nn.Module) -> list[Tensor]:
    """The gradient values of all parameters, to be changed in place.

    A sparse gradient is made to hold each row once first, else its norm would be wrong.
    """
    values = []
    for parameter in model.parameters():
        if parameter.grad is not None:
            if parameter.grad.is_sparse:
                parameter.grad = coalesced(parameter.grad)
            values.append(_values(parameter.grad))
    return values


def clip(gradients: list[Tensor], norm: Tensor, bound: float | None) -> None:
    """Scale all gradients by bound / norm where the norm is larger."""
    if bound is not None and float(norm) > bound:
        for gradient in gradients:
            gradient.mul_(bound / norm)


def require_finite(
    what: str, value: Tensor, batch: Batch, batches: Batches, at: Position, model: nn.Module | None = None
) -> None:
    """Raise NonFiniteError, with where it happened and which numbers are to blame, unless `value` is finite."""
    if math.isfinite(number := float(value.detach())):
        return
    where = [f"gradient of {name}" for name in _bad_gradients(model)]
    for name, tensor in batch.items():
        bad = ~tensor.isfinite().reshape(batch.size, -1).all(1)
        if bool(bad.any()):
            where.append(f"batch.{name} in rows {_some(bad.nonzero().squeeze(1).tolist())}")
    examples = [int(i) for i in batches.rows(at.epoch, at.batch)]
    raise NonFiniteError(
        f"the {what} is {number} at step {at.step}, epoch {at.epoch}, batch {at.batch} "
        f"(examples {_some(examples)}); not finite: {', '.join(where) or what}. "
        "The step was not taken; mend these rows, or lower lr, or set clip_norm",
        step=at.step,
        epoch=at.epoch,
        batch=at.batch,
        examples=examples,
        tensor=where[-1] if where else what,
    )


def _values(gradient: Tensor) -> Tensor:
    return gradient.values() if gradient.is_sparse else gradient


def _bad_gradients(model: nn.Module | None) -> list[str]:
    named = [] if model is None else list(model.named_parameters())
    return [n for n, p in named if p.grad is not None and not bool(_values(p.grad).isfinite().all())]


def _some(numbers: list[int], most: int = 8) -> str:
    return ", ".join(map(str, numbers[:most])) + (f", … {len(numbers)} in all" if len(numbers) > most else "")


@contextmanager
def catch_signals() -> Iterator[list[int]]:
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
