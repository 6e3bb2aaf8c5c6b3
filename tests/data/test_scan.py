"""Scan: what is a record, what is a fault, and where each begins."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from funnelrec.data import scan as module
from funnelrec.data.scan import header_of, is_regular, scan


def test_records_and_faults_by_hand() -> None:
    data = b'a,b\n1,2\n\n3\n4,"x\ny"\n5,6,7\n8,"z"q\n9,\n'
    names, begin = header_of(data, ",", "x.csv")
    assert (names, begin) == (["a", "b"], 4)
    found = scan(data, begin, names, ",", quoted=True)
    assert [data[a:b] for a, b in zip(found.starts, found.stops, strict=True)] == [b"1,2\n", b'4,"x\ny"\n', b"9,\n"]
    assert found.lines(np.asarray(found.starts, dtype=np.int64)).tolist() == [2, 5, 9]
    assert [(f.column, f.reason.split(";")[0]) for f in found.faults] == [
        ("b", "1 columns where 2 are due"),
        (None, "3 columns where 2 are due"),
        ("b", "a quote does not close or stands inside the value"),
    ]
    assert found.good_bytes(begin) == b'1,2\n4,"x\ny"\n9,\n'


def test_quotes_are_characters_where_they_do_not_quote() -> None:
    found = scan(b'1\t"open\n2\tin"side\n', 0, ["a", "b"], "\t", quoted=False)
    assert (len(found.starts), found.faults) == (2, [])


def test_bytes_that_are_not_utf8_name_their_column() -> None:
    found = scan(b"1,2\n3,caf\xe9\n\xff,4\n", 0, ["a", "b"], ",", quoted=True)
    assert [f.column for f in found.faults] == ["b", "a"]


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=40).map(lambda b: bytes(b'",\n\rx\xc3'[c % 6] for c in b)), st.integers(1, 3))
def test_nothing_is_lost_or_read_twice(data: bytes, columns: int) -> None:
    """Any bytes at all: records, faults and blank lines follow one another without gap or overlap."""
    names = [f"c{i}" for i in range(columns)]
    found = scan(data, 0, names, ",", quoted=True)
    begins = sorted([*found.starts, *(f.start for f in found.faults)])
    assert len(set(begins)) == len(begins)
    ends = [*begins, len(data)][1:]
    stops = dict(zip(found.starts, found.stops, strict=True))
    covered = 0
    for begin, end in zip(begins, ends, strict=True):
        assert set(data[covered:begin]) <= set(b"\r\n")  # only blank lines stand between
        covered = stops.get(begin, end)
        assert covered <= end


@pytest.mark.parametrize(
    ("data", "columns", "regular"),
    [
        (b"1,2\n3,4\n", 2, True),
        (b"1,2\n3,\n,4", 2, True),
        (b"1,2\n3\n5,6\n", 2, False),
        (b"1,2\n3,4,5\n", 2, False),
        (b"1,2\n\n5,6\n", 2, False),
        (b"1,2,3\n4\n", 2, False),
        (b"12\n\n34\n", 1, False),
        (b"12\n34\n", 1, True),
        (b"", 2, True),
    ],
)
@pytest.mark.parametrize("block", [1, 4, 1 << 24])
def test_is_regular(data: bytes, columns: int, regular: bool, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    assert is_regular(data, 0, columns, ",") is regular
    if regular:  # the claim: there is nothing for a scan to find
        found = scan(data, 0, [f"c{i}" for i in range(columns)], ",", quoted=True)
        assert (len(found.starts), found.faults) == (data.count(b"\n") + (not data.endswith(b"\n") and data != b""), [])
