"""Histories against a loop over all events."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from funnelrec.data.histories import Histories

Event = tuple[int, int, int]
USERS, ITEMS, TIMES = 5, 6, 9
EVENTS = st.lists(st.tuples(st.integers(0, USERS - 1), st.integers(1, ITEMS), st.integers(-TIMES, TIMES)), max_size=50)


def _histories(events: list[Event]) -> Histories:
    users, items, times = (np.array([e[k] for e in events], dtype=np.int64) for k in range(3))
    return Histories.build(users, items, times, USERS)


def _every_moment() -> tuple[torch.Tensor, torch.Tensor]:
    moments = torch.cartesian_prod(torch.arange(USERS), torch.arange(-TIMES - 1, TIMES + 2))
    return moments[:, 0], moments[:, 1]


def _loop_before(events: list[Event], user: int, time: int) -> list[tuple[int, int]]:
    mine = [(t, n, i) for n, (u, i, t) in enumerate(events) if u == user and t < time]
    return [(i, t) for t, _, i in sorted(mine)]


def check_before(events: list[Event], histories: Histories, length: int) -> None:
    """The history of every user at every moment is what the loop says."""
    users, times = _every_moment()
    items, when, mask = histories.before(users, times, length)
    assert items.dtype == when.dtype == torch.int64 and items.shape == (len(users), length)
    for row, (user, time) in enumerate(zip(users.tolist(), times.tolist(), strict=True)):
        wanted = _loop_before(events, user, time)[-length:] if length else []
        pad = length - len(wanted)
        assert mask[row].tolist() == [False] * pad + [True] * len(wanted)
        assert items[row].tolist() == [0] * pad + [i for i, _ in wanted]
        assert when[row].tolist() == [0] * pad + [t for _, t in wanted]


@given(EVENTS, st.integers(0, 7))
@settings(max_examples=80, deadline=None)
def test_before_is_brute_force(events: list[Event], length: int) -> None:
    check_before(events, _histories(events), length)


@given(EVENTS)
@settings(max_examples=80, deadline=None)
def test_seen_and_contains_are_brute_force(events: list[Event]) -> None:
    histories = _histories(events)
    users, times = _every_moment()
    seen = histories.seen(users, times)
    for row, (user, time) in enumerate(zip(users.tolist(), times.tolist(), strict=True)):
        wanted = sorted({i for i, _ in _loop_before(events, user, time)})
        assert [i for i in seen[row].tolist() if i] == wanted
        asked = torch.arange(1, ITEMS + 3)
        found = histories.contains(torch.full_like(asked, user), asked, torch.full_like(asked, time))
        assert asked[found].tolist() == wanted


def plant_ties(histories: Histories) -> Histories:
    """The fault: an event sees what happens at its own moment (<= in place of <)."""
    spans: Callable[..., tuple[torch.Tensor, torch.Tensor]] = histories.spans
    histories.spans = lambda users, times: spans(users, times + 1)  # type: ignore[method-assign]
    return histories


def test_the_check_catches_a_history_that_sees_its_own_moment() -> None:
    events = [(0, 1, 3), (0, 2, 3), (0, 3, 4)]
    check_before(events, _histories(events), 3)
    with pytest.raises(AssertionError):
        check_before(events, plant_ties(_histories(events)), 3)


def test_ids_and_times_beyond_float_precision() -> None:
    late = 2**62
    histories = Histories.build(
        np.zeros(2, np.int64), np.array([2**24 + 1, 2**24 + 3]), np.array([late + 1, late]), num_users=1
    )
    items, times, _ = histories.before(torch.tensor([0]), torch.tensor([late + 1]), 1)
    assert items.item() == 2**24 + 3 and times.item() == late


def test_memory_maps(tmp_path: Path) -> None:
    events = [(1, 4, 5), (1, 2, 1), (3, 3, 3)]
    histories = _histories(events)
    maps = []
    for name in ("offsets", "items", "times"):
        np.save(tmp_path / f"{name}.npy", getattr(histories, name).numpy())
        maps.append(np.load(tmp_path / f"{name}.npy", mmap_mode="c"))
    check_before(events, Histories(*maps), 4)


def test_broken_offsets_are_named() -> None:
    with pytest.raises(ValueError, match=r"ending at 3, 2 items, 2 times"):
        Histories(np.array([0, 3]), np.zeros(2, np.int32), np.zeros(2, np.int64))
