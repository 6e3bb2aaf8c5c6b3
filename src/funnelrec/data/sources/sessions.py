"""Click sessions of two shops, in the splits that the literature uses.

Origin: Yoochoose: RecSys Challenge 2015, the newest part as cut by session-rec (Ludewig, Mauro, Latifi, Jannach, 2020).
        Diginetica: CIKM Cup 2016, as prepared for SR-GNN (Wu et al., AAAI 2019).
Terms:  research use; no redistribution.
Files:  Yoochoose: yoochoose-clicks-100k_train_full.txt, ..._test.txt: SessionId, ItemId, Time (seconds), by tabs.
        Diginetica: train_sessions.txt: the items of a session in a line; test_prefix_target.txt: a prefix of a session,
        a tab, and the item after it, the longest prefix of a session first. Plain or .gz.

| table  | columns                                                                                     |
|--------|---------------------------------------------------------------------------------------------|
| events | session, item, time (seconds; Diginetica: the number of the event, since no time is known)   |

`part` is 0 (train) or 2 (test); the test sessions are those of the last days.
"""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl

from funnelrec.core.schema import Schema
from funnelrec.data.sources._files import read_first
from funnelrec.data.tables import Tables

__all__ = ["load"]


def load(path: Path | str, *, variant: str = "yoochoose") -> Tables:
    """Read the folder (or zip archive) `path`; `variant` is "yoochoose" or "diginetica".

    Raises ValueError for an unknown variant, a file that is not there and one of another form.
    """
    readers = {"yoochoose": _yoochoose, "diginetica": _diginetica}
    if variant not in readers:
        raise ValueError(f"variant must be one of {', '.join(readers)}, received {variant!r}")
    train, test = readers[variant](Path(path))
    part = np.repeat(np.array([0, 2], dtype=np.uint8), [train.height, test.height])
    sessions = 1 + (train["session"].max() or 0)  # type: ignore[operator]  # the column holds whole numbers
    events = pl.concat([train, test.with_columns(pl.col("session") + sessions)])
    schema = Schema(user="session", item="item", time="time")
    return Tables(events=events, schema=schema, part=part, name=f"sessions-{variant}")


def _yoochoose(home: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    frames = []
    for part in ("train_full", "test"):
        name, data = read_first(home, [f"yoochoose-clicks-100k_{part}.txt"])
        try:
            frame = pl.read_csv(io.BytesIO(data), separator="\t", columns=["SessionId", "ItemId", "Time"])
            frame = frame.cast({"SessionId": pl.Int64, "ItemId": pl.Int64, "Time": pl.Float64}, strict=True)
        except pl.exceptions.PolarsError as error:
            raise ValueError(
                f"{name} is not a table of SessionId, ItemId, Time: {str(error).splitlines()[0]}"
            ) from None
        frame = frame.sort("SessionId", "Time", maintain_order=True)
        frames.append(frame.select(session="SessionId", item="ItemId", time=pl.col("Time").cast(pl.Int64)))
    return frames[0], frames[1]


def _diginetica(home: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    train_name, train = read_first(home, ["train_sessions.txt"])
    test_name, test = read_first(home, ["test_prefix_target.txt"])
    prefixes = _numbers(test_name, test)
    # the next line is a shorter prefix of the same session, or the whole of the next session
    whole = prefixes[:1] + [line for before, line in pairwise(prefixes) if line != before[:-1]]
    sessions = _numbers(train_name, train)
    return _frame(sessions, 0), _frame(whole, sum(map(len, sessions)))


def _numbers(name: str, data: bytes) -> list[list[int]]:
    try:
        return [[int(word) for word in line.split()] for line in data.splitlines()]
    except ValueError as error:
        raise ValueError(f"{name} must hold item numbers alone: {error}") from None


def _frame(sessions: list[list[int]], first: int) -> pl.DataFrame:
    session = np.repeat(np.arange(len(sessions)), [len(s) for s in sessions])
    item = np.fromiter((i for s in sessions for i in s), dtype=np.int64, count=len(session))
    return pl.DataFrame({"session": session, "item": item, "time": first + np.arange(len(session))})
