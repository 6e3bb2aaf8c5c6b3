"""Vocabulary: values to rows and back. Row 0 is padding ("nothing here"), row 1 is unknown ("never seen in training").

A vocabulary keeps the type of its values, int64 or text, and never passes them through float: 2^63-1 and "007" stay
what they are. The two types still meet: a text "42" finds the integer 42 in an integer vocabulary (ids arrive as text
over HTTP), while "042" does not, because 42 is not written so.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from funnelrec.core.shapes import FIRST_KNOWN, PADDING, UNKNOWN

__all__ = ["HashVocabulary", "Vocabulary", "canonical_ids", "vocabulary_from_arrow"]

CANONICAL_INTEGER = r"^(?:0|-?[1-9][0-9]{0,18})$"  # how Python and JSON write an integer: no +, no leading zero
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,18}")
LARGEST_EXACT_FLOAT = 2.0**53
METADATA = b"funnelrec"


def canonical_ids(values: pl.Series) -> pl.Series:
    """Ids as int64 where the column holds integers, else as text; null where the value is missing or empty.

    Integers beyond int64 become text. Floats are accepted only when every value is a whole number below 2^53 (what a
    data frame makes of integers with gaps). Raises ValueError for other floats and for types that are no ids.
    """
    dtype = values.dtype
    if dtype == pl.Boolean or (dtype.is_integer() and dtype != pl.UInt64):
        if dtype in (pl.Int128, pl.UInt128):
            return _narrow(values)
        return values.cast(pl.Int64)
    if dtype == pl.UInt64:
        return _narrow(values)
    if dtype in (pl.String, pl.Categorical, pl.Enum):
        text = values.cast(pl.String)
        return text.set(text == "", None)
    if dtype == pl.Null:
        return values.cast(pl.String)
    if dtype.is_float():
        exact = values.fill_nan(None)
        if (exact.is_null() | ((exact == exact.round()) & (exact.abs() < LARGEST_EXACT_FLOAT))).all():
            return exact.cast(pl.Int64)
        raise ValueError(
            f"column '{values.name}' holds fractions or integers beyond 2^53 as floats, which are no ids; "
            "cast it to integers or text, or declare it as Number"
        )
    raise ValueError(f"column '{values.name}' of type {dtype} holds no ids; cast it to integers or text")


def _narrow(values: pl.Series) -> pl.Series:
    narrow = values.cast(pl.Int64, strict=False)
    return narrow if narrow.null_count() == values.null_count() else values.cast(pl.String)


def _as_integers(text: pl.Series) -> pl.Series:
    """int64 of those texts that are canonical integers, null for the rest."""
    return text.set(~text.str.contains(CANONICAL_INTEGER), None).cast(pl.Int64, strict=False)


def _flat(values: pl.Series) -> pl.Series:
    return values.explode() if isinstance(values.dtype, pl.List | pl.Array) else values


class Vocabulary:
    """Known values, one row each from row 2 on, the most frequent first, ties by value.

    `values`: int64 or text, without nulls, `values[i]` is row i + 2; `counts` [len(values)]: how often each was seen
    while fitting (0 for values that were only in `also`).
    """

    def __init__(self, values: pl.Series, counts: npt.NDArray[np.int64]) -> None:
        if values.dtype not in (pl.Int64, pl.String):
            raise ValueError(f"a vocabulary holds int64 or text, received {values.dtype}")
        if values.len() != len(counts):
            raise ValueError(f"a vocabulary needs one count a value, received {len(counts)} for {values.len()} values")
        if values.null_count() or values.n_unique() != values.len():
            raise ValueError("the values of a vocabulary must be distinct and not null")
        self.values = values.alias("value")
        self.counts = counts

    @classmethod
    def fit(cls, values: pl.Series, *, min_count: int = 1, also: pl.Series | None = None) -> Vocabulary:
        """The distinct values that occur at least `min_count` times; those of `also` are known in any case.

        `values` may be a list column: its elements are counted. Null and empty text are never values.
        Where `values` and `also` differ in type (integers and text), both become text.
        """
        known = canonical_ids(_flat(values)).alias("value")
        extra = canonical_ids(_flat(also)).alias("value") if also is not None else None
        if extra is not None and extra.dtype != known.dtype:
            if extra.null_count() == extra.len():
                extra = None
            elif known.null_count() == known.len():
                known = known.cast(extra.dtype)
            else:
                known, extra = known.cast(pl.String), extra.cast(pl.String)
        table = known.drop_nulls().to_frame().group_by("value").agg(pl.len().cast(pl.Int64).alias("count"))
        table = table.filter(pl.col("count") >= min_count)
        if extra is not None:
            new = extra.drop_nulls().unique().to_frame().join(table, on="value", how="anti")
            table = pl.concat([table, new.with_columns(pl.lit(0, pl.Int64).alias("count"))])
        table = table.sort(["count", "value"], descending=[True, False])
        return cls(table["value"], table["count"].to_numpy())

    @property
    def size(self) -> int:
        """Rows, padding and unknown included."""
        return self.values.len() + FIRST_KNOWN

    @property
    def dtype(self) -> Literal["int64", "string"]:
        """What the values are."""
        return "int64" if self.values.dtype == pl.Int64 else "string"

    def __len__(self) -> int:
        return self.size

    def __repr__(self) -> str:
        return f"Vocabulary({self.values.len()} values of {self.values.dtype})"

    def encode(self, values: pl.Series) -> npt.NDArray[np.int32]:
        """Rows int32 [n]: 0 for null and empty text, 1 for a value that is not known."""
        ids = canonical_ids(values).alias("value")
        missing = ids.is_null()
        if ids.dtype != self.values.dtype:
            ids = _as_integers(ids) if self.values.dtype == pl.Int64 else ids.cast(pl.String)
        rows = pl.int_range(FIRST_KNOWN, self.size, dtype=pl.Int32, eager=True).alias("row")
        found = (
            ids.to_frame()
            .join(pl.DataFrame([self.values, rows]), on="value", how="left", maintain_order="left", nulls_equal=False)[
                "row"
            ]
            .fill_null(UNKNOWN)
        )
        return found.set(missing, PADDING).to_numpy().astype(np.int32, copy=False)

    def rows_of(self, texts: Sequence[str]) -> list[int]:
        """As `encode` of these texts, for the few of a request: searched one by one, in microseconds each.

        Empty texts are 1 like all that is not known.
        """
        if isinstance(self._lookup, dict):
            return [self._lookup.get(text, UNKNOWN) for text in texts]
        values, rows = self._lookup
        numbers = [int(t) if _INTEGER.fullmatch(t) else None for t in texts]
        wanted = np.array([n if n is not None and -(2**63) <= n < 2**63 else 0 for n in numbers], dtype=np.int64)
        place = np.searchsorted(values, wanted).clip(max=max(len(values) - 1, 0))
        if not len(values):
            return [UNKNOWN] * len(texts)
        found = (values[place] == wanted) & np.array([n is not None and -(2**63) <= n < 2**63 for n in numbers], bool)
        return [int(r) for r in np.where(found, rows[place], UNKNOWN)]

    @cached_property
    def _lookup(self) -> dict[str, int] | tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Row of each text; integers, sorted, and the row of each: a dictionary of them would be ten times as large."""
        if self.values.dtype == pl.String:
            return dict(zip(self.values.to_list(), range(FIRST_KNOWN, self.size), strict=True)) | {"": UNKNOWN}
        values = self.values.to_numpy()
        order = np.argsort(values, kind="stable")
        return values[order], order + FIRST_KNOWN

    def encode_lists(self, values: pl.Series, width: int) -> npt.NDArray[np.int32]:
        """Rows int32 [n, width] of a list column: the first `width` real values of each list, left-aligned, 0 padded.

        Null and empty elements are dropped before counting; a column without lists counts as lists of one value.
        """
        return _encode_lists(self.encode, values, width)

    def decode(self, rows: npt.NDArray[np.integer[Any]]) -> pl.Series:
        """The values of `rows` [n]; null for rows 0 and 1. Raises ValueError for a row that does not exist."""
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= self.size):
            raise ValueError(f"rows must be in 0..{self.size - 1}, received {rows.min()}..{rows.max()}")
        index = pl.Series(rows - FIRST_KNOWN)
        return self.values.gather(index.set(index < 0, None)).alias("value")

    def to_arrow(self) -> pa.Table:
        """Columns `value` and `count`; `from_arrow` is the inverse."""
        kind = pa.int64() if self.dtype == "int64" else pa.large_string()
        columns = [self.values.to_arrow().cast(kind), pa.array(self.counts, pa.int64())]
        schema = pa.schema([("value", kind), ("count", pa.int64())], metadata={METADATA: b'{"kind": "vocabulary"}'})
        return pa.Table.from_arrays(columns, schema=schema)

    @classmethod
    def from_arrow(cls, table: pa.Table) -> Vocabulary:
        """Read what `to_arrow` made. Raises ValueError when the columns are others."""
        if set(table.column_names) != {"value", "count"}:
            raise ValueError(f"a vocabulary has the columns value and count, received {', '.join(table.column_names)}")
        frame = pl.DataFrame(table.replace_schema_metadata(None))
        return cls(frame["value"].rechunk(), frame["count"].to_numpy())


