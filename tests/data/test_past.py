"""Numbers from the past: counted by hand, strictly before the moment, for drawn negatives too."""

from __future__ import annotations

from pathlib import Path

import jaxtyping
import numpy as np
import polars as pl
import pytest
import torch

from funnelrec.core.schema import Category, Past, Schema
from funnelrec.data.batches import counter_generator
from funnelrec.data.dataset import Dataset
from funnelrec.data.examples import Impressions
from funnelrec.data.past import NEVER, PastEvents
from funnelrec.data.split import GlobalTime, LeaveLastOut, Ratio
from funnelrec.data.tables import Tables

FIELDS = (
    Past("since_brand", "brand"),
    Past("clicks_brand", "brand", "count", transform="standard"),
    Past("shown_item", "item", "count", shown=True, transform="quantile"),
    Past("since_shown", "item", shown=True, transform="log"),
)
GROUPS = {"item": np.arange(6), "brand": np.array([0, 1, 2, 2, 3, 1])}  # item 5 has an unknown brand
#        person, item, time, positive
EVENTS = ((7, 2, 10, 1), (7, 3, 20, 0), (7, 3, 30, 1), (7, 4, 30, 0), (7, 5, 35, 1), (8, 2, 5, 1), (7, 2, 40, 1))


def past() -> PastEvents:
    person, item, time, positive = (np.array(c, dtype=np.int64) for c in zip(*EVENTS, strict=True))
    return PastEvents(FIELDS, person, item, time, positive.astype(bool), lambda column: GROUPS[column])


@pytest.mark.parametrize(
    ("person", "item", "time", "expected"),
    [
        (7, 2, 10, (np.nan, 0, 0, np.nan)),  # the moment itself is not the past
        (7, 3, 11, (1, 1, 0, np.nan)),  # the brand was clicked at 10
        (7, 3, 30, (20, 1, 1, 10)),  # shown at 20, but not clicked; the click at 30 is not before 30
        (7, 3, 31, (1, 2, 2, 1)),
        (7, 4, 99, (np.nan, 0, 1, 69)),  # shown, never clicked
        (7, 5, 99, (np.nan, 0, 1, 64)),  # items of unknown brand have nothing in common
        (7, 2, 41, (1, 3, 2, 1)),
        (8, 2, 41, (36, 1, 1, 36)),  # another person
        (9, 2, 41, (np.nan, 0, 0, np.nan)),
        (7, 1, 41, (np.nan, 0, 0, np.nan)),  # an unknown item
    ],
)
def test_by_hand(person: int, item: int, time: int, expected: tuple[float, ...]) -> None:
    row = past().raw(*(torch.tensor([v]) for v in (person, item, time)))[0]
    np.testing.assert_array_equal(row, expected)


def test_never_is_longer_than_ever() -> None:
    events = past()
    transforms = events.fit(*(np.array(c, dtype=np.int64) for c in list(zip(*EVENTS, strict=True))[:3]))
    known = list(transforms["since_brand"].knots)
    assert min(known) == 10  # at 40, after the click at 30
    assert max(known) == 20  # what never was is not learnt from
    three, one = (events.numbers(*(torch.tensor([v]) for v in (p, 2, 41)), transforms)[0] for p in (9, 8))
    assert three[:3].tolist() == [1, 1, 1]  # x, x² and √x of the longest time
    assert one[:3].tolist() == [1, 1, 1]  # 36 s: longer than all in training, too
    assert three.shape == (3 + 1 + 1 + 1,)
    assert NEVER > 1e8


def test_nobody_did_anything() -> None:
    nothing = np.zeros(0, dtype=np.int64)
    empty = PastEvents(FIELDS, nothing, nothing, nothing, nothing.astype(bool), lambda column: GROUPS[column])
    row = empty.raw(*(torch.tensor([v]) for v in (7, 2, 10)))[0]
    np.testing.assert_array_equal(row, (np.nan, 0, 0, np.nan))


# ------------------------------------------------------------------------------------------------ inside a dataset
def log(n: int = 400, seed: int = 0) -> Tables:
    rng = np.random.default_rng(seed)
    events = pl.DataFrame(
        {
            "user": rng.integers(1, 9, n),
            "item": rng.integers(1, 21, n),
            "time": np.sort(rng.integers(0, n, n)) * 60 + 10**9,
            "click": rng.integers(0, 2, n),
            "hour": rng.integers(0, 24, n),
        }
    )
    items = pl.DataFrame({"item": np.arange(1, 21), "brand": [f"b{i % 4}" if i > 2 else None for i in range(1, 21)]})
    schema = Schema(
        user="user", item="item", time="time", label="click", context=(Category("hour"),), items=(Category("brand"),),
        past=FIELDS,
    )  # fmt: skip
    return Tables(events, schema, items=items)


