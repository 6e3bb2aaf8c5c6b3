"""Recent: what users did since the funnel was made, in bounded memory. Ids, not rows, so that it outlives a reload."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from threading import Lock

__all__ = ["Recent"]

EACH = 200  #: newest items kept of a user; no stage reads a longer history
ALL = 200_000  #: items kept of everybody; beyond it, whoever was quiet for longest is forgotten


class Recent:
    """The newest items of each user, oldest first. Safe to use from several threads."""

    def __init__(self, each: int = EACH, everybody: int = ALL) -> None:
        self.each = each
        self.everybody = everybody
        self._items: OrderedDict[str, deque[tuple[str, float]]] = OrderedDict()
        self._count = 0
        self._lock = Lock()

    def __len__(self) -> int:
        """Items of all users."""
        return self._count

    def add(self, user: int | str, item: int | str, moment: int | float | None = None) -> None:
        """The user did something with the item, at `moment` (seconds since 1970) or just now."""
        with self._lock:
            items = self._items.setdefault(str(user), deque(maxlen=self.each))
            self._count += len(items) < self.each
            items.append((str(item), time.time() if moment is None else moment))
            self._items.move_to_end(str(user))
            while self._count > self.everybody:
                self._count -= len(self._items.popitem(last=False)[1])

    def of(self, user: int | str | None) -> tuple[str, ...]:
        """The items of one user; none for a stranger and for None."""
        if user is None or not self._items:
            return ()
        with self._lock:
            return tuple(item for item, _ in self._items.get(str(user), ()))

    def since(self, moment: int | float) -> Recent:
        """Only what happened at `moment` or later: the rest is in the data of a newer funnel."""
        kept = Recent(self.each, self.everybody)
        with self._lock:
            for user, items in self._items.items():
                for item, when in items:
                    if when >= moment:
                        kept.add(user, item, when)
        return kept
