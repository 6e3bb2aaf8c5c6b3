"""Bulk: recommendations for everybody, streamed into one Parquet file, in memory that their number does not change."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from funnelrec.core.shapes import FIRST_KNOWN
from funnelrec.serve.funnel import Funnel
from funnelrec.serve.request import Request

__all__ = ["recommend_all", "write_all"]

USERS_AT_ONCE = 512


def recommend_all(
    funnel: Funnel,
    users: Sequence[Any] | None = None,
    *,
    k: int = 10,
    filters: Mapping[str, Any] | None = None,
    diversity: int | float | None = None,
    exclude_seen: bool = True,
) -> Iterator[pa.Table]:
    """Tables with a row for each recommended item: `user`, `place` (from 1), `item`, `score`, `fallback`.

    `users` are everybody the funnel has seen when None. The items and scores are those of `Funnel.recommend`; a user
    has fewer than k rows where fewer items qualify. Raises RequestError.
    """
    store = funnel.store
    everybody = store.people.decode(np.arange(FIRST_KNOWN, store.people.size)).to_list() if users is None else users
    catalogue = store.catalogue[str(store.schema.item)]
    for start in range(0, len(everybody), USERS_AT_ONCE):
        chosen = list(everybody[start : start + USERS_AT_ONCE])
        requests = [
            Request(user=user, k=k, filters=filters, diversity=diversity, exclude_seen=exclude_seen) for user in chosen
        ]
        ranked, fallbacks = funnel.ranked(requests)
        rows = ranked.rows.numpy()
        owner, place = (rows > 0).nonzero()
        yield pa.table(
            {
                "user": pa.array(chosen).take(pa.array(owner)),
                "place": pa.array(place + 1, pa.int32()),
                "item": catalogue[rows[owner, place]].to_arrow(),
                "score": pa.array(ranked.scores.numpy()[owner, place], pa.float32()),
                "fallback": pa.array(fallbacks, pa.string()).take(pa.array(owner)),
            }
        )


def write_all(
    funnel: Funnel,
    file: Path,
    users: Sequence[Any] | None = None,
    *,
    progress: Callable[[int], None] = lambda users: None,
    **options: Any,
) -> int:
    """`recommend_all` into `file`, which appears only when it is whole. Returns the number of rows.

    `progress` hears of each part's number of users; the other options are those of `recommend_all`.
    """
    part = file.with_name(f"{file.name}.part")
    written = 0
    writer: parquet.ParquetWriter | None = None
    try:
        for table in recommend_all(funnel, users, **options):
            writer = writer or parquet.ParquetWriter(part, table.schema, compression="zstd")
            writer.write_table(table)
            written += len(table)
            progress(USERS_AT_ONCE)
        if writer is None:
            raise ValueError("there is nobody to recommend to; this funnel knows no users, and none were named")
        writer.close()
        os.replace(part, file)
    finally:
        if writer is not None:
            writer.close()
        part.unlink(missing_ok=True)
    return written