def slowly(tables: Tables, user: int, item: int, time: int, rows: pl.DataFrame) -> list[float]:
    """The four numbers of FIELDS, by filters over the raw table."""
    assert tables.items is not None
    brands = dict(tables.items.iter_rows())
    mine = rows.filter((pl.col("user") == user) & (pl.col("time") < time))
    alike = [brands[i] == brands[item] and brands[i] is not None for i in mine["item"]]
    clicked = mine.filter(pl.Series(alike, dtype=pl.Boolean) & (pl.col("click") == 1))
    shown = mine.filter(pl.col("item") == item)
    since = [time - int(frame["time"].max()) if frame.height else np.nan for frame in (clicked, shown)]  # type: ignore[arg-type]
    return [since[0], clicked.height, shown.height, since[1]]


@pytest.mark.parametrize("split", [GlobalTime(), Ratio(seed=3)])
def test_batches_hold_what_a_slow_count_says(tmp_path: Path, split: GlobalTime | Ratio) -> None:
    tables = log()
    data = Dataset.build(tables, tmp_path / "data", split=split)
    seen = tables.events if isinstance(split, GlobalTime) else tables.events[data.rows("train")]
    for part, negatives in (("train", 0), ("test", 0), ("test", 2)):
        examples = Impressions(data, part, negatives=negatives, max_len=3)  # type: ignore[arg-type]
        batch = examples.gather(torch.arange(len(examples)), counter_generator(1))
        users = data.people.decode(batch.person.numpy())
        items = data.item_vocabulary.decode(batch.item.numpy())
        raw = np.array(
            [slowly(tables, *row, seen) for row in zip(users, items, batch.time.tolist(), strict=True)], dtype=float
        )
        parts = [
            data.transforms[f.name].apply(np.nan_to_num(raw[:, n], nan=NEVER)) for n, f in enumerate(data.schema.past)
        ]
        np.testing.assert_array_equal(batch.numbers.numpy(), np.concatenate(parts, axis=1))
    names = [(n.name, n.stop - n.start) for n in data.spec.numbers]
    assert names == [("since_brand", 3), ("clicks_brand", 1), ("shown_item", 1), ("since_shown", 1)]


def test_transforms_know_the_training_part_alone(tmp_path: Path) -> None:
    tables = log()
    data = Dataset.build(tables, tmp_path / "data", split=GlobalTime())
    assert data.boundaries is not None
    early = tables.events.filter(pl.col("time") < data.boundaries[0])
    counts = [slowly(tables, *row, early)[1] for row in early.select("user", "item", "time").iter_rows()]
    assert data.transforms["clicks_brand"].mean == pytest.approx(np.mean(counts))
    assert data.transforms["clicks_brand"].std == pytest.approx(np.std(counts))


def test_opens_again_as_it_was(tmp_path: Path) -> None:
    data = Dataset.build(log(), tmp_path / "data")
    again = Dataset.open(tmp_path / "data")
    assert again.schema == data.schema
    examples = [Impressions(d, "test") for d in (data, again)]
    one, other = (e.gather(torch.arange(len(e))).numbers for e in examples)
    assert torch.equal(one, other)
    assert one.any()


def test_steps_stand_for_seconds_where_moments_are_ordinals(tmp_path: Path) -> None:
    data = Dataset.build(log(), tmp_path / "data", split=LeaveLastOut())
    raw = data.past.raw(*(torch.from_numpy(a) for a in (data.events.person, data.events.item, data.events.moment)))
    assert np.nanmax(raw[:, 3]) < 100  # steps of a person with some 50 events


def test_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # else the hook refuses a wrong word first
    with pytest.raises(ValueError, match="what of 'x' must be since or count, received 'often'"):
        Past("x", "item", "often")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="transform of 'x' must be one of"):
        Past("x", "item", transform="cube")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'x' is of the past: it needs the columns 'user', 'item' and 'time'"):
        Schema(user="u", item="i", past=(Past("x", "i"),))
    with pytest.raises(ValueError, match=r"'x' is of 'tags', which is neither .*; there are i, brand"):
        items = (Category("tags", many=True), Category("brand"))
        Schema(user="u", item="i", time="t", items=items, past=(Past("x", "tags"),))
    with pytest.raises(ValueError, match="column 'brand' is named twice"):
        Schema(user="u", item="i", time="t", items=(Category("brand"),), past=(Past("brand", "i"),))


def test_schema_in_json() -> None:
    schema = log().schema
    assert Schema.from_dict(schema.to_dict()) == schema
    assert "past" not in Schema(user="u", item="i").to_dict()  # older datasets keep their fingerprint
    assert "since_brand  since positive, same brand" in schema.describe()
    with pytest.raises(ValueError, match="Past does not know the key 'off'"):
        Schema.from_dict({"user": "u", "item": "i", "time": "t", "past": [{"name": "x", "off": "i"}]})
