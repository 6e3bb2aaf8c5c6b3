"""Histories: who did what before when. A history can only hold what happened strictly before the moment being scored.

A CSR over positive events sorted by user, then time: user u owns slots `offsets[u]` to `offsets[u + 1]`. Nothing is
materialised per example; a history is a slice whose end is found by binary search, for a whole batch at once.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Int
from torch import Tensor

__all__ = ["Histories"]


class Histories:
    """The positive events of every user in the order of time. Events of equal time never see each other.

    offsets: int64 [num_users + 1]; items: int32 [n] item rows; times: int64 [n]. NumPy arrays, memory maps too.
    """

    def __init__(
        self, offsets: npt.NDArray[np.int64], items: npt.NDArray[np.int32], times: npt.NDArray[np.int64]
    ) -> None:
        if len(items) != len(times) or len(offsets) < 1 or int(offsets[-1]) != len(items):
            raise ValueError(
                f"offsets must end at the number of events, items and times must be as long, received offsets ending "
                f"at {int(offsets[-1]) if len(offsets) else None}, {len(items)} items, {len(times)} times"
            )
        self.offsets = torch.from_numpy(offsets)
        self.items = torch.from_numpy(items)
        self.times = torch.from_numpy(times)
        longest = int((self.offsets[1:] - self.offsets[:-1]).max()) if len(offsets) > 1 else 0
        self._depth = longest.bit_length()  # halvings until a segment of this length is empty

    @classmethod
    def build(
        cls,
        users: npt.NDArray[np.int64],
        items: npt.NDArray[np.integer],
        times: npt.NDArray[np.int64],
        num_users: int,
    ) -> Histories:
        """From events in any order; events of one user and one time keep their order."""
        order = np.lexsort((times, users))
        offsets = np.zeros(num_users + 1, dtype=np.int64)
        np.cumsum(np.bincount(users, minlength=num_users), out=offsets[1:])
        return cls(offsets, items[order].astype(np.int32), times[order].astype(np.int64))

    @property
    def num_users(self) -> int:
        """Rows of users; a dataset counts here the people whom training never saw, too."""
        return len(self.offsets) - 1

    def spans(self, users: Int[Tensor, "B"], times: Int[Tensor, "B"]) -> tuple[Int[Tensor, "B"], Int[Tensor, "B"]]:
        """The slots (start, stop) of each user's events strictly before each time, by one binary search for all."""
        users = users.long()
        start, stop = self.offsets[users], self.offsets[users + 1]
        low, high = start, stop
        for _ in range(self._depth):
            middle = (low + high) >> 1
            searching = low < high
            earlier = searching & (self.times[middle.clamp(max=len(self.times) - 1)] < times)
            low = torch.where(earlier, middle + 1, low)
            high = torch.where(searching & ~earlier, middle, high)
        return start, low

    def before(
        self, users: Int[Tensor, "B"], times: Int[Tensor, "B"], length: int
    ) -> tuple[Int[Tensor, "B L"], Int[Tensor, "B L"], Bool[Tensor, "B L"]]:
        """The newest `length` events of each user strictly before each time: item rows, times, mask.

        Right-aligned: the newest event stands in the last slot; row 0 and time 0 where the mask is False.
        """
        start, stop = self.spans(users, times)
        return self.take(start, stop, length)

    def take(
        self, start: Int[Tensor, "B"], stop: Int[Tensor, "B"], length: int
    ) -> tuple[Int[Tensor, "B L"], Int[Tensor, "B L"], Bool[Tensor, "B L"]]:
        """The last `length` of the slots start..stop, laid out as `before` does."""
        slots = stop[:, None] + torch.arange(-length, 0)  # (B, L)
        mask = slots >= start[:, None]
        if len(self.items) == 0:
            empty = torch.zeros(slots.shape, dtype=torch.int64)
            return empty, empty.clone(), mask
        slots = slots.clamp_(min=0, max=len(self.items) - 1)
        items = self.items[slots].long().masked_fill_(~mask, 0)
        times = self.times[slots].masked_fill_(~mask, 0)
        return items, times, mask

    def seen(self, users: Int[Tensor, "B"], times: Int[Tensor, "B"]) -> Int[Tensor, "B X"]:
        """The distinct item rows of each user strictly before each time, ascending; 0 fills the shorter rows."""
        start, stop = self.spans(users, times)
        counts = stop - start
        owner = torch.repeat_interleave(torch.arange(len(counts)), counts)  # example of each event
        first = counts.cumsum(0) - counts
        slots = torch.arange(len(owner)) - first[owner] + start[owner]
        width = self._num_items
        pairs = torch.unique(owner * width + self.items[slots])  # sorted: by example, then by item
        owner, items = pairs // width, pairs % width
        counts = torch.bincount(owner, minlength=len(counts))
        column = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]
        padded = torch.zeros((len(counts), int(counts.max()) if len(counts) else 0), dtype=torch.int64)
        padded[owner, column] = items
        return padded

    def contains(
        self, users: Int[Tensor, "*S"], items: Int[Tensor, "*S"], times: Int[Tensor, "*S"]
    ) -> Bool[Tensor, "*S"]:
        """True where the user had a positive event with the item strictly before the time."""
        keys, first_times = self._first_times
        if len(keys) == 0:
            return torch.zeros(users.shape, dtype=torch.bool)
        known = items < self._num_items  # a larger row was never seen, and would alias another user's key
        wanted = users.long() * self._num_items + torch.where(known, items, 0)
        slot = torch.searchsorted(keys, wanted).clamp_(max=len(keys) - 1)
        return known & (keys[slot] == wanted) & (first_times[slot] < times)

    @cached_property
    def _num_items(self) -> int:
        return int(self.items.max()) + 1 if len(self.items) else 1

    @cached_property
    def _first_times(self) -> tuple[Tensor, Tensor]:
        """Sorted keys of the distinct (user, item) pairs and the first time of each."""
        owner = torch.repeat_interleave(torch.arange(self.num_users), self.offsets[1:] - self.offsets[:-1])
        keys = owner * self._num_items + self.items
        keys, order = torch.sort(keys, stable=True)  # events of one pair stay in the order of time
        first = torch.ones(len(keys), dtype=torch.bool)
        first[1:] = keys[1:] != keys[:-1]
        return keys[first], self.times[order[first]]
