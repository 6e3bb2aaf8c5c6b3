"""Next-item metrics of sessions, against a loop that asks one question at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from funnelrec.core.batch import Batch
from funnelrec.core.schema import Spec
from funnelrec.data.histories import Histories
from funnelrec.evaluate.sessions import evaluate_sessions, next_item_ranks
from funnelrec.match.gru4rec import GRU4Rec

ITEMS = 20


def model() -> GRU4Rec:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = GRU4Rec(Spec(num_users=2, num_items=ITEMS), embedding_dim=8).eval()
        with torch.no_grad():
            made.items.weight.mul_(30)
    return made


def histories(sessions: list[list[int]]) -> Histories:
    owner = np.repeat(np.arange(len(sessions)), [len(s) for s in sessions])
    items = np.concatenate([np.array(s) for s in sessions])
    return Histories.build(owner, items, np.arange(len(items)), len(sessions))


def slow_ranks(made: GRU4Rec, sessions: list[list[int]]) -> list[int]:
    ranks = []
    for session in sessions:
        known = [item for item in session if 2 <= item < ITEMS]
        for end in range(1, len(known)):
            rows = torch.tensor([known[:end]])
            user = made.encode_users(Batch(history=rows, mask=rows > 0))[0][0, 0]
            scores = made.encode_items(torch.arange(2, ITEMS)) @ user
            ranks.append(int((scores >= scores[known[end] - 2]).sum()))
    return ranks


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [3, 256])
def test_equals_the_slow_loop(batch_size: int) -> None:
    draw = np.random.default_rng(1)
    sessions = [draw.integers(1, ITEMS + 3, draw.integers(1, 9)).tolist() for _ in range(25)]
    made = model()
    ranks = next_item_ranks(made, histories(sessions), ITEMS, batch_size=batch_size)
    expected = slow_ranks(made, sessions)
    assert sorted(ranks.tolist()) == sorted(expected)
    assert sorted(ranks.tolist()) != sorted(rank + 1 for rank in expected)  # the comparison would see a rank off by one
    found = evaluate_sessions(made, histories(sessions), ITEMS, ks=(3,))
    assert found["recall@3"] == pytest.approx(np.mean([rank <= 3 for rank in expected]))
    assert found["mrr@3"] == pytest.approx(np.mean([(rank <= 3) / rank for rank in expected]))


def test_equal_scores_count_against_the_model() -> None:
    made = model()
    with torch.no_grad():
        made.items.weight.fill_(0.0)
    assert next_item_ranks(made, histories([[2, 3, 4]]), ITEMS).tolist() == [ITEMS - 2] * 2


def test_nothing_to_predict() -> None:
    with pytest.raises(ValueError, match="no session has two events with known items"):
        evaluate_sessions(model(), histories([[2], [1, 3]]), ITEMS)
