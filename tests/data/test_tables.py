"""Tables: a schema that does not fit its tables is refused at once."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from funnelrec.core.schema import Category, Schema, Text
from funnelrec.data.tables import Reject, Tables

EVENTS = pl.DataFrame({"user": [1], "item": [2], "device": ["web"]})
ITEMS = pl.DataFrame({"item": [2], "title": ["Heat"]})


def test_tables_that_fit() -> None:
    schema = Schema(user="user", item="item", context=(Category("device"),), items=(Text("title"),))
    tables = Tables(events=EVENTS, schema=schema, items=ITEMS, part=np.zeros(1, dtype=np.uint8))
    assert tables.name == "csv"


def test_tables_that_do_not_fit() -> None:
    who = Schema(user="user", item="item")
    with pytest.raises(ValueError, match=r"the events table has no column 'time' .* it has user, item, device"):
        Tables(events=EVENTS, schema=Schema(user="user", item="item", time="time"))
    with pytest.raises(ValueError, match="the items table has no column 'year'"):
        Tables(events=EVENTS, items=ITEMS, schema=Schema(user="user", item="item", items=(Text("year"),)))
    with pytest.raises(ValueError, match="names the field 'title' of items, but there is no items table"):
        Tables(events=EVENTS, schema=Schema(user="user", item="item", items=(Text("title"),)))
    with pytest.raises(ValueError, match="a table of items needs a schema with 'user' and 'item'"):
        Tables(events=EVENTS, items=ITEMS, schema=Schema(context=(Category("device"),)))
    with pytest.raises(ValueError, match="'part' needs"):
        Tables(events=EVENTS, schema=who, part=np.zeros(2, dtype=np.uint8))


def test_a_reject_reads_well() -> None:
    assert str(Reject("e.csv", 3, "rating", "'x' is no number")) == "e.csv:3: column 'rating': 'x' is no number"
    assert str(Reject("e.csv", 3, None, "7 columns where 6 are due")) == "e.csv:3: 7 columns where 6 are due"
