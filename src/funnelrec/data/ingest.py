"""Ingest: one file or frame to one typed table, and an account of every row.

A CSV is read by polars as text. When polars fails, or could have hidden a fault (it fills short rows with nulls and
says nothing), data/scan.py walks the file and names line, column and reason of each bad record; the good records are
then read by polars as before. Declared columns are converted afterwards, row by row accounted for. Ids never pass
through float, so "007", "7" and 2^63-1 all stay what they are.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from funnelrec.data.scan import Scan, header_of, is_regular, scan
from funnelrec.data.tables import Accounting, Reject
from funnelrec.data.vocabulary import CANONICAL_INTEGER, canonical_ids

__all__ = ["Accounting", "BadRowsError", "Reject", "read_delimited", "read_table"]

KINDS = ("id", "key", "time", "label", "number", "category", "text", "any")

TEXT_FILES = (".csv", ".tsv", ".tab", ".txt", ".dat", ".data")
ARROW_FILES = (".arrow", ".feather", ".ipc")
PARQUET_FILES = (".parquet", ".pq")
COMPRESSED = (".gz", ".zst")

# A number as programs write it. "007" is no such number: it is a code, and stays text where the type is guessed.
WRITTEN_NUMBER = r"^-?(?:0|[1-9][0-9]*)?(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?$"
LARGEST_GUESSED_DIGITS = r"^-?[0-9]{16,}$"  # whole numbers that a float may not hold exactly
ISO_TIME = (
    r"^(?P<date>\d{4}-\d{2}-\d{2})(?:[T ](?P<clock>\d{2}:\d{2})(?P<second>:\d{2})?(?:[.,]\d+)?)?"
    r"\s?(?P<zone>Z|z|UTC|[+-]\d{2}:?\d{2})?$"
)
# |t| below the bound is read in the unit: seconds reach the year 5138, milliseconds begin in March 1973.
UNITS: tuple[tuple[str, float, int], ...] = (
    ("seconds", 1e11, 1),
    ("milliseconds", 1e14, 1_000),
    ("microseconds", 1e17, 1_000_000),
    ("nanoseconds", float("inf"), 1_000_000_000),
)
MISSING = "the value is missing"


class BadRowsError(ValueError):
    """More bad rows than `max_bad_rows`. `rejects` holds all of them."""

    def __init__(self, rejects: Sequence[Reject], read: int, max_bad_rows: int) -> None:
        self.rejects = tuple(rejects)
        n = len(self.rejects)
        super().__init__(
            f"{self.rejects[0]} ({n:,} of {read:,} rows bad, {max_bad_rows:,} allowed; "
            f"mend the data, or leave bad rows out with max_bad_rows={n})"
        )


_Faults = list[tuple[pl.Series, str]]  # rows (bool [n]) of a column that cannot be kept, and why; {} is the value


def read_table(
    source: Any,
    *,
    columns: Mapping[str, str] | None = None,
    max_bad_rows: int = 0,
) -> tuple[pl.DataFrame, Accounting]:
    """Read a path (CSV, TSV, also .gz or .zst; Parquet; Arrow/Feather), or a polars, pandas or Arrow table.

    `columns` declares what columns hold; the others are "any". A row with a fault in a declared column is rejected:

    | kind     | result                    | a fault is                                                           |
    |----------|---------------------------|----------------------------------------------------------------------|
    | id       | int64, or text unless every value is an integer as programs write it | a missing value           |
    | key      | as id                     | a missing value, or one that an earlier row had                      |
    | time     | int64, seconds since 1970 | a missing value, neither a number nor an ISO 8601 date               |
    | label    | float64                   | a missing value, no number, NaN, an infinity                         |
    | number   | float64; NaN becomes null | no number, an infinity                                               |
    | category | as id, missing is null    | -                                                                    |
    | text     | text                      | -                                                                    |
    | any      | a CSV column is int64, float64 or text, whichever holds it exactly | -                           |

    Integer times may be seconds, milli-, micro- or nanoseconds, recognised by their size; times without a zone are
    UTC. Empty text is a missing value. Raises BadRowsError for more than `max_bad_rows` rejects, ValueError for
    a column that is not there, for mixed time units, and for a file that is none of the above.
    """
    if max_bad_rows < 0:
        raise ValueError(f"max_bad_rows must be 0 or more, received {max_bad_rows}")
    if isinstance(source, str | Path):
        path = Path(source)
        if path.is_dir():
            raise ValueError(f"{path} is a folder; give the path of one table, such as {path / 'events.csv'}")
        suffix = _suffix(path)
        if not path.is_file():
            raise ValueError(f"there is no file {path}; check the path")
        if suffix in TEXT_FILES:
            data = _read_bytes(path)
            separator = "\t" if suffix in (".tsv", ".tab") else _separator_of(data)
            return read_delimited(data, file=path.name, separator=separator, columns=columns, max_bad_rows=max_bad_rows)
        frame, file = _read_frame(path, suffix), path.name
    else:
        frame, file = _frame_of(source), "the data frame"
    return _typed(frame, file, columns, max_bad_rows, (), lambda rows: rows + 1)


def read_delimited(
    data: bytes,
    *,
    file: str,
    separator: str = ",",
    names: Sequence[str] | None = None,
    quoted: bool = True,
    columns: Mapping[str, str] | None = None,
    max_bad_rows: int = 0,
) -> tuple[pl.DataFrame, Accounting]:
    """As `read_table`, for the bytes of a delimited text. `names` are the columns of a text without header line;
    `quoted` False takes quotes as ordinary characters."""
    header, begin = (list(names), 0) if names is not None else header_of(data, separator, file)
    frame = None if quoted and data.find(b'"', begin) >= 0 else _parse(data[begin:], header, separator, quoted)
    # A short row shows as a null in the last column.
    if frame is not None and (frame[:, -1].null_count() == 0 or is_regular(data, begin, len(header), separator)):
        return _typed(frame, file, columns, max_bad_rows, (), _LazyLines(data, begin, header, separator, quoted))
    found = scan(data, begin, header, separator, quoted)
    frame = _parse(found.good_bytes(begin), header, separator, quoted)
    if frame is None or frame.height != len(found.starts):
        raise ValueError(f"{file} cannot be read as delimited text; write it as Parquet")
    lines = found.lines(np.array([f.start for f in found.faults], dtype=np.int64))
    rejects = [Reject(file, int(n), f.column, f.reason) for n, f in zip(lines, found.faults, strict=True)]

    def line_of(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return found.lines(np.asarray(found.starts, dtype=np.int64)[rows])

    return _typed(frame, file, columns, max_bad_rows, rejects, line_of)


@dataclass(slots=True)
class _LazyLines:
    """Rows to file lines for a text that polars read at once; the scan is only made when a row is at fault."""

    data: bytes
    begin: int
    names: Sequence[str]
    separator: str
    quoted: bool

    def __call__(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        found: Scan = scan(self.data, self.begin, self.names, self.separator, self.quoted)
        return found.lines(np.asarray(found.starts, dtype=np.int64)[rows])


# --- files and frames -------------------------------------------------------------------------------------------------


def _suffix(path: Path) -> str:
    stem = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    suffix = stem.suffix.lower()
    known = (*TEXT_FILES, *PARQUET_FILES, *ARROW_FILES)
    if suffix not in known or (stem != path and suffix not in TEXT_FILES):
        raise ValueError(f"{path.name} is of no known kind; known are {', '.join(known)}, and text with .gz or .zst")
    return suffix


def _read_bytes(path: Path) -> bytes:
    if path.suffix.lower() not in COMPRESSED:
        return path.read_bytes()
    try:
        with pa.input_stream(str(path), compression="detect") as stream:
            return bytes(stream.read())
    except OSError as error:
        raise ValueError(f"{path.name} cannot be decompressed, the file is damaged or cut off: {error}") from None


def _read_frame(path: Path, suffix: str) -> pl.DataFrame:
    try:
        return pl.read_parquet(path) if suffix in PARQUET_FILES else pl.read_ipc(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        kind = "Parquet" if suffix in PARQUET_FILES else "Arrow"
        cause = str(error).partition("\n")[0]
        raise ValueError(f"{path.name} is no {kind} file, or a damaged one: {cause}; write it again") from error


def _separator_of(data: bytes) -> str:
    line = data[: data.find(b"\n") + 1 or len(data)]
    return max((",", "\t", ";", "|"), key=lambda s: line.count(s.encode()))


def _frame_of(source: Any) -> pl.DataFrame:
    if isinstance(source, pl.DataFrame):
        return source
    if isinstance(source, pl.LazyFrame):
        return source.collect()
    if isinstance(source, pa.Table):
        frame = pl.from_arrow(source)
        assert isinstance(frame, pl.DataFrame)
        return frame
    if type(source).__module__.partition(".")[0] == "pandas":
        try:
            frame = pl.from_pandas(source)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise ValueError(f"the pandas frame mixes types in one column, cast it first: {error}") from None
        assert isinstance(frame, pl.DataFrame)
        return frame
    raise ValueError(f"a table is a path or a polars, pandas or Arrow table, received {type(source).__name__}")


def _parse(body: bytes, names: Sequence[str], separator: str, quoted: bool) -> pl.DataFrame | None:
    """The records as text columns, or None when polars cannot read them."""
    schema = dict.fromkeys(names, pl.String)
    if not body.strip(b"\r\n"):
        return pl.DataFrame(schema=schema)
    try:
        return pl.read_csv(
            body,
            has_header=False,
            schema=schema,
            separator=separator,
            quote_char='"' if quoted else None,
        )
    except (pl.exceptions.ComputeError, pl.exceptions.SchemaError, pl.exceptions.ShapeError):
        return None


# --- columns ----------------------------------------------------------------------------------------------------------


def _typed(
    frame: pl.DataFrame,
    file: str,
    columns: Mapping[str, str] | None,
    max_bad_rows: int,
    structural: Sequence[Reject],
    line_of: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int64]],
) -> tuple[pl.DataFrame, Accounting]:
    """Convert the declared columns, reject the rows at fault, and check the account."""
    columns = dict(columns or {})
    for name, kind in columns.items():
        if kind not in KINDS:
            raise ValueError(f"the kind of column '{name}' must be one of {', '.join(KINDS)}, received {kind!r}")
        if name not in frame.columns:
            raise ValueError(f"{file} has no column '{name}'; it has {', '.join(frame.columns)}")
    first: dict[int, tuple[str, str]] = {}
    converted: list[pl.Series] = []
    for series in frame.get_columns():
        values, faults = _convert(series, columns.get(series.name, "any"), file)
        converted.append(values.alias(series.name))
        for bad, reason in faults:
            rows = bad.arg_true()
            for row, value in zip(rows.to_list(), series.gather(rows).to_list(), strict=True):
                first.setdefault(row, (series.name, reason.format(_shown(value))))
    rejects = list(structural)
    table = pl.DataFrame(converted)
    if first:
        at_fault = np.fromiter(sorted(first), dtype=np.int64, count=len(first))
        for row, line in zip(at_fault.tolist(), line_of(at_fault).tolist(), strict=True):
            rejects.append(Reject(file, line, *first[row]))
        keep = np.ones(frame.height, dtype=np.bool_)
        keep[at_fault] = False
        table = table.filter(pl.Series(keep))
    rejects.sort(key=lambda reject: reject.line)
    read = frame.height + len(structural)
    if len(rejects) > max_bad_rows:
        raise BadRowsError(rejects, read, max_bad_rows)
    # Decided on the kept rows: one bad row must not turn a column of integers into text.
    ids = [_narrow_ids(table[c]) for c, kind in columns.items() if kind in ("id", "key", "category")]
    return table.with_columns(ids), Accounting(file, read, table.height, tuple(rejects))


def _convert(values: pl.Series, kind: str, file: str) -> tuple[pl.Series, _Faults]:
    if kind == "any":
        return (_guess(values) if values.dtype == pl.String else values), []
    if kind == "text":
        text = values.cast(pl.String)
        return text.set(text == "", None), []
    if kind in ("id", "key", "category"):
        ids = canonical_ids(values)
        missing = (ids.is_null(), MISSING)
        repeated = (~ids.is_first_distinct(), "an earlier row has the same value")
        return ids, {"id": [missing], "key": [missing, repeated], "category": []}[kind]
    if kind == "time":
        return _time(values, file)
    return _number(values, required=kind == "label")


def _shown(value: object) -> str:
    """The value as a message shows it: at most 40 characters, on one line."""
    return repr(str(value)[:40])


def _guess(values: pl.Series) -> pl.Series:
    """Text to int64 or float64 where that loses nothing."""
    text = values.set(values == "", None)
    known = text.drop_nulls()
    if not known.len():
        return text
    if known.str.contains(CANONICAL_INTEGER).all():
        integers = text.cast(pl.Int64, strict=False)
        return integers if integers.null_count() == text.null_count() else text
    if known.str.contains(WRITTEN_NUMBER).all() and not known.str.contains(LARGEST_GUESSED_DIGITS).any():
        floats = text.cast(pl.Float64, strict=False)
        return floats if floats.null_count() == text.null_count() else text
    return text


def _narrow_ids(values: pl.Series) -> pl.Series:
    """int64 when every id is an integer as programs write it, else text."""
    guessed = _guess(values) if values.dtype == pl.String else values
    return guessed if guessed.dtype == pl.Int64 else values


def _number(values: pl.Series, *, required: bool) -> tuple[pl.Series, _Faults]:
    if values.dtype == pl.String:
        text = values.str.strip_chars()
        text = text.set(text == "", None)
        numbers = text.cast(pl.Float64, strict=False)
        wrong = numbers.is_null() & text.is_not_null()
    elif values.dtype.is_numeric() or values.dtype in (pl.Boolean, pl.Null):
        numbers = values.cast(pl.Float64)
        wrong = pl.repeat(False, values.len(), dtype=pl.Boolean, eager=True)
    else:
        raise ValueError(f"column '{values.name}' of type {values.dtype} holds no numbers; cast it first")
    faults: _Faults = [(wrong, "{} is no number"), (numbers.is_infinite(), "the value is infinite")]
    if required:
        faults += [(numbers.is_null(), MISSING), (numbers.is_nan(), "the value is NaN")]
    return numbers.fill_nan(None), faults


# --- time -------------------------------------------------------------------------------------------------------------


def _time(values: pl.Series, file: str) -> tuple[pl.Series, _Faults]:
    """Seconds since 1970 as int64, null where the value is no time."""
    missing = values.is_null()
    if values.dtype == pl.String:
        text = values.str.strip_chars()
        missing = missing | (text == "").fill_null(True)
        integers = text.cast(pl.Int64, strict=False)
        if integers.count() == (~missing).sum():
            times = _seconds(integers, values.name, file)
        else:
            # A column is written in one way: the rarer way is the fault.
            integers, is_iso = _whole(text), text.str.contains(ISO_TIME)
            times = _iso_seconds(text) if is_iso.sum() > integers.count() else _seconds(integers, values.name, file)
    elif values.dtype == pl.Date:
        times = values.to_physical().cast(pl.Int64) * 86_400
    elif isinstance(values.dtype, pl.Datetime):
        per_second = {"ms": 10**3, "us": 10**6, "ns": 10**9}[values.dtype.time_unit]
        times = values.to_physical() // per_second
    elif values.dtype.is_float():
        missing = missing | values.is_nan().fill_null(False)
        usable = (values.is_finite() & (values.abs() < 2.0**63)).fill_null(False)
        times = _seconds(values.set(~usable, None).floor().cast(pl.Int64), values.name, file)
    elif values.dtype.is_integer() or values.dtype == pl.Null:
        times = _seconds(values.cast(pl.Int64, strict=False), values.name, file)
    else:
        raise ValueError(f"column '{values.name}' of type {values.dtype} holds no times; cast it first")
    wrong = "{} is no time; write seconds since 1970 or ISO 8601 (2024-05-31T12:00:00Z)"
    return times, [(missing, MISSING), (times.is_null(), wrong)]


def _whole(text: pl.Series) -> pl.Series:
    """int64 of texts such as 978300760, 978300760.0 and 978300760.25 (the fraction is cut off, towards the past)."""
    number = text.str.extract(r"^([+-]?[0-9]{1,19})(?:\.[0-9]*)?$").cast(pl.Int64, strict=False)
    past = text.str.contains(r"^-[0-9]+\.[0-9]*[1-9]").fill_null(False)
    return number - past.cast(pl.Int64)


def _iso_seconds(text: pl.Series) -> pl.Series:
    parts = text.str.extract_groups(ISO_TIME).struct.unnest()
    clock = parts["clock"].fill_null("00:00") + parts["second"].fill_null(":00")
    moment = (parts["date"] + " " + clock).str.to_datetime("%Y-%m-%d %H:%M:%S", time_unit="ms", strict=False)
    zone = parts["zone"].str.replace(":", "").str.extract(r"^([+-]\d{4})$")
    sign = pl.Series(np.where(zone.str.starts_with("-").fill_null(False).to_numpy(), -1, 1))
    offset = zone.str.slice(1, 2).cast(pl.Int64) * 3600 + zone.str.slice(3, 2).cast(pl.Int64) * 60
    return moment.to_physical() // 1000 - (offset * sign).fill_null(0)


def _seconds(times: pl.Series, name: str, file: str) -> pl.Series:
    """Integer times to seconds; the unit is recognised by size and must be one for the whole column."""
    size = times.drop_nulls().cast(pl.Float64).abs()
    size = size.filter(size > 0)  # 0 is 1970 in every unit
    if not size.len():
        return times
    bounds = [bound for _, bound, _ in UNITS]
    unit = np.searchsorted(np.array(bounds), size.to_numpy(), side="right")
    used = np.unique(unit)
    if used.size > 1:
        counts = [f"{UNITS[u][0]} ({int((unit == u).sum()):,} rows)" for u in used]
        raise ValueError(
            f"{file}: column '{name}' mixes time units: {' and '.join(counts)}; convert it to seconds since 1970"
        )
    if used[0] == 0 and _look_like_dates(times.drop_nulls()):
        raise ValueError(
            f"{file}: column '{name}' holds dates written as YYYYMMDD, such as {times.drop_nulls()[0]}; "
            "write them as 2024-05-31 or as seconds since 1970"
        )
    return times // UNITS[int(used[0])][2]


def _look_like_dates(times: pl.Series) -> bool:
    year, month, day = times // 10_000, times // 100 % 100, times % 100
    tests = (year >= 1900, year <= 2100, month >= 1, month <= 12, day >= 1, day <= 31)
    return bool(reduce(operator.and_, tests).all())
