"""Popularity: counts, half-life, exclusions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from funnelrec.core.batch import Batch
from funnelrec.core.schema import Spec
from funnelrec.match.popularity import Popularity

SPEC = Spec(num_users=9, num_items=8)
DAY = 86_400
# user, item, day; user 2 takes item 5 three times
EVENTS = [
    (2, 5, 0),
    (2, 5, 1),
    (2, 5, 1),
    (3, 4, 2),
    (4, 4, 3),
    (5, 4, 1),
    (3, 6, 10),
    (4, 6, 10),
    (1, 7, 9),
    (3, 1, 9),
]


def columns() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    user, item, day = np.array(EVENTS).T
    return user, item, day * DAY


def users(count: int) -> Batch:
    return Batch(user=torch.arange(count))


def test_counts_users_not_events() -> None:
    model = Popularity(SPEC).fit(*columns())
    assert model.scores.tolist() == [0, 0, 0, 0, 3, 1, 2, 0]
    rows, scores = model.recommend(users(2), 4)
    assert rows.tolist() == [[4, 6, 5, 2]] * 2  # items that nobody took follow by row
    assert scores.tolist() == [[3, 2, 1, 0]] * 2


def test_a_half_life_prefers_what_is_recent() -> None:
    model = Popularity(SPEC, half_life=1.0).fit(*columns())
    expected = [0, 0, 0, 0, 2.0**-8 + 2.0**-7 + 2.0**-9, 2.0**-9, 2, 0]
    torch.testing.assert_close(model.scores, torch.tensor(expected))
    assert model.recommend(users(1), 1)[0].tolist() == [[6]]


def test_exclusions_and_filters() -> None:
    model = Popularity(SPEC).fit(*columns())
    exclude = torch.tensor([[4, 5, 0], [6, 6, 0], [0, 0, 0]])
    assert model.recommend(users(3), 2, exclude)[0].tolist() == [[6, 2], [4, 5], [4, 6]]
    allowed = torch.tensor([True, True, False, False, True, True, False, False])
    rows, scores = model.recommend(users(3), 3, exclude, allowed)
    assert rows.tolist() == [[0, 0, 0], [4, 5, 0], [4, 5, 0]]
    assert scores[0].tolist() == [-torch.inf] * 3
    assert model.recommend(users(1), 9)[0].tolist() == [[4, 6, 5, 2, 3, 7, 0, 0, 0]]


def test_equals_a_full_sort() -> None:
    generator = torch.Generator().manual_seed(0)
    model = Popularity(Spec(num_items=60))
    model.scores = torch.randint(0, 9, (60,), generator=generator).float()
    exclude = torch.randint(0, 60, (20, 12), generator=generator)
    rows, scores = model.recommend(users(20), 10, exclude)
    for row in range(20):
        order = sorted(set(range(2, 60)) - set(exclude[row].tolist()), key=lambda i: (-model.scores[i], i))
        assert rows[row].tolist() == order[:10]
        assert torch.equal(scores[row], model.scores[rows[row]])


def test_messages_name_what_was_received() -> None:
    with pytest.raises(ValueError, match="half_life must be above 0 days or None, received 0"):
        Popularity(SPEC, half_life=0.0)
