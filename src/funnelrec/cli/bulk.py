"""`funnelrec recommend --all-users`: everybody's recommendations into one Parquet file."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

from rich.progress import Progress

from funnelrec.cli import show
from funnelrec.core.shapes import FIRST_KNOWN
from funnelrec.serve.bulk import write_all
from funnelrec.serve.funnel import Funnel

__all__ = ["recommend_everybody"]


def recommend_everybody(folder: Path, out: Path, *, progress: bool, **options: Any) -> None:
    """Write the file and say how long it took. `options` are those of `serve.bulk.recommend_all`."""
    funnel = Funnel.load(folder)
    users = funnel.store.people.size - FIRST_KNOWN
    started = perf_counter()
    with Progress(console=show.console, transient=True, disable=not progress) as bar:
        task = bar.add_task("users", total=users)
        rows = write_all(funnel, out, progress=lambda count: bar.advance(task, count), **options)
    seconds = perf_counter() - started
    show.line(f"{out}: {rows:,} rows for {users:,} users in {seconds:.1f} s, {users / seconds:,.0f} users/s")
