"""What the counting models share: events to distinct (user, item) pairs. Times are seconds."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from funnelrec.core.shapes import FIRST_KNOWN

__all__ = ["DAY", "Events", "distinct_pairs"]

DAY = 86_400  #: seconds
Events = Int[Tensor, "_"] | Int[np.ndarray, "_"]  # one length, but the message about it is ours


def distinct_pairs(users: Events, items: Events, times: Events) -> tuple[Tensor, Tensor, Tensor]:
    """Each (user, item) once, with its latest time, ordered by user and then time; int64 [m] each.

    Events of padding or unknown users and items (rows 0 and 1) do not count.
    """
    user, item, time = (torch.as_tensor(x).to(torch.int64) for x in (users, items, times))
    if not len(user) == len(item) == len(time):
        raise ValueError(f"users, items and times need one length, received {len(user)}, {len(item)}, {len(time)}")
    known = (user >= FIRST_KNOWN) & (item >= FIRST_KNOWN)
    user, item, time = user[known], item[known], time[known]
    if not len(user):
        return user, item, time
    width = item.max() + 1
    keys, pair = (user * width + item).unique(return_inverse=True)  # type: ignore[no-untyped-call]
    latest = torch.full_like(keys, torch.iinfo(torch.int64).min).scatter_reduce(0, pair, time, "amax")
    user, item = keys // width, keys % width
    order = latest.argsort(stable=True)
    order = order[user[order].argsort(stable=True)]
    return user[order], item[order], latest[order]
