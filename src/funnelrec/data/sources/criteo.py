"""Criteo display advertising: was the ad clicked; 13 numbers, 26 hashed categories, nothing named.

Origin: Criteo Labs, Display Advertising Challenge 2014.
Terms:  research use under Criteo's terms; no redistribution.
Files:  train.txt, 45.8 M rows, without header: label, I1..I13, C1..C26, separated by tabs; empty is missing. Rows are
        in the order of time, but no time is given. No checksum is known; every row is checked for its form.
"""

from __future__ import annotations

from pathlib import Path

from funnelrec.core.schema import Category, Number, Schema, Transform
from funnelrec.data.ingest import read_delimited
from funnelrec.data.sources._files import read_first
from funnelrec.data.tables import Tables

__all__ = ["load"]

NUMBERS = tuple(f"I{i}" for i in range(1, 14))
TRANSFORM_OF: dict[str, Transform] = {"log": "log", "quantile": "quantile"}
CATEGORIES = tuple(f"C{i}" for i in range(1, 27))


def load(
    path: Path | str | None = None,
    *,
    numbers: str = "log",
    min_count: int = 1,
    max_bad_rows: int = 0,
) -> Tables:
    """Read a file of labelled rows, or `train.txt` (also .gz) in a folder. Rows stay in file order.

    `numbers`: the transform of I1..I13. `min_count`: categories rarer than this in training share the unknown row.
    Raises ValueError without a path, for a missing file and for rows that are bad.
    """
    if path is None:
        raise ValueError("criteo is not downloaded; pass the path of its train.txt")
    transform = TRANSFORM_OF.get(numbers)
    if transform is None:
        raise ValueError(f"numbers must be 'log' or 'quantile', received {numbers!r}")
    home = Path(path)
    if home.is_dir():
        name, data = read_first(home, ["train.txt"])
    else:
        name, data = read_first(home.parent, [home.name.removesuffix(".gz")])
    kinds: dict[str, str] = {"label": "label"}
    kinds |= dict.fromkeys(NUMBERS, "number")
    kinds |= dict.fromkeys(CATEGORIES, "text")  # hexadecimal: 00000012 and 12 are two values
    events, account = read_delimited(
        data, file=name, separator="\t", names=list(kinds), quoted=False, columns=kinds, max_bad_rows=max_bad_rows
    )
    schema = Schema(
        label="label",
        context=(
            *(Number(n, transform=transform) for n in NUMBERS),
            *(Category(c, min_count=min_count) for c in CATEGORIES),
        ),
    )
    return Tables(events=events, schema=schema, accounting=(account,), name="criteo")
