"""Ingest: every row is kept or rejected, every planted fault is found on its line, ids are exact, times are seconds."""

from __future__ import annotations

import gzip
from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from funnelrec.data import ingest
from funnelrec.data.ingest import Accounting, BadRowsError, Reject, read_delimited, read_table
from funnelrec.data.scan import Scan, scan

KINDS = {"user": "id", "item": "id", "rating": "label", "price": "number", "time": "time", "note": "text"}
NAMES = list(KINDS)
# What is planted: the column that the reject must name, and words of its reason.
FAULTS: dict[str, tuple[str | None, str]] = {
    "short": ("note", "5 columns where 6 are due"),
    "long": (None, "7 columns where 6 are due"),
    "quote": ("item", "a quote does not close"),
    "bytes": ("note", "not UTF-8"),
    "no user": ("user", "the value is missing"),
    "no item": ("item", "the value is missing"),
    "word": ("rating", "'good' is no number"),
    "nan": ("rating", "the value is NaN"),
    "no label": ("rating", "the value is missing"),
    "infinite": ("price", "the value is infinite"),
    "no time": ("time", "the value is missing"),
    "bad time": ("time", "'soon' is no time"),
}
CELL_FAULTS = {
    "no user": (0, ""),
    "no item": (1, ""),
    "word": (2, "good"),
    "nan": (2, "NaN"),
    "no label": (2, ""),
    "infinite": (3, "-inf"),
    "no time": (4, ""),
    "bad time": (4, "soon"),
}


def written(cells: list[str]) -> str:
    """A record as RFC 4180 writes it."""
    return ",".join('"' + c.replace('"', '""') + '"' if set(c) & set(',"\r\n') else c for c in cells)


def planted(cells: list[str], fault: str) -> bytes:
    """One record with one fault."""
    if fault == "short":
        return written(cells[:-1]).encode()
    if fault == "long":
        return written([*cells, "extra"]).encode()
    if fault == "bytes":
        return written([*cells[:-1], "BYTES"]).encode().replace(b"BYTES", b"caf\xe9")
    if fault == "quote":
        return b'1,"e"f,3.5,,978300760,x'  # such a fault is one line: no newline may stand in the other cells
    position, text = CELL_FAULTS[fault]
    return written([*cells[:position], text, *cells[position + 1 :]]).encode()


# Any text that is not empty; newlines and quotes in it must survive. Lone surrogates cannot be written as UTF-8.
words = st.text(st.sampled_from('ab,"\n\r😀é\t |7'), min_size=1, max_size=6)
records = st.tuples(
    st.one_of(st.integers(-(2**63), 2**63 - 1).map(str), words),
    words,
    st.floats(-1e300, 1e300).map(repr),
    st.sampled_from(["", "0.5", "1e3", "nan"]),
    st.integers(1, 4_000_000_000).map(str),
    words,
).map(list)


@settings(deadline=None, max_examples=150)
@given(
    rows=st.lists(st.tuples(records, st.one_of(st.none(), st.none(), st.sampled_from(sorted(FAULTS)))), max_size=12),
    endings=st.lists(st.sampled_from(["\n", "\r\n", "\n\n", "\r\n\n"]), min_size=13, max_size=13),
    bom=st.booleans(),
    last_newline=st.booleans(),
)
def test_every_row_is_accounted_for_and_every_planted_fault_is_found_on_its_line(
    rows: list[tuple[list[str], str | None]], endings: list[str], bom: bool, last_newline: bool
) -> None:
    data = (b"\xef\xbb\xbf" if bom else b"") + ",".join(NAMES).encode() + endings[0].encode()
    expected: list[tuple[int, str | None, str]] = []
    good: list[list[str]] = []
    for (cells, fault), ending in zip(rows, endings[1:], strict=False):
        line = data.count(b"\n") + 1
        if fault is None:
            good.append(cells)
            data += written(cells).encode()
        else:
            expected.append((line, *FAULTS[fault]))
            data += planted(cells, fault)
        data += ending.encode()
    if not last_newline:
        data = data.rstrip(b"\r\n")
    table, account = read_delimited(data, file="events.csv", columns=KINDS, max_bad_rows=100)
    assert (account.read, account.kept) == (len(rows), len(good))
    assert account.read == account.kept + len(account.rejects)
    assert [(r.line, r.column) for r in account.rejects] == [(line, column) for line, column, _ in expected]
    for reject, (_, _, word) in zip(account.rejects, expected, strict=True):
        assert word in reject.reason
    assert table.height == len(good)
    assert [str(v) for v in table["user"]] == [g[0] for g in good]
    assert table["item"].cast(pl.String).to_list() == [g[1] for g in good]
    assert table["note"].to_list() == [g[5] for g in good]
    assert table["rating"].to_list() == [float(g[2]) for g in good]
    assert table["price"].to_list() == [None if g[3] in ("", "nan") else float(g[3]) for g in good]
    assert table["time"].to_list() == [int(g[4]) for g in good]