@dataclass(frozen=True, slots=True)
class HashVocabulary:
    """No vocabulary: every value is hashed into one of `buckets` rows, for unbounded ids. Nothing is ever unknown.

    The hash is fixed for all time and machines: integers (and texts that are canonical integers) by the finaliser of
    SplitMix64 (Steele, Lea, Flood 2014), other texts by the first 8 bytes of BLAKE2b.
    """

    buckets: int

    def __post_init__(self) -> None:
        if self.buckets < 1:
            raise ValueError(f"a hash vocabulary needs at least 1 bucket, received {self.buckets}")

    @property
    def size(self) -> int:
        """Rows, padding and unknown included."""
        return self.buckets + FIRST_KNOWN

    def __len__(self) -> int:
        return self.size

    def encode(self, values: pl.Series) -> npt.NDArray[np.int32]:
        """Rows int32 [n]: 0 for null and empty text, else 2 + hash mod buckets."""
        ids = canonical_ids(values)
        missing = ids.is_null().to_numpy()
        integers = _as_integers(ids) if ids.dtype == pl.String else ids
        hashed = _splitmix(integers.fill_null(0).to_numpy())
        words = ids.filter(integers.is_null()).drop_nulls() if ids.dtype == pl.String else None
        if words is not None and words.len():
            distinct = words.unique()
            digests = [hashlib.blake2b(w.encode(), digest_size=8).digest() for w in distinct.to_list()]
            table = pl.DataFrame({"word": distinct, "hash": np.frombuffer(b"".join(digests), dtype="<u8")})
            found = words.alias("word").to_frame().join(table, on="word", how="left", maintain_order="left")["hash"]
            hashed[integers.is_null().to_numpy() & ~missing] = found.to_numpy()
        rows = (hashed % np.uint64(self.buckets)).astype(np.int32) + FIRST_KNOWN
        rows[missing] = PADDING
        return rows.astype(np.int32, copy=False)

    def encode_lists(self, values: pl.Series, width: int) -> npt.NDArray[np.int32]:
        """As `Vocabulary.encode_lists`."""
        return _encode_lists(self.encode, values, width)

    def to_arrow(self) -> pa.Table:
        """An empty table whose metadata holds `buckets`; `from_arrow` is the inverse."""
        metadata = {METADATA: json.dumps({"kind": "hash", "buckets": self.buckets}).encode()}
        return pa.Table.from_arrays([], schema=pa.schema([], metadata=metadata))

    @classmethod
    def from_arrow(cls, table: pa.Table) -> HashVocabulary:
        """Read what `to_arrow` made. Raises ValueError when the table holds something else."""
        data = _metadata(table)
        if data.get("kind") != "hash" or not isinstance(data.get("buckets"), int):
            raise ValueError(f"this table holds no hash vocabulary, its metadata says {data}")
        return cls(data["buckets"])


