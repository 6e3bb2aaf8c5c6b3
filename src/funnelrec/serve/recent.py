"""Recent: what users did since the funnel was made, in bounded memory. Ids, not rows, so that it outlives a reload."""

from __future__ import annotations

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
        self._items: OrderedDict[str, deque[str]] = OrderedDict()
        self._count = 0
        self._lock = Lock()

    def __len__(self) -> int:
        """Items of all users."""
        return self._count

    def add(self, user: int | str, item: int | str) -> None:
        """The user did something with the item just now."""
        with self._lock:
            items = self._items.setdefault(str(user), deque(maxlen=self.each))
            self._count += len(items) < self.each
            items.append(str(item))
            self._items.move_to_end(str(user))
            while self._count > self.everybody:
                self._count -= len(self._items.popitem(last=False)[1])

    def of(self, user: int | str | None) -> tuple[str, ...]:
        """Of one user; empty for a stranger and for None."""
        if user is None or not self._items:
            return ()
        with self._lock:
            return tuple(self._items.get(str(user), ()))