def test_the_property_would_see_a_lost_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positive control: with a scan that loses bad rows, `read` is not the number of rows that were written."""
    data = b"a,b\n1,2\n3\n5,6\n"
    assert read_delimited(data, file="x.csv", max_bad_rows=1)[1].read == 3

    def forgetful(*args: Any) -> Scan:
        found = scan(*args)
        found.faults.clear()
        return found

    monkeypatch.setattr(ingest, "scan", forgetful)
    assert read_delimited(data, file="x.csv", max_bad_rows=1)[1].read == 2


def test_an_account_must_add_up() -> None:
    with pytest.raises(ValueError, match="3 rows read, but 1 kept and 1 rejected"):
        Accounting("x.csv", read=3, kept=1, rejects=(Reject("x.csv", 2, None, "bad"),))


def test_polars_alone_hides_a_short_row() -> None:
    """Why the scan exists: polars fills the missing column with null and says nothing."""
    data = b"a,b\n1,2\n3\n5,6\n"
    assert pl.read_csv(data, infer_schema=False)["b"].to_list() == ["2", None, "6"]
    with pytest.raises(BadRowsError, match=r"x\.csv:3: column 'b': 1 columns where 2 are due"):
        read_delimited(data, file="x.csv")


def test_the_message_names_the_first_reject_and_how_to_mend_it(tmp_path: Path) -> None:
    path = tmp_path / "events.csv"
    path.write_text("user,item,rating\n1,a,3\n2,b,\n3,,zz\n")
    columns = {"user": "id", "item": "id", "rating": "label"}
    with pytest.raises(
        BadRowsError,
        match=r"^events\.csv:3: column 'rating': the value is missing \(2 of 3 rows bad, 0 allowed; "
        r"mend the data, or leave bad rows out with max_bad_rows=2\)$",
    ) as caught:
        read_table(path, columns=columns)
    assert [r.line for r in caught.value.rejects] == [3, 4]
    with pytest.raises(BadRowsError, match="1 allowed"):
        read_table(path, columns=columns, max_bad_rows=1)
    table, account = read_table(path, columns=columns, max_bad_rows=2)
    assert table.rows() == [(1, "a", 3.0)]
    assert str(account) == "events.csv: 3 rows read, 1 kept, 2 rejected"
    assert account.rejects[1] == Reject("events.csv", 4, "item", "the value is missing")


def test_a_quote_that_never_closes_costs_one_row_only() -> None:
    data = b'a,b\n1,x\n2,"open\n3,y\n4,z\n'
    table, account = read_delimited(data, file="x.csv", max_bad_rows=1)
    assert table.rows() == [(1, "x"), (3, "y"), (4, "z")]
    assert [(r.line, r.column) for r in account.rejects] == [(3, "b")]


def test_lines_count_newlines_inside_quotes() -> None:
    data = b'a,b\n1,"x\ny\nz"\n\n2,b,c\n'
    with pytest.raises(BadRowsError, match=r"x\.csv:6: 3 columns where 2 are due"):
        read_delimited(data, file="x.csv")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["7", "12"], [7, 12]),
        (["007", "7"], ["007", "7"]),
        (["9223372036854775807", "-9223372036854775808"], [2**63 - 1, -(2**63)]),
        (["9223372036854775808", "1"], ["9223372036854775808", "1"]),
        (["9007199254740993", "9007199254740992"], [2**53 + 1, 2**53]),
        (["1.0", "1"], ["1.0", "1"]),
        (["+1", "1"], ["+1", "1"]),
        (["-0", "0"], ["-0", "0"]),
    ],
)
def test_ids_are_exact(values: list[str], expected: list[Any]) -> None:
    data = ("id,x\n" + "".join(f"{v},1\n" for v in values)).encode()
    assert read_delimited(data, file="x.csv", columns={"id": "id"})[0]["id"].to_list() == expected
    assert read_table(pl.DataFrame({"id": values}), columns={"id": "id"})[0]["id"].to_list() == expected


def test_one_bad_row_does_not_turn_integers_into_text() -> None:
    table, _ = read_delimited(b"id,r\n7,1\nabc,oops\n", file="x", columns={"id": "id", "r": "label"}, max_bad_rows=1)
    assert table["id"].to_list() == [7]


def test_a_key_comes_once() -> None:
    with pytest.raises(BadRowsError, match="x:4: column 'id': an earlier row has the same value"):
        read_delimited(b"id,t\n7,a\n8,b\n7,c\n", file="x", columns={"id": "key"})


@pytest.mark.parametrize(
    ("values", "seconds"),
    [
        (["978300760", "0", "978300761"], [978300760, 0, 978300761]),
        (["1700000000123", "0"], [1700000000, 0]),
        (["1700000000123456"], [1700000000]),
        (["1700000000123456789"], [1700000000]),
        ([1700000000123456789], [1700000000]),
        ([-1500, -1700000000001][1:], [-1700000001]),
        ([978300760.9, 978300761.0], [978300760, 978300761]),
        (["978300760.9", "-1.5"], [978300760, -2]),
        (["2001-01-01", "2001-01-01T00:00:01Z", "2001-01-01 02:00:02.9+02:00"], [978307200, 978307201, 978307202]),
        (["2000-12-31T19:30:00-0430"], [978307200]),
        ([date(2001, 1, 1)], [978307200]),
        ([datetime(2001, 1, 1), datetime(1969, 12, 31, 23, 59, 59, 500_000)], [978307200, -1]),
        ([datetime(2001, 1, 1, tzinfo=UTC)], [978307200]),
    ],
)
def test_times_become_seconds(values: list[Any], seconds: list[int]) -> None:
    table, _ = read_table(pl.DataFrame({"t": values}), columns={"t": "time"})
    assert table["t"].to_list() == seconds
    assert table["t"].dtype == pl.Int64


def test_times_with_a_zone_are_the_same_moment() -> None:
    zoned = pl.Series("t", [datetime(2001, 1, 1)]).dt.replace_time_zone("Europe/Berlin")
    table, _ = read_table(zoned.to_frame(), columns={"t": "time"})
    assert table["t"].to_list() == [978307200 - 3600]


@settings(deadline=None, max_examples=60)
@given(st.datetimes(datetime(1900, 1, 1), datetime(2200, 1, 1)), st.integers(-14 * 60, 14 * 60))
def test_iso_text_agrees_with_the_standard_library(moment: datetime, minutes: int) -> None:
    zoned = moment.replace(tzinfo=timezone(timedelta(minutes=minutes)))
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    # isoformat writes offsets such as +00:00 and microseconds only where there are any.
    table, _ = read_table(pl.DataFrame({"t": [zoned.isoformat()]}), columns={"t": "time"})
    assert table["t"].to_list() == [(zoned - epoch) // timedelta(seconds=1)]


def test_mixed_units_and_compact_dates_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'t' mixes time units: seconds \(2 rows\) and milliseconds \(1 rows\)"):
        read_table(pl.DataFrame({"t": [1700000000, 1700000000000, 1600000000]}), columns={"t": "time"})
    with pytest.raises(ValueError, match="dates written as YYYYMMDD, such as 20240131"):
        read_table(pl.DataFrame({"t": ["20240131", "20231231"]}), columns={"t": "time"})
    # One value that is no such date shows that they are counts.
    assert read_table(pl.DataFrame({"t": [20240131, 20240199]}), columns={"t": "time"})[0].height == 2


def test_times_that_do_not_exist_are_rejected() -> None:
    values = ["2024-02-30", "2024-02-29", "2024-02-29T25:00", "1700000000", None, ""]
    table, account = read_table(pl.DataFrame({"t": values, "x": range(6)}), columns={"t": "time"}, max_bad_rows=9)
    assert table["x"].to_list() == [1]
    assert [r.line for r in account.rejects] == [1, 3, 4, 5, 6]


def test_undeclared_columns_are_guessed_without_loss() -> None:
    data = b'i,f,code,big,word,none,neg\n1,1.5,007,18446744073709551616,x,,-3\n2,2,7,1,"",,4\n'
    table, _ = read_delimited(data, file="x")
    assert table.schema == {
        "i": pl.Int64,
        "f": pl.Float64,
        "code": pl.String,
        "big": pl.String,
        "word": pl.String,
        "none": pl.String,
        "neg": pl.Int64,
    }
    assert table.row(1) == (2, 2.0, "7", "1", None, None, 4)


def test_kinds_of_files(tmp_path: Path) -> None:
    frame = pl.DataFrame({"user": [2**63 - 1, 5], "name": ["é😀", 'q"\n,'], "x": [0.5, None]})
    frame.write_csv(tmp_path / "t.csv")
    frame.write_csv(tmp_path / "t.tsv", separator="\t")
    frame.write_csv(tmp_path / "semicolon.csv", separator=";")
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress((tmp_path / "t.csv").read_bytes()))
    (tmp_path / "t.csv.zst").write_bytes(pa.compress((tmp_path / "t.csv").read_bytes(), "zstd", asbytes=True))
    frame.write_parquet(tmp_path / "t.parquet")
    frame.write_ipc(tmp_path / "t.arrow")
    for path in sorted(tmp_path.iterdir()):
        table, account = read_table(str(path), columns={"user": "id"})
        assert table.equals(frame), path.name
        assert account == Accounting(path.name, 2, 2)


def test_kinds_of_frames() -> None:
    frame = pl.DataFrame({"user": [2**63 - 1, 5], "name": ["a", "b"]})
    for source in (frame, frame.lazy(), frame.to_arrow(), pd.DataFrame({"user": [2**63 - 1, 5], "name": ["a", "b"]})):
        table, account = read_table(source, columns={"user": "id"})
        assert table["user"].to_list() == [2**63 - 1, 5]
        assert table["name"].to_list() == ["a", "b"]
        assert (account.file, account.read) == ("the data frame", 2)


def test_pandas_integers_with_gaps_stay_integers_and_gaps_are_rejected() -> None:
    source = pd.DataFrame({"user": [1, None, 3]})  # pandas makes floats of them
    table, account = read_table(source, columns={"user": "id"}, max_bad_rows=1)
    assert table["user"].to_list() == [1, 3]
    assert account.rejects[0].line == 2
    with pytest.raises(ValueError, match="mixes types in one column"):
        read_table(pd.DataFrame({"user": [1, "x"]}, dtype=object))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty; its first line must name the columns"),
        (b"\xef\xbb\xbf\n\n", "is empty"),
        (b"a,a\n1,2\n", "names the column 'a' twice"),
        (b'"a\n1\n', "the header is not well quoted"),
        (b"caf\xe9,b\n", "the header is not UTF-8"),
        ("a,b\n1,2\n".encode("utf-16"), "is UTF-16; save it as UTF-8"),
    ],
)
def test_headers_that_are_none(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_delimited(data, file="x.csv")


def test_refusals(tmp_path: Path) -> None:
    frame = pl.DataFrame({"a": [[1]], "b": [1.5]})
    with pytest.raises(ValueError, match=r"there is no file .*gone\.csv; check the path"):
        read_table(tmp_path / "gone.csv")
    with pytest.raises(ValueError, match=r"x\.xlsx is of no known kind; known are \.csv"):
        read_table(tmp_path / "x.xlsx")
    with pytest.raises(ValueError, match="max_bad_rows must be 0 or more, received -1"):
        read_table(frame, max_bad_rows=-1)
    with pytest.raises(ValueError, match="has no column 'z'; it has a, b"):
        read_table(frame, columns={"z": "id"})
    with pytest.raises(ValueError, match=r"kind of column 'a' must be one of id, key.*received 'ids'"):
        read_table(frame, columns={"a": "ids"})
    with pytest.raises(ValueError, match="a table is a path or a polars, pandas or Arrow table, received dict"):
        read_table({"a": [1]})
    for kind, message in (("time", "holds no times"), ("number", "holds no numbers"), ("id", "holds no ids")):
        with pytest.raises(ValueError, match=message):
            read_table(frame, columns={"a": kind})
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(b"a,b\n" + b"1,2\n" * 1000)[:-20])
    with pytest.raises(ValueError, match=r"cut\.csv\.gz cannot be decompressed"):
        read_table(tmp_path / "cut.csv.gz")


@pytest.mark.parametrize("name", ["t.parquet", "t.arrow"])
def test_damaged_binary_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PAR1 this is none")
    with pytest.raises(ValueError, match=r"^t\.\w+ is no (Parquet|Arrow) file, or a damaged one: .*; write it again$"):
        read_table(tmp_path / name)


def test_a_header_without_rows_is_an_empty_table() -> None:
    for data in (b"a,b", b"a,b\n", b"a,b\r\n\r\n"):
        table, account = read_delimited(data, file="x", columns={"a": "id", "b": "time"})
        assert (table.shape, account.read) == ((0, 2), 0)