def vocabulary_from_arrow(table: pa.Table) -> Vocabulary | HashVocabulary:
    """Read what either `to_arrow` made."""
    return HashVocabulary.from_arrow(table) if _metadata(table).get("kind") == "hash" else Vocabulary.from_arrow(table)


def _metadata(table: pa.Table) -> dict[str, Any]:
    data = json.loads((table.schema.metadata or {}).get(METADATA, b"{}"))
    return data if isinstance(data, dict) else {}


def _splitmix(values: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64: every input bit reaches every output bit."""
    x = values.astype(np.int64).view(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _encode_lists(encode: Any, values: pl.Series, width: int) -> npt.NDArray[np.int32]:
    rows = np.zeros((values.len(), width), dtype=np.int32)
    if not isinstance(values.dtype, pl.List | pl.Array):
        values = values.reshape((-1, 1)) if values.len() else values.cast(pl.List(values.dtype))
    flat = pl.DataFrame({"value": values}).with_row_index("owner").explode("value")
    code = encode(flat["value"])
    owner = flat["owner"].to_numpy()[code != PADDING].astype(np.int64)
    code = code[code != PADDING]
    first = np.searchsorted(owner, owner, side="left")
    slot = np.arange(len(owner)) - first
    keep = slot < width
    rows[owner[keep], slot[keep]] = code[keep]  # (n, width)
    return rows
