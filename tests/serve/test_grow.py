"""New items without training: found by whom they fit, every other answer as before, and what cannot be added."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from funnelrec.cli.app import run
from funnelrec.core.nn.content import content_tables
from funnelrec.core.schema import Category, Number, Schema, Text
from funnelrec.data.dataset import Dataset
from funnelrec.data.tables import Tables
from funnelrec.serve.funnel import Funnel
from funnelrec.serve.grow import add_items
from funnelrec.serve.request import Request
from funnelrec.workflow import Choice, Training, learn_content, train_matcher, train_ranker
from tests.serve.funnels import small_dataset, small_funnel
from tests.serve.test_app import asker

KINDS, WORDS = ("music", "garden", "kitchen", "sport"), ("guitar song", "rose soil", "oven pan", "ball goal")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Users u0..u59 take items of one of four kinds, which title and category tell; item ids are 0..79.

    The last four of twenty items have no title, so that a category alone has been seen to tell.
    """
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(60), 15)
    items = users % 4 + 4 * rng.integers(0, 20, len(users))
    events = pl.DataFrame({"user": [f"u{u}" for u in users], "item": items, "time": rng.permutation(len(users)) * 60})
    catalogue = pl.DataFrame(
        {
            "item": np.arange(80),
            "title": [f"The {WORDS[i % 4]} number {i}" if i % 20 < 16 else None for i in range(80)],
            "kind": [KINDS[i % 4] for i in range(80)],
            "price": rng.random(80),
        }
    )
    fields = (Text("title"), Category("kind"), Number("price"))
    schema = Schema(user="user", item="item", time="time", items=fields)
    return Dataset.build(Tables(events, schema, items=catalogue), tmp_path_factory.mktemp("data") / "d")


@pytest.fixture(scope="module")
def funnel(dataset: Dataset) -> Funnel:
    content = learn_content(dataset)
    training = Training(epochs=30, max_len=10, progress=False)
    matcher, _ = train_matcher(dataset, Choice.parse("sasrec(embedding_dim=16)", "match"), training, content=content)
    ranker, _ = train_ranker(dataset, Choice.parse("din(embedding_dim=4, hidden=(8,))", "rank"), training)
    return Funnel.build(dataset, matcher=matcher, ranker=ranker, candidates=30, max_len=10, content=content)


NEW = pl.DataFrame({"item": [900, 901], "title": ["An oven with pan", None], "kind": ["kitchen", "music"]})
QUESTIONS = [Request(user=f"u{u}", k=20, filters={"kind": [KINDS[(u + 1) % 4]]}) for u in range(8)]


