"""Scan of delimited text: which records are well formed, on which line each begins, and what is wrong with the rest.

The grammar is RFC 4180 with LF or CRLF, any one-byte delimiter, and blank lines skipped. A record that is well quoted
but has the wrong number of columns is one fault, however many lines its quoted newlines span. Where the quotes do not
fit, the fault is that one line and reading goes on with the next, so a quote that never closes costs a row, not the
rest of the file. Every record is either good or a fault; none is skipped.
"""

from __future__ import annotations

import csv
import io
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

__all__ = ["Fault", "Scan", "header_of", "is_regular", "scan"]

BLOCK = 1 << 24  # bytes looked at together where no quotes are


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with the record or line that begins at byte `start`."""

    start: int
    column: str | None
    reason: str


@dataclass(slots=True)
class Scan:
    """`starts`, `stops`: byte ranges of the good records, in file order; `faults`: the others, in file order."""

    data: bytes
    starts: array[int] = field(default_factory=lambda: array("q"))
    stops: array[int] = field(default_factory=lambda: array("q"))
    faults: list[Fault] = field(default_factory=list)

    def good_bytes(self, begin: int) -> bytes:
        """The good records, nothing else; `begin` is where the first record may start."""
        if sum(self.stops) - sum(self.starts) == len(self.data) - begin:
            return self.data[begin:]
        ends = b"\n"
        parts = [self.data[a:b] for a, b in zip(self.starts, self.stops, strict=True)]
        return b"".join(p if p.endswith(ends) else p + ends for p in parts)

    def lines(self, starts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """File lines, from 1, on which the records at these bytes begin."""
        newlines = np.flatnonzero(np.frombuffer(self.data, dtype=np.uint8) == ord("\n"))
        return np.searchsorted(newlines, starts, side="left").astype(np.int64) + 1


class _Grammar:
    """The compiled patterns of one dialect. Possessive quantifiers: no backtracking, the scan is linear."""

    def __init__(self, separator: str, quoted: bool, columns: int) -> None:
        d = re.escape(separator.encode())
        plain = rb"[^" + d + rb"\n]*+" if not quoted else rb'(?!")[^' + d + rb'"\n]*+'
        value = rb'(?:"[^"]*+(?:""[^"]*+)*+"|' + plain + rb")" if quoted else plain
        end = rb"(?:\r?\n|\Z)"
        self.record = re.compile(value + rb"(?:" + d + value + rb"){" + str(columns - 1).encode() + rb"}" + end)
        self.any_record = re.compile(value + rb"(?:" + d + value + rb")*+" + end)
        self.blank = re.compile(rb"(?:\r?\n)++")
        self.step = re.compile(value + d)
        self.value = re.compile(value)
        self.line = re.compile(rb"[^\n]*+\n?")


def header_of(data: bytes, separator: str, file: str) -> tuple[list[str], int]:
    """Column names and the byte where the first record may start. Raises ValueError for a header that is none."""
    begin = 3 if data.startswith(b"\xef\xbb\xbf") else 0
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{file} is UTF-16; save it as UTF-8")
    grammar = _Grammar(separator, True, 1)
    blank = grammar.blank.match(data, begin)
    begin = blank.end() if blank else begin
    match = grammar.any_record.match(data, begin)
    if begin >= len(data):
        raise ValueError(f"{file} is empty; its first line must name the columns")
    if match is None:
        raise ValueError(f'{file}:1: the header is not well quoted; write names that hold quotes as "a ""b"""')
    try:
        text = match.group().decode().rstrip("\r\n")
    except UnicodeDecodeError:
        raise ValueError(f"{file}:1: the header is not UTF-8; save the file as UTF-8") from None
    names = next(csv.reader(io.StringIO(text, newline=""), delimiter=separator))
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ValueError(f"{file}:1: the header names the column '{twice[0]}' twice; each name must be its own")
    return names, match.end()


def is_regular(data: bytes, begin: int, columns: int, separator: str) -> bool:
    """True when every line of a text without quotes has `columns` columns and none is blank: nothing to scan for."""
    while begin < len(data):
        stop = data.find(b"\n", begin + BLOCK) + 1 or len(data)
        block = np.frombuffer(data, dtype=np.uint8, count=stop - begin, offset=begin)
        ends = np.flatnonzero(block == ord("\n"))
        ends = ends if ends.size and ends[-1] == block.size - 1 else np.append(ends, block.size)
        separators = np.searchsorted(np.flatnonzero(block == ord(separator)), ends)
        if (np.diff(separators, prepend=0) != columns - 1).any():
            return False
        if columns == 1 and (np.diff(ends, prepend=-1) < 3).any():  # may be blank
            return False
        begin = stop
    return True


def scan(data: bytes, begin: int, names: Sequence[str], separator: str, quoted: bool) -> Scan:
    """Walk over the records from byte `begin` on; `names` are the columns that each must have."""
    grammar = _Grammar(separator, quoted, len(names))
    result = Scan(data)
    text_ok = _is_utf8(data)
    position, size = begin, len(data)
    while position < size:
        blank = grammar.blank.match(data, position)
        if blank:
            position = blank.end()
            continue
        match = grammar.record.match(data, position)
        if match is None:
            stop, fault = _diagnose(grammar, data, position, names)
            result.faults.append(fault)
        else:
            stop = match.end()
            if text_ok or _is_utf8(match.group()):
                result.starts.append(position)
                result.stops.append(stop)
            else:
                result.faults.append(_not_utf8(grammar, data, position, names))
        position = stop
    return result


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _not_utf8(grammar: _Grammar, data: bytes, start: int, names: Sequence[str]) -> Fault:
    position = start
    for name in names:
        match = grammar.value.match(data, position)
        if match is None or not _is_utf8(match.group()):
            return Fault(start, name, "the bytes are not UTF-8; save the file as UTF-8")
        position = match.end() + 1
    return Fault(start, None, "the bytes are not UTF-8; save the file as UTF-8")


def _diagnose(grammar: _Grammar, data: bytes, start: int, names: Sequence[str]) -> tuple[int, Fault]:
    """Where to go on after a bad record, and what is wrong with it."""
    position, before = start, 0
    while step := grammar.step.match(data, position):
        position, before = step.end(), before + 1
    whole = grammar.any_record.match(data, start)
    if whole is not None:
        column = names[before + 1] if before + 1 < len(names) else None
        return whole.end(), Fault(start, column, f"{before + 1} columns where {len(names)} are due")
    line = grammar.line.match(data, start)
    column = names[before] if before < len(names) else None
    reason = "a quote does not close or stands inside the value; put the value in quotes and double those inside it"
    return (line.end() if line else len(data)), Fault(start, column, reason)
