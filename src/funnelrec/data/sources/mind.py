"""MIND: which news people were shown, and which of them they read.

Origin: Wu et al. "MIND: A Large-scale Dataset for News Recommendation", ACL 2020. Microsoft News, November 2019.
Terms:  Microsoft Research licence, non-commercial; no redistribution.
Files:  behaviors.tsv: impression, user, time ("11/13/2019 5:53:12 AM"), history, shown ("N43266-0 N6975-1 …");
        news.tsv: news, category, subcategory, title, abstract and more; news, category and title alone serve too.

| table  | columns                                                                                  |
|--------|------------------------------------------------------------------------------------------|
| events | user, item, time (seconds), click 0 or 1; one row a piece of news that was shown         |
| items  | item, category, subcategory where it is told, title, abstract where it is told           |

What a user had read before the log began ("history") is put a second apart before the user's first impression, and
belongs to no part: models read it, none learns from it and none is measured on it. The others are split by time, the
last tenth is the test part and the tenth before it the validation part.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from funnelrec.core.schema import Category, Schema, Text
from funnelrec.data.ingest import read_delimited
from funnelrec.data.sources._files import read_first
from funnelrec.data.split import HISTORY, GlobalTime
from funnelrec.data.tables import Accounting, Tables

__all__ = ["load"]

BEHAVIOURS = ["impression", "user", "time", "history", "shown"]
NEWS = ["item", "category", "subcategory", "title", "abstract", "url", "title_entities", "abstract_entities"]
SHORT_NEWS = ["item", "category", "title"]
KEPT = ("item", "category", "subcategory", "title", "abstract")
CLOCK = "%m/%d/%Y %I:%M:%S %p"


def load(
    path: Path | str,
    *,
    behaviours: Sequence[str] = ("behaviors.tsv",),
    news: Sequence[str] = ("news.tsv",),
    valid: float = 0.1,
    test: float = 0.1,
    max_bad_rows: int = 0,
) -> Tables:
    """Read a folder or zip archive; `behaviours` and `news` are names to look for, plain or .gz.

    Raises ValueError for a file that is not there, for a time or an impression that cannot be read.
    """
    home = Path(path)
    name, data = read_first(home, list(behaviours))
    log, log_read = read_delimited(
        data, file=name, separator="\t", names=BEHAVIOURS, quoted=False,
        columns=dict.fromkeys(BEHAVIOURS, "text"), max_bad_rows=max_bad_rows,
    )  # fmt: skip
    items, items_read = _news(home, news, max_bad_rows)
    log = log.with_columns(_times(log["time"], name), pl.int_range(pl.len()).alias("line"))
    shown = _shown(log, name)
    before = _history(log)
    part = GlobalTime(valid, test).assign(np.zeros(len(shown), np.int64), shown["time"].to_numpy())
    events = pl.concat([before, shown])
    items = items.filter(pl.col("item").is_in(events["item"].unique().to_list()))
    fields = tuple(
        Text(c) if c in ("title", "abstract") else Category(c) for c in KEPT if c != "item" and c in items.columns
    )
    return Tables(
        events=events,
        schema=Schema(user="user", item="item", time="time", label="click", items=fields),
        items=items,
        part=np.concatenate([np.full(len(before), HISTORY, np.uint8), part]),
        accounting=(log_read, items_read),
        name="mind",
    )


def _news(home: Path, names: Sequence[str], max_bad_rows: int) -> tuple[pl.DataFrame, Accounting]:
    name, data = read_first(home, list(names))
    width = data.partition(b"\n")[0].count(b"\t") + 1
    columns = NEWS if width == len(NEWS) else SHORT_NEWS
    kinds = dict.fromkeys(columns, "text") | {"item": "key"}
    table, read = read_delimited(
        data, file=name, separator="\t", names=columns, quoted=False, columns=kinds, max_bad_rows=max_bad_rows
    )
    return table.select([c for c in KEPT if c in table.columns]), read


def _times(column: pl.Series, file: str) -> pl.Series:
    """Seconds since 1970."""
    times = column.str.to_datetime(CLOCK, strict=False).dt.epoch("s")
    if times.null_count():
        line = int(times.is_null().arg_max() or 0)
        raise ValueError(f"{file}, line {line + 1}: a time is written 11/13/2019 5:53:12 AM, received {column[line]!r}")
    return times.alias("time")


def _shown(log: pl.DataFrame, file: str) -> pl.DataFrame:
    """A row for each piece of news of each impression."""
    rows = log.select("user", "time", "line", pl.col("shown").str.split(" ").alias("pair")).explode("pair")
    rows = rows.filter(pl.col("pair").is_not_null() & (pl.col("pair") != ""))
    parts = rows.with_columns(pl.col("pair").str.extract_groups(r"^(\S+)-([01])$").alias("parts")).unnest("parts")
    bad = parts.filter(pl.col("2").is_null())
    if len(bad):
        line, pair = bad["line"][0] + 1, bad["pair"][0]
        raise ValueError(f"{file}, line {line}: what was shown is written N43266-0 N6975-1, received {pair!r}")
    return parts.select("user", pl.col("1").alias("item"), "time", pl.col("2").cast(pl.Int64).alias("click"))


def _history(log: pl.DataFrame) -> pl.DataFrame:
    """The longest history that the log tells of each user, a second apart, the last one before the first impression."""
    first = log.group_by("user").agg(pl.col("time").min())
    longest = (
        log.with_columns(pl.col("history").fill_null("").str.split(" ").alias("item"))
        .with_columns(pl.col("item").list.eval(pl.element().filter(pl.element() != "")))
        .sort(pl.col("item").list.len(), descending=True, maintain_order=True)
        .unique("user", keep="first", maintain_order=True)
        .select("user", "item")
    )
    rows = longest.join(first, on="user").with_columns(pl.col("item").list.len().alias("count")).explode("item")
    rows = rows.filter(pl.col("item").is_not_null())
    time = pl.col("time") - pl.col("count").cast(pl.Int64) + pl.int_range(pl.len()).over("user")
    return rows.select("user", "item", time.cast(pl.Int64), pl.lit(1, pl.Int64).alias("click"))
