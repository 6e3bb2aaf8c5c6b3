from __future__ import annotations

import pytest
import torch

from funnelrec.core.batch import Batch
from funnelrec.core.nn.items import any_known, closest_interest, item_table, newest_items
from funnelrec.core.schema import Spec


def test_an_item_table_starts_with_nothing_at_padding_and_at_the_unknown() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        table = item_table(Spec(num_items=4000), 8, std=0.5, owner="X")
    assert not table.weight[:2].any()
    assert float(table.weight[2:].detach().std()) == pytest.approx(0.5, rel=0.02)
    with pytest.raises(ValueError, match="X needs a catalogue; the spec has 2 item rows"):
        item_table(Spec(num_items=2), 8, std=0.5, owner="X")


def test_the_newest_items_are_cut_from_the_right_and_padding_is_never_real() -> None:
    history = torch.tensor([[0, 3, 4, 5], [0, 0, 0, 1]])
    batch = Batch(history=history, mask=torch.tensor([[True, True, True, True], [False, False, False, True]]))
    items, real = newest_items(batch, 3)
    assert items.tolist() == [[3, 4, 5], [0, 0, 1]]
    assert real.tolist() == [[True, True, True], [False, False, True]]
    items, real = newest_items(batch, 9)
    assert real[0].tolist() == [False, True, True, True]  # row 0 is padding whatever the mask says
    assert any_known(items, real).tolist() == [True, False]
    assert any_known(items, torch.zeros_like(real)).tolist() == [False, False]


def test_the_closest_interest_alone_is_trained() -> None:
    interests = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [9.0, 9.0]]], requires_grad=True)
    valid = torch.tensor([[True, True, False]])
    chosen = closest_interest(interests, valid, torch.tensor([[1.0, 1.0]]))
    assert chosen.tolist() == [[0.0, 2.0]]  # products 1, 2 and 18, but the last is no interest
    chosen.sum().backward()
    assert interests.grad is not None
    assert interests.grad.tolist() == [[[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]]
