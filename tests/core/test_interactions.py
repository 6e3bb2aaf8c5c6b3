"""Distinct pairs of user and item."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from funnelrec.core.interactions import distinct_pairs

EVENT = st.tuples(st.integers(0, 5), st.integers(0, 6), st.integers(-(2**40), 2**40))


@settings(deadline=None, max_examples=80)
@given(st.lists(EVENT, max_size=30))
def test_equals_a_dictionary(events: list[tuple[int, int, int]]) -> None:
    latest: dict[tuple[int, int], int] = {}
    for user, item, time in events:
        if user >= 2 and item >= 2:
            latest[user, item] = max(time, latest.get((user, item), time))
    expected = sorted((user, time, item) for (user, item), time in latest.items())
    user, item, time = distinct_pairs(*(torch.tensor([e[c] for e in events], dtype=torch.int64) for c in range(3)))
    assert list(zip(user.tolist(), time.tolist(), item.tolist(), strict=True)) == expected


def test_takes_arrays_of_any_integer_type() -> None:
    user, item, time = distinct_pairs(np.array([3, 3], np.int32), np.array([9, 9], np.int32), np.array([5, 4]))
    assert (user.tolist(), item.tolist(), time.tolist()) == ([3], [9], [5])
    assert user.dtype == item.dtype == time.dtype == torch.int64


def test_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="need one length, received 2, 1, 1"):
        distinct_pairs(np.array([3, 3]), np.array([9]), np.array([5]))
