"""ExactIndex against a loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from funnelrec.core.contracts import Index
from funnelrec.match.index import exact
from funnelrec.match.index.exact import ExactIndex


def world(seed: int = 0, *, items: int = 60, users: int = 25, interests: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Item vectors, queries, valid; small integers, so that products are exact and ties are many."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randint(-2, 3, (items, 4), generator=generator).float()
    queries = torch.randint(-2, 3, (users, interests, 4), generator=generator).float()
    valid = torch.rand(users, interests, generator=generator) < 0.7
    valid[0] = False
    return vectors, queries, valid


def loop(
    vectors: Tensor, queries: Tensor, valid: Tensor, k: int, exclude: Tensor, allowed: Tensor
) -> list[tuple[list[int], list[float]]]:
    """The contract, one user and one item at a time."""
    answers = []
    for user in range(len(queries)):
        scores = {
            item: max(float(q @ vectors[item]) for q in queries[user][valid[user]])
            for item in range(2, len(vectors))
            if valid[user].any() and allowed[item] and item not in exclude[user].tolist()
        }
        order = sorted(scores, key=lambda i: (-scores[i], i))[:k]
        missing = k - len(order)
        answers.append((order + [0] * missing, [scores[i] for i in order] + [-torch.inf] * missing))
    return answers


@pytest.mark.parametrize("k", [1, 7, 58, 70])
@pytest.mark.parametrize(("users", "items"), [(2**22, 2**14), (2**22, 7), (1, 2**14), (40, 13)])
def test_equals_a_loop(k: int, users: int, items: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many users and items are looked at in one go."""
    monkeypatch.setattr(exact, "SCORES_AT_ONCE", users)
    monkeypatch.setattr(exact, "ITEMS_AT_ONCE", items)
    vectors, queries, valid = world()
    generator = torch.Generator().manual_seed(1)
    exclude = torch.randint(0, 60, (25, 9), generator=generator)
    allowed = torch.rand(60, generator=generator) < 0.6
    rows, scores = ExactIndex(vectors).search(queries, valid, k, exclude, allowed)
    for user, (items, values) in enumerate(loop(vectors, queries, valid, k, exclude, allowed)):
        assert rows[user].tolist() == items
        assert scores[user].tolist() == values


def test_items_in_rising_order_of_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worst case of the bar: every item clears it."""
    monkeypatch.setattr(exact, "ITEMS_AT_ONCE", 10)
    vectors = torch.arange(60.0).unsqueeze(1)
    rows, scores = ExactIndex(vectors).search(torch.ones(2, 1, 1), torch.ones(2, 1, dtype=torch.bool), 12)
    assert rows.tolist() == [list(range(59, 47, -1))] * 2
    assert torch.equal(scores, rows.float())


def test_without_filters_every_known_item_comes_back_once() -> None:
    vectors, queries, valid = world()
    rows, _ = ExactIndex(vectors).search(queries, valid, 58)
    assert all(sorted(r) == list(range(2, 60)) for r in rows[valid.any(1)].tolist())


def test_no_users_and_the_contract() -> None:
    vectors, queries, valid = world()
    index = ExactIndex(vectors)
    assert isinstance(index, Index)
    rows, scores = index.search(queries[:0], valid[:0], 5)
    assert rows.shape == scores.shape == (0, 5)


def test_vectors_and_queries_are_left_alone() -> None:
    vectors, queries, valid = world()
    copies = vectors.clone(), queries.clone()
    ExactIndex(vectors).search(queries, valid, 5, torch.full((25, 1), 7))
    assert torch.equal(vectors, copies[0])
    assert torch.equal(queries, copies[1])


def test_messages_name_what_was_received() -> None:
    vectors, queries, valid = world()
    with pytest.raises(ValueError, match="queries are 4 wide but item vectors 3"):
        ExactIndex(vectors[:, :3]).search(queries, valid, 5)
    with pytest.raises(ValueError, match="at least one known item, received 2 rows"):
        ExactIndex(vectors[:2])
    vectors[17, 1] = torch.nan
    with pytest.raises(ValueError, match="the vector of item row 17 is not finite"):
        ExactIndex(vectors)
