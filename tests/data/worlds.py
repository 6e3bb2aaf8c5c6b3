"""Small random tables for the tests of this folder."""

from __future__ import annotations

import numpy as np
import polars as pl

from funnelrec.core.schema import Category, Number, Schema, Text
from funnelrec.data.tables import Tables

SCHEMA = Schema(
    user="who",
    item="what",
    time="when",
    label="stars",
    weight="seconds",
    positive=3.0,
    click=4.0,
    context=(Category("device"), Number("hour", "standard")),
    users=(Category("city"), Number("age", "log")),
    items=(Category("tags", many=True, max_values=3), Text("title"), Number("price")),
)


def events(n: int, seed: int = 0, *, users: int = 12, items: int = 15, ties: bool = True) -> pl.DataFrame:
    """n random events in the order of time; with `ties`, several share a second."""
    rng = np.random.default_rng(seed)
    when = np.sort(rng.integers(0, n // 2, n)) if ties else np.arange(n)
    return pl.DataFrame(
        {
            "who": [f"u{u}" for u in rng.integers(0, users, n)],
            "what": rng.integers(100, 100 + items, n),
            "when": when + 1_000_000,
            "stars": rng.integers(1, 6, n),
            "seconds": rng.random(n),
            "device": [["phone", "desk", "tv", None][d] for d in rng.integers(0, 4, n)],
            "hour": rng.random(n) * 24,
        }
    )


def users_table(users: int = 12) -> pl.DataFrame:
    """One row for each user but u1, of whom nothing is known."""
    known = [u for u in range(users) if u != 1]
    return pl.DataFrame(
        {"who": [f"u{u}" for u in known], "city": [f"c{u % 3}" for u in known], "age": [20.0 + u for u in known]}
    )


def items_table(items: int = 15) -> pl.DataFrame:
    """One row for each item but 101, and one item (999) that nobody took."""
    known = [100 + i for i in range(items) if i != 1] + [999]
    return pl.DataFrame(
        {
            "what": known,
            "tags": [[f"t{i % 4}", f"t{i % 5}"][: 1 + i % 2] for i in known],
            "title": [f"Item {i}" for i in known],
            "price": [None if i == 102 else float(i) for i in known],
        }
    )


def tables(n: int = 300, seed: int = 0, *, items: int = 15, ties: bool = True) -> Tables:
    """Events, users and items."""
    return Tables(events(n, seed, items=items, ties=ties), SCHEMA, users=users_table(), items=items_table(items))


def rows_tables(n: int = 50, seed: int = 0) -> Tables:
    """A plain rows table, as a CTR log, with a published part."""
    rng = np.random.default_rng(seed)
    frame = pl.DataFrame(
        {
            "click": rng.integers(0, 2, n),
            "a": rng.integers(0, 5, n),
            "b": [f"b{v}" for v in rng.integers(0, 9, n)],
            "x": rng.random(n),
        }
    )
    schema = Schema(label="click", context=(Category("a"), Category("b", hash_buckets=7), Number("x", "powers")))
    part = np.repeat(np.array([0, 1, 2], np.uint8), [n - 20, 10, 10])
    return Tables(frame, schema, part=part)
