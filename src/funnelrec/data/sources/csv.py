"""Your own tables: events, and optionally users and items, as CSV, Parquet, Arrow or data frames.

Origin: yours. Terms: yours. Checksum: none; every row is accounted for (data/ingest.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl

from funnelrec.core.schema import Category, Field, Image, Number, Schema, Text, Vector
from funnelrec.data.ingest import read_table
from funnelrec.data.tables import Tables

__all__ = ["load"]


def load(
    events: Any,
    users: Any = None,
    items: Any = None,
    *,
    schema: Schema | Path | str | None = None,
    max_bad_rows: int = 0,
) -> Tables:
    """Read the tables; each is a path or a data frame (see `read_table`). `max_bad_rows` counts for each table.

    `schema`: a Schema, the path of its JSON, or None: guessed by `Schema.infer` (`tables.schema.describe()` shows it).
    In text files a field with many=True is written "Action|Comedy". In users and items the key column has the name
    that it has in events, and a key that comes twice is a bad row. Raises ValueError and BadRowsError.
    """
    if schema is None:
        schema = _infer(events, users, items, max_bad_rows)
    elif not isinstance(schema, Schema):
        schema = _read_schema(Path(schema))
    kinds: dict[str, str] = _kinds_of(schema.context)
    if schema.user is not None and schema.item is not None:
        kinds |= {schema.user: "id", schema.item: "id"}
    if schema.time is not None:
        kinds[schema.time] = "time"
    kinds |= {c: "label" for c in (schema.label, schema.weight) if c is not None}
    frame, account = read_table(events, columns=kinds, max_bad_rows=max_bad_rows)
    frame, accounts = _lists(frame, schema.context), [account]
    sides: dict[str, pl.DataFrame] = {}
    for side, source, key, fields in (
        ("users", users, schema.user, schema.users),
        ("items", items, schema.item, schema.items),
    ):
        if source is None:
            continue
        if key is None:
            raise ValueError(f"a table of {side} needs a schema that names 'user' and 'item' of the events")
        table, account = read_table(source, columns={**_kinds_of(fields), key: "key"}, max_bad_rows=max_bad_rows)
        frame, sides[side] = _same_ids(frame, _lists(table, fields), key)
        accounts.append(account)
    return Tables(
        events=frame, schema=schema, users=sides.get("users"), items=sides.get("items"), accounting=tuple(accounts)
    )


def _infer(events: Any, users: Any, items: Any, max_bad_rows: int) -> Schema:
    sides = [t if t is None else read_table(t, max_bad_rows=max_bad_rows)[0] for t in (users, items)]
    return Schema.infer(read_table(events, max_bad_rows=max_bad_rows)[0], *sides)


def _read_schema(path: Path) -> Schema:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no schema file {path}; check the path") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold one JSON object, received a {type(data).__name__}")
    return Schema.from_dict(data)


def _kinds_of(fields: tuple[Field, ...]) -> dict[str, str]:
    kinds: dict[str, str] = {}
    for field in fields:
        if isinstance(field, Category) and not field.many:
            kinds[field.name] = "category"
        elif isinstance(field, Number):
            kinds[field.name] = "number"
        elif isinstance(field, Text):
            kinds[field.name] = "text"
        else:
            kinds[field.name] = "any"
    return kinds


def _lists(frame: pl.DataFrame, fields: tuple[Field, ...]) -> pl.DataFrame:
    """Columns of many-valued fields as lists; a vector column must come as lists already."""
    for field in fields:
        is_list = isinstance(frame[field.name].dtype, pl.List | pl.Array)
        if isinstance(field, Category) and field.many and not is_list:
            frame = frame.with_columns(pl.col(field.name).cast(pl.String).str.split("|"))
        if isinstance(field, Vector) and not is_list:
            raise ValueError(f"the vectors of column '{field.name}' must be lists of numbers; write them as Parquet")
        if isinstance(field, Image) and frame[field.name].dtype not in (pl.String, pl.Binary):
            raise ValueError(f"the pictures of column '{field.name}' must be paths or bytes")
    return frame


def _same_ids(events: pl.DataFrame, table: pl.DataFrame, key: str) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Ids of one type in both tables: if either holds text, 7 is written "7" in the other."""
    if events[key].dtype == table[key].dtype:
        return events, table
    text = pl.col(key).cast(pl.String)
    return events.with_columns(text), table.with_columns(text)
