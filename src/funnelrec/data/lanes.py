"""Session-parallel mini-batches: many sessions side by side, one event of each a step (Hidasi et al. 2016, Figure 1).

Each of B lanes walks along one session. Where it ends, the next session in the order of time takes the lane, and the
batch says so (`fresh`), because a state must not be carried from one session into another. When no session is left, a
lane closes and the batch shrinks. An epoch is the same every time: recent sessions come last on purpose.
"""

from __future__ import annotations

import heapq
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int
from torch import Tensor

from funnelrec.core.batch import Batch
from funnelrec.data.histories import Histories

__all__ = ["SessionParallel"]


@runtime_checkable
class Trained(Protocol):
    """What has sessions to train on; `data.dataset.Dataset` is one."""

    @property
    def train_histories(self) -> Histories: ...


class SessionParallel:
    """The steps of an epoch as examples: `Batches(SessionParallel(dataset, 64), 1)` is what `fit` takes.

    A session is all that one user did in the training part. A step holds, for each of b <= `lanes` open lanes in
    ascending order: history int64 [b, 1], the item seen; mask bool [b, 1]; target int64 [b], the item after it; lane
    int64 [b]; fresh bool [b], whether the session starts here. Steps of fewer than `least` lanes are left out: without
    sampled negatives a lane needs others to lose against.
    """

    def __init__(self, dataset: Trained, lanes: int, *, least: int = 1) -> None:
        if lanes < 1 or not 1 <= least <= lanes:
            raise ValueError(f"lanes must be at least 1 and least between 1 and lanes, received {lanes} and {least}")
        self.dataset = dataset
        self.lanes = lanes
        train = dataset.train_histories
        offsets, times = train.offsets.numpy(), train.times.numpy()
        sessions = np.flatnonzero(np.diff(offsets) > 1)  # one event alone teaches nothing
        sessions = sessions[np.argsort(times[offsets[sessions]], kind="stable")]
        steps = offsets[sessions + 1] - offsets[sessions] - 1
        lane, begin = _schedule(steps, lanes)

        owner = np.repeat(np.arange(len(sessions)), steps)
        nth = np.arange(len(owner)) - np.repeat(steps.cumsum() - steps, steps)  # step within its session
        order = np.lexsort((lane[owner], begin[owner] + nth))
        slot = torch.from_numpy((offsets[sessions][owner] + nth)[order])
        self.item, self.target = train.items[slot].long(), train.items[slot + 1].long()
        self.lane, self.fresh = torch.from_numpy(lane[owner][order]), torch.from_numpy((nth == 0)[order])
        width = np.bincount(begin[owner] + nth)  # lanes that are open at each step: it never grows
        self._offsets: list[int] = [0, *width[width >= least].cumsum().tolist()]

    def __len__(self) -> int:
        """Steps of an epoch."""
        return len(self._offsets) - 1

    @property
    def num_events(self) -> int:
        """Pairs of an item and the next one in an epoch."""
        return self._offsets[-1]

    def gather(self, index: Int[Tensor, "S"], generator: torch.Generator | None = None) -> Batch:
        """The step `index`; nothing is drawn."""
        if len(index) != 1:
            raise ValueError(
                f"steps follow one another, so a batch is one step; use batch_size=1, received {len(index)}"
            )
        at = slice(self._offsets[int(index)], self._offsets[int(index) + 1])
        item = self.item[at].unsqueeze(1)
        return Batch(history=item, mask=item > 0, target=self.target[at], lane=self.lane[at], fresh=self.fresh[at])


_Numbers = npt.NDArray[np.int64]


def _schedule(steps: _Numbers, lanes: int) -> tuple[_Numbers, _Numbers]:
    """The lane and the first step of each session: whichever lane is free first takes the next one."""
    free = [(0, lane) for lane in range(lanes)]
    taken = []
    for length in steps.tolist():
        begin, lane = free[0]
        taken.append((lane, begin))
        heapq.heapreplace(free, (begin + length, lane))
    table = np.array(taken, dtype=np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]
