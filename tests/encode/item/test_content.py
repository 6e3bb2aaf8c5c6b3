"""ContentEncoder by hand, its memory, and columns it cannot read."""

from __future__ import annotations

import math

import polars as pl
import pytest
import torch

from funnelrec.core.schema import Category, Number, Text, Vector
from funnelrec.encode.item.content import ContentEncoder

ITEMS = pl.DataFrame(
    {
        "title": ["The red oven", "red pan", "blue guitar", "old guitar song", None],
        "genres": [["k"], ["k", "h"], ["m"], ["m"], None],
        "v": [[1.0, 2.0], [1.0, 4.0], [4.0, 6.0], [6.0, 8.0], None],
    }
)
FIELDS = (Text("title"), Category("genres", many=True), Vector("v"), Number("price"))


def test_weights_by_hand() -> None:
    encoder = ContentEncoder.learn(ITEMS, FIELDS, dim=8)
    assert encoder.tokens == ["genres=k", "genres=m", "guitar", "red"]  # those of at least two items
    torch.testing.assert_close(encoder.rarity, torch.full((4,), math.log(6 / 3)))
    x = encoder.encode(ITEMS)
    assert x.shape == (5, 6) == (5, encoder.width)
    same = x[:4, :4] @ x[:4, :4].T  # all four directions are kept, so products are those of the words
    expected = torch.tensor([[1.0, 1.0, 0, 0], [1.0, 1.0, 0, 0], [0, 0, 1.0, 1.0], [0, 0, 1.0, 1.0]])
    torch.testing.assert_close(same, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(x[0, 4:] * encoder.deviation + torch.tensor([2.4, 4.0]), torch.tensor([1.0, 2.0]))
    assert not x[4].any()  # nothing is known of it


def test_rare_words_weigh_more_and_counts_count() -> None:
    items = pl.DataFrame({"title": ["a b b", "a c", "a b", "a c"]})
    encoder = ContentEncoder.learn(items, (Text("title"),), dim=8)
    assert encoder.rarity[encoder.tokens.index("a")] == 0.0  # in every item: tells nothing
    words = encoder.encode(items)
    torch.testing.assert_close(words[0], words[2])  # 2 ln(5/3) of b alone has length 1 as well
    assert float((words[0] * words[1]).sum()) == pytest.approx(0.0, abs=1e-6)


def test_the_same_after_saving() -> None:
    encoder = ContentEncoder.learn(ITEMS, FIELDS)
    again = ContentEncoder.from_members(encoder.to_members())
    assert again is not None
    assert torch.equal(again.encode(ITEMS), encoder.encode(ITEMS))
    assert again.digest == encoder.digest
    assert ContentEncoder.learn(ITEMS[:4], FIELDS).digest != encoder.digest
    assert ContentEncoder.from_members({}) is None


def test_new_items_are_read_by_what_was_learnt() -> None:
    encoder = ContentEncoder.learn(ITEMS, FIELDS, dim=8)
    new = pl.DataFrame({"title": ["Red thing", "unheard"], "genres": [None, None], "v": [None, None]})
    x = encoder.encode(new)
    assert float(x[0, :4].norm()) == pytest.approx(1.0, abs=1e-5)
    assert not x[1].any()


def test_bad_items() -> None:
    encoder = ContentEncoder.learn(ITEMS, FIELDS)
    with pytest.raises(ValueError, match="the items need the column 'v'; there are title, genres"):
        encoder.encode(ITEMS.drop("v"))
    with pytest.raises(ValueError, match="items have no content: name a Text, Category or Vector"):
        ContentEncoder.learn(ITEMS, (Number("price"),))
    with pytest.raises(ValueError, match=r"the vectors of 'v' must have one length, received \[1, 2\]"):
        ContentEncoder.learn(pl.DataFrame({"v": [[1.0], [1.0, 2.0]]}), (Vector("v"),))
