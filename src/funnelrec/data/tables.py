"""Tables: what a source gives to the Dataset. Accounting: what became of every row that was read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from funnelrec.core.schema import Schema

__all__ = ["Accounting", "Reject", "Tables"]


@dataclass(frozen=True, slots=True)
class Reject:
    """One row that was not kept. `line` counts from 1 and includes the header; `column` is None when the whole row
    is at fault (too few columns, bytes that are not UTF-8). For frames and Parquet, `line` is the row, from 1."""

    file: str
    line: int
    column: str | None
    reason: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}"
        return f"{where}: {self.reason}" if self.column is None else f"{where}: column '{self.column}': {self.reason}"


@dataclass(frozen=True, slots=True)
class Accounting:
    """Rows read from one file. Always read == kept + len(rejects); a row is rejected once, for its first fault."""

    file: str
    read: int
    kept: int
    rejects: tuple[Reject, ...] = ()

    def __post_init__(self) -> None:
        if self.read != self.kept + len(self.rejects):
            raise ValueError(
                f"{self.file}: {self.read} rows read, but {self.kept} kept and {len(self.rejects)} rejected; "
                "every row read must be kept or rejected"
            )

    def __str__(self) -> str:
        return f"{self.file}: {self.read:,} rows read, {self.kept:,} kept, {len(self.rejects):,} rejected"


@dataclass(frozen=True, slots=True)
class Tables:
    """The tables of one data set and what their columns mean.

    `events` holds one event a row (or plain rows, see `Schema.is_rows`); `users` and `items`, where given, hold one
    user or item a row, keyed by the columns `schema.user` and `schema.item`. `part` is a published split: 0 train,
    1 valid, 2 test for each row of `events`. Raises ValueError when a column of the schema is in no table.
    """

    events: pl.DataFrame
    schema: Schema
    users: pl.DataFrame | None = None
    items: pl.DataFrame | None = None
    part: npt.NDArray[np.uint8] | None = None
    accounting: tuple[Accounting, ...] = ()
    name: str = "csv"

    def __post_init__(self) -> None:
        s = self.schema
        keys = [c for c in (s.user, s.item, s.time, s.label, s.weight) if c is not None]
        _require("events", self.events, [*keys, *(f.name for f in s.context)])
        for side, table, key, fields in (
            ("users", self.users, s.user, s.users),
            ("items", self.items, s.item, s.items),
        ):
            if table is None and fields:
                raise ValueError(
                    f"the schema names the field '{fields[0].name}' of {side}, but there is no {side} table"
                )
            if table is not None:
                if key is None:
                    raise ValueError(f"a table of {side} needs a schema with 'user' and 'item'")
                _require(side, table, [key, *(f.name for f in fields)])
        if self.part is not None and len(self.part) != self.events.height:
            raise ValueError(
                f"'part' needs one value an event, received {len(self.part)} for {self.events.height} events"
            )


def _require(side: str, table: pl.DataFrame, columns: list[str]) -> None:
    missing = [c for c in columns if c not in table.columns]
    if missing:
        raise ValueError(
            f"the {side} table has no column '{missing[0]}' that the schema names; it has {', '.join(table.columns)}"
        )