def test_a_new_item_is_found_by_whom_it_fits(funnel: Funnel) -> None:
    grown = add_items(funnel, NEW)
    assert content_tables(grown.matcher)[0].warm[-2:].tolist() == [False, False]

    def places(item: int) -> list[float]:
        """The median place among the candidates of the users of each kind, infinite where most do not find it."""
        found = np.full((15, 4), np.inf)
        for user in range(60):
            for shown in grown.recommend(f"u{user}", k=20).items:
                if shown.item == item:
                    found[user // 4, user % 4] = shown.match_place
        return np.median(found, axis=0).tolist()

    oven, untitled = places(900), places(901)
    assert min(oven) == oven[2] < 20, oven  # whoever takes kitchen things is the first to find it
    assert min(untitled) == untitled[0] < 20, untitled  # its category alone says that it is music
    assert grown.recommend("u2", history=[900], k=3).fallback is None  # and it may be part of a history


def test_every_other_answer_is_unchanged(funnel: Funnel) -> None:
    """The same items in the same order with the same scores; the new ones only take places among them."""
    grown = add_items(funnel, NEW)
    for before, after in zip(funnel.recommend_many(QUESTIONS), grown.recommend_many(QUESTIONS), strict=True):
        kept = [r for r in after.items if r.item < 900]
        assert [r.item for r in kept] == before.ids[: len(kept)]
        assert len(kept) >= len(before.items) - 2
        for old, new in zip(before.items, kept, strict=False):
            assert (new.score, new.match_score) == pytest.approx((old.score, old.match_score), abs=1e-5)


def test_saved_and_loaded(funnel: Funnel, tmp_path: Path) -> None:
    """Twice over, through the command line, as a table on disk."""
    folder = funnel.save(tmp_path / "shop.funnel")
    NEW.write_parquet(tmp_path / "new.parquet")
    assert run(["add-items", str(folder), str(tmp_path / "new.parquet")]) == 0
    more = pl.DataFrame({"item": [902], "title": ["A rose"], "kind": ["garden"], "price": [0.5]})
    more.write_csv(tmp_path / "more.csv")
    assert run(["add-items", str(folder), str(tmp_path / "more.csv")]) == 0
    loaded = Funnel.load(folder)
    expected = add_items(add_items(funnel, NEW), more)
    assert loaded.recommend_many(QUESTIONS) == expected.recommend_many(QUESTIONS)
    assert loaded.recommend("u1", k=3, filters={"kind": "garden"}).items
    assert loaded.store.catalogue["item"].to_list()[-3:] == [900, 901, 902]


def test_over_http_while_the_server_goes_on(funnel: Funnel, tmp_path: Path) -> None:
    """The command line adds items, the server reads the folder again: the one whose taste it is gets it at once, old
    items stay in their order with their scores, and answers that cannot hold a new item are the same to the digit."""
    folder = funnel.save(tmp_path / "shop.funnel")
    ask = asker(folder, may_reload=True)

    def answers(**more: Any) -> list[list[dict[str, Any]]]:
        asked = [{"user_id": f"u{u}", "k": 30, **more} for u in range(8)]
        return [ask("/v1/recommend", question).json()["items"] for question in asked]

    elsewhere = {"filters": {"kind": ["garden", "sport"]}}
    before, apart = answers(), answers(**elsewhere)
    assert "900" not in [item["item_id"] for items in before for item in items]
    NEW.write_parquet(tmp_path / "new.parquet")
    assert run(["add-items", str(folder), str(tmp_path / "new.parquet")]) == 0
    assert answers() == before  # the server has not been told yet
    assert ask("/v1/models/reload", verb="POST").status_code == 200
    after = answers()
    assert answers(**elsewhere) == apart
    found = [[item["item_id"] for item in items] for items in after]
    assert "900" in found[2] and "900" in found[6]  # u2 and u6 cook
    for old, new in zip(before, after, strict=True):
        kept = [item["item_id"] for item in new if item["item_id"] not in ("900", "901")]
        scores = {item["item_id"]: item["score"] for item in new}
        stayed = [item for item in old if item["item_id"] in kept]
        assert [item["item_id"] for item in stayed] == kept  # no old item is new to a list, none has moved
        assert [item["score"] for item in stayed] == pytest.approx([scores[i] for i in kept], abs=1e-5)
        assert len(kept) >= len(old) - 2  # the 30 candidates hold the two new ones now
    assert after != before  # positive control: the same comparison sees that items were added


def test_what_cannot_be_added(funnel: Funnel, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert add_items(funnel, NEW[:0]) is funnel
    with pytest.raises(ValueError, match="the item 3 is in the catalogue already"):
        add_items(funnel, pl.DataFrame({"item": [901, 3]}))
    with pytest.raises(ValueError, match="the item 901 stands twice"):
        add_items(funnel, pl.DataFrame({"item": [901, 901]}))
    with pytest.raises(ValueError, match="the catalogue has no column 'colour'; new items have the columns item"):
        add_items(funnel, pl.DataFrame({"item": [901], "colour": ["red"]}))
    with pytest.raises(ValueError, match="there is no column 'item'"):
        add_items(funnel, pl.DataFrame({"kind": ["music"]}))
    with pytest.raises(ValueError, match="1 of the new items have no id"):
        add_items(funnel, pl.DataFrame({"item": [901, None]}))
    with pytest.raises(ValueError, match="column 'price' of the new items is String"):
        add_items(funnel, pl.DataFrame({"item": [901], "price": ["dear"]}))
    plain = small_funnel(small_dataset(tmp_path / "plain"))
    folder = plain.save(tmp_path / "plain.funnel")
    pl.DataFrame({"item": [901]}).write_csv(tmp_path / "one.csv")
    assert run(["add-items", str(folder), str(tmp_path / "one.csv")]) == 2
    assert "ComiRecSA of this funnel knows items by id alone" in capfd.readouterr().err


def test_calibration_makes_cold_items_as_long_as_warm_ones(funnel: Funnel) -> None:
    table = content_tables(funnel.matcher)[0]
    rows = torch.arange(2, table.rows)
    with torch.no_grad():
        warm = table(rows).norm(dim=1).mean()
        cold = (table.of_content(rows) * table.scale).norm(dim=1).mean()
    assert float(cold) == pytest.approx(float(warm), rel=1e-4)
