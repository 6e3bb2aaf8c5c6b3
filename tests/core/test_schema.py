"""Schema: strictness, JSON, what `infer` guesses and what `describe` says."""

from __future__ import annotations

import json
from datetime import datetime

import polars as pl
import pytest

from funnelrec.core.schema import Category, CategorySpec, Image, Number, NumberSpec, Schema, Spec, Text, Vector

FULL = Schema(
    user="u",
    item="i",
    time="t",
    label="r",
    weight="w",
    click=4,
    context=(Category("device"), Number("price", "log")),
    users=(Category("city", min_count=2), Category("agent", hash_buckets=10)),
    items=(Text("title"), Image("poster"), Vector("v"), Category("genres", many=True, max_values=3)),
)


def test_schema_json_round_trip() -> None:
    assert Schema.from_dict(json.loads(json.dumps(FULL.to_dict()))) == FULL


def test_spec_json_round_trip() -> None:
    spec = Spec(
        categories=(CategorySpec("u", "user", 5, 1, 0, 1), CategorySpec("g", "item", 4, 5, 1, 4)),
        numbers=(NumberSpec("p", "item", 0, 3),),
        num_users=5,
        num_items=7,
    )
    assert Spec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert (spec.table_rows, spec.num_ids, spec.num_numbers, spec.num_fields) == (8, 4, 3, 2)
    assert spec.item_ids == slice(1, 4)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"usr": "u"}, "Schema does not know the key 'usr'; it knows user, item"),
        ({"context": [{"kind": "category", "name": "c", "mny": True}]}, "Category does not know the key 'mny'"),
        ({"context": [{"kind": "categry", "name": "c"}]}, "kind must be one of category.*received 'categry'"),
    ],
)
def test_unknown_keys_are_errors(data: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schema.from_dict(data)


def test_a_column_has_one_meaning() -> None:
    with pytest.raises(ValueError, match="'a' is named twice"):
        Schema(user="a", item="a")
    with pytest.raises(ValueError, match="both user and item or neither, received user=a item=None"):
        Schema(user="a")
    with pytest.raises(ValueError, match="need the columns 'user' and 'item'"):
        Schema(items=(Text("title"),))


def test_infer_ratings_with_side_tables() -> None:
    events = pl.DataFrame(
        {
            "userId": [1, 2, 3],
            "movieId": [7, 8, 9],
            "rating": [5.0, 3.5, 1.0],
            "timestamp": [978300760, 978300761, 978300762],
            "device": ["phone", "web", "web"],
            "price": [1.5, 2.5, 3.5],
            "session": [1, 1, 1],
        }
    )
    users = pl.DataFrame({"userId": [1, 2, 3], "zip": ["02139", "10001", "94107"], "income": range(100, 103)})
    items = pl.DataFrame(
        {
            "movieId": [7, 8, 9, 10],
            "title": ["Heat", "Big", "Alien", "Up"],
            "genres": ["A|B", "B", "A|B", "A"],
            "poster": ["7.jpg", "8.jpg", "9.jpg", "10.png"],
            "vector": [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6], [0.7, 0.8]],
            "tags": [["x"], ["x", "y"], [], ["z"]],
            "plot": ["a man meets another man"] * 2 + ["a ship finds an egg"] * 2,
            "added": [datetime(2020, 1, 1)] * 4,
        }
    )
    schema = Schema.infer(events, users, items)
    assert schema == Schema(
        user="userId",
        item="movieId",
        time="timestamp",
        label="rating",
        click=4.0,
        context=(Category("device"), Number("price")),
        users=(Category("zip"), Category("income")),
        items=(
            Text("title"),
            Category("genres", many=True),
            Image("poster"),
            Vector("vector"),
            Category("tags", many=True),
            Text("plot"),
        ),
    )


def test_infer_many_valued_integers_are_numbers_unless_named_as_ids() -> None:
    events = pl.DataFrame(
        {"click": [0, 1] * 50, "age": range(100), "campaign_id": range(100), "day": ["2024-01-02"] * 100}
    )
    schema = Schema.infer(events)
    assert schema.is_rows
    assert schema.label == "click"
    assert schema.click is None
    assert schema.context == (Number("age"), Category("campaign_id"))


@pytest.mark.parametrize(
    ("labels", "click"), [([0, 1], None), ([0.0, 0.5], None), ([1, 5], 4.0), ([1, 10], 8.0), ([-1, 1], 0.5)]
)
def test_infer_click(labels: list[float], click: float | None) -> None:
    assert Schema.infer(pl.DataFrame({"label": labels, "x": ["a", "b"]})).click == click


def test_infer_sees_through_a_few_bad_rows() -> None:
    rating = ["5"] * 19 + ["five"]
    time = ["2024-01-01 10:00:00"] * 19 + ["yesterday"]
    schema = Schema.infer(pl.DataFrame({"user": range(20), "item": range(20), "rating": rating, "date": time}))
    assert (schema.label, schema.time, schema.context) == ("rating", "date", ())


def test_infer_key_shared_with_the_side_table() -> None:
    events = pl.DataFrame({"who": [1, 2], "what": [3, 4], "item": ["a", "b"]})
    schema = Schema.infer(events, users=pl.DataFrame({"who": [1]}), items=pl.DataFrame({"what": [3]}))
    assert (schema.user, schema.item) == ("who", "what")


def test_infer_refuses_half_a_schema() -> None:
    with pytest.raises(ValueError, match="no column of items was recognised beside 'user' among user, thing"):
        Schema.infer(pl.DataFrame({"user": [1], "thing": [2]}))
    with pytest.raises(ValueError, match="the items table shares no key column"):
        Schema.infer(pl.DataFrame({"a": [1]}), items=pl.DataFrame({"b": [2]}))


def test_describe() -> None:
    assert FULL.describe().splitlines() == [
        "events (one event a row: who, what)",
        "  user     u",
        "  item     i",
        "  time     t",
        "  label    r",
        "  weight   w",
        "  positive r >= 0.5",
        "  click    r >= 4",
        "context of an event",
        "  device  Category",
        "  price  Number(transform='log')",
        "users",
        "  city  Category(min_count=2)",
        "  agent  Category(hash_buckets=10)",
        "items",
        "  title  Text",
        "  poster  Image",
        "  v  Vector",
        "  genres  Category(many=True, max_values=3)",
    ]
    assert "plain rows" in Schema(label="y").describe()
