"""The progress bar of a run: rows a second, loss, best metric, time left."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from funnelrec.learn.checkpoint import Position

__all__ = ["progress_bar"]


@contextmanager
def progress_bar(wanted: bool, total: int, done: int) -> Iterator[Callable[[Position, int], None]]:
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

        def advance(at: Position, rows: int) -> None:
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
