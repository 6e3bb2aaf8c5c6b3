"""Sessions against a loop."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from funnelrec.data.sessions import session_ids


def test_a_pause_of_exactly_the_gap_stays_together() -> None:
    users = np.zeros(4, np.int64)
    times = np.array([0, 1800, 3601, 3601], np.int64)
    assert session_ids(users, times).tolist() == [0, 0, 1, 1]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30)), max_size=40), st.integers(0, 6))
@settings(max_examples=150, deadline=None)
def test_sessions_are_brute_force(events: list[tuple[int, int]], gap: int) -> None:
    expected, session, before = {}, -1, None
    for user, time, i in sorted((u, t, i) for i, (u, t) in enumerate(events)):
        if before is None or before[0] != user or time - before[1] > gap:
            session += 1
        expected[i], before = session, (user, time)
    users, times = (np.array([e[k] for e in events], dtype=np.int64) for k in (0, 1))
    assert session_ids(users, times, gap).tolist() == [expected[i] for i in range(len(events))]


def test_faults_are_named() -> None:
    with pytest.raises(ValueError, match=r"received 2 and 3"):
        session_ids(np.zeros(2, np.int64), np.zeros(3, np.int64))
    with pytest.raises(ValueError, match=r"at least 0, received -1"):
        session_ids(np.zeros(2, np.int64), np.zeros(2, np.int64), -1)
