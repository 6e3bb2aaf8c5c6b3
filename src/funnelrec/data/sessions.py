"""Sessions: a user's events with no long pause between them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["session_ids"]


def session_ids(users: npt.NDArray[np.int64], times: npt.NDArray[np.int64], gap: int = 1800) -> npt.NDArray[np.int64]:
    """The session of each event, int64 [n]: 0, 1, 2 … in the order of user, then time.

    A session ends where the same user pauses for more than `gap` seconds; a pause of exactly `gap` seconds stays
    together. The events may come in any order.
    """
    if len(users) != len(times):
        raise ValueError(f"users and times need the same length, received {len(users)} and {len(times)}")
    if gap < 0:
        raise ValueError(f"gap is a pause in seconds, at least 0, received {gap}")
    order = np.lexsort((times, users))
    user, time = users[order], times[order]
    starts = np.zeros(len(order), dtype=np.int64)
    starts[1:] = (user[1:] != user[:-1]) | (time[1:] - time[:-1] > gap)
    sessions = np.empty(len(order), dtype=np.int64)
    sessions[order] = np.cumsum(starts)
    return sessions
