"""Frappe: which app was used in which context, with sampled negatives, in the published split.

Origin: Baltrunas, Church, Karatzoglou, Oliver. "Frappe", 2015, arXiv:1505.03014; this form (libfm files, two negatives
        a positive, 7:2:1) was published with neural factorisation machines (He, Chua, SIGIR 2017).
Terms:  research use with citation; no redistribution, no commercial use.
Files:  frappe.train.libfm, frappe.validation.libfm, frappe.test.libfm: "1 266:1 1244:1 ...", the label (1 or -1) and
        ten features. frappe.train.REBUILT.libfm serves where the published training file is missing. No checksum is
        known; every row is checked for its form.

Plain rows: ten context fields, whose values are the feature numbers of the files; label 1 or 0; no user, item, time.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from funnelrec.core.schema import Category, Schema
from funnelrec.data.ingest import read_delimited
from funnelrec.data.sources._files import read_first
from funnelrec.data.tables import Accounting, Tables

__all__ = ["load"]

FIELDS = ("user", "item", "daytime", "weekday", "isweekend", "homework", "cost", "weather", "country", "city")
PARTS = (
    ("frappe.train.libfm", "frappe.train.REBUILT.libfm"),
    ("frappe.validation.libfm",),
    ("frappe.test.libfm",),
)


def load(path: Path | str | None = None, *, max_bad_rows: int = 0) -> Tables:
    """Read the three libfm files from the folder `path` (plain or .gz); `part` holds the published split.

    Raises ValueError without a path (the data set has no address that may be fetched from), for a missing file and
    for rows that are bad.
    """
    if path is None:
        raise ValueError("frappe is not downloaded; pass the folder of its libfm files")
    frames: list[pl.DataFrame] = []
    accounting: list[Accounting] = []
    for names in PARTS:
        name, data = read_first(Path(path), names)
        frame, account = _read(data, name, max_bad_rows)
        frames.append(frame)
        accounting.append(account)
    part = np.repeat(np.arange(3, dtype=np.uint8), [f.height for f in frames])
    schema = Schema(label="label", context=tuple(Category(f) for f in FIELDS))
    return Tables(events=pl.concat(frames), schema=schema, part=part, accounting=tuple(accounting), name="frappe")


def _read(data: bytes, name: str, max_bad_rows: int) -> tuple[pl.DataFrame, Accounting]:
    # Every value is 1, so ":1" at a feature's end carries nothing; any other value stays and fails below.
    plain = data.replace(b"\r\n", b"\n").replace(b":1 ", b" ").replace(b":1\n", b"\n")
    plain = plain.removesuffix(b":1")
    frame, account = read_delimited(
        plain,
        file=name,
        separator=" ",
        names=["label", *FIELDS],
        quoted=False,
        columns={"label": "label", **dict.fromkeys(FIELDS, "id")},
        max_bad_rows=max_bad_rows,
    )
    text = [f for f in FIELDS if frame[f].dtype != pl.Int64]
    if text:
        raise ValueError(f"{name}: the field '{text[0]}' holds something else than 'feature:1'; this is no frappe file")
    return frame.with_columns(label=(pl.col("label") > 0).cast(pl.Float64)), account
