"""Features: the one gather of training and serving."""

from __future__ import annotations

import pytest
import torch

from funnelrec.core.schema import CategorySpec, NumberSpec, Spec
from funnelrec.data.features import Features

SPEC = Spec(
    categories=(
        CategorySpec("who", "user", 4, 1, 0, 1),
        CategorySpec("what", "item", 4, 4, 1, 2),
        CategorySpec("tags", "item", 5, 7, 2, 4),
        CategorySpec("device", "context", 3, 11, 4, 5),
    ),
    numbers=(NumberSpec("age", "user", 0, 1), NumberSpec("price", "item", 1, 2), NumberSpec("hour", "context", 2, 3)),
    num_users=4,
    num_items=4,
)


def _features() -> Features:
    return Features(
        SPEC,
        user_ids=torch.tensor([[0], [1], [2], [3]], dtype=torch.int32),
        user_numbers=torch.tensor([[0.0], [0.0], [0.2], [0.3]]),
        item_ids=torch.tensor([[0, 0, 0], [4, 7, 0], [5, 8, 9], [6, 10, 0]], dtype=torch.int32),
        item_numbers=torch.tensor([[0.0], [0.0], [20.0], [30.0]]),
    )


def test_columns_stand_in_the_order_of_the_spec() -> None:
    out = _features().gather(
        torch.tensor([2, 3]),
        torch.tensor([3, 2]),
        torch.tensor([[11], [12]], dtype=torch.int32),
        torch.tensor([[0.5], [0.6]]),
    )
    assert out["ids"].tolist() == [[2, 6, 10, 0, 11], [3, 5, 8, 9, 12]] and out["ids"].dtype == torch.int32
    assert torch.equal(out["numbers"], torch.tensor([[0.2, 30.0, 0.5], [0.3, 20.0, 0.6]]))


def test_what_is_not_given_is_unknown() -> None:
    out = _features().gather(None, torch.tensor([2]))
    assert out["ids"].tolist() == [[1, 5, 8, 9, 0]]
    assert out["numbers"].tolist() == [[0.0, 20.0, 0.0]]
    out = _features().gather(torch.tensor([2]), None)
    assert out["ids"].tolist() == [[2, 4, 7, 0, 0]]


def test_history_ids_are_the_item_columns() -> None:
    out = _features().history_ids(torch.tensor([[0, 2]]))
    assert out.tolist() == [[[0, 0, 0], [5, 8, 9]]]


def test_a_batch_of_one_equals_its_row_of_many() -> None:
    features = _features()
    users, items = torch.tensor([2, 3, 1]), torch.tensor([1, 2, 3])
    many = features.gather(users, items)
    one = features.gather(users[1:2], items[1:2])
    assert torch.equal(one["ids"][0], many["ids"][1]) and torch.equal(one["numbers"][0], many["numbers"][1])


def test_faults_are_named() -> None:
    with pytest.raises(ValueError, match=r"nothing to gather"):
        _features().gather(None, None)
    with pytest.raises(ValueError, match=r"item_ids needs the 3 columns of the spec, received 1"):
        Features(SPEC, *(torch.zeros((4, 1), dtype=d) for d in (torch.int32, torch.float32) * 2))
