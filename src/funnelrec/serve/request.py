"""What a funnel is asked, and what it answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

__all__ = ["Recommendation", "Recommended", "Request", "RequestError", "SimilarUser"]

MAX_K = 1_000
MAX_HISTORY = 10_000


def _is_whole(value: object) -> bool:
    """True for whole numbers, NumPy's too."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_id(value: object) -> bool:
    return isinstance(value, str) or _is_whole(value)


def _is_real(value: object) -> bool:
    return isinstance(value, Real)


class RequestError(ValueError):
    """The request cannot be answered; the message says what was received and how to mend it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One question: who (a user id, or the history of anyone), how many, and under which conditions.

    With both a user and a history, the attributes are the user's and the history is the one given.
    """

    user: int | str | None = None
    history: Sequence[Any] | None = None
    k: int = 10
    filters: Mapping[str, Any] | None = None
    diversity: int | float | None = None
    context: Mapping[str, Any] | None = None
    exclude_seen: bool = True

    def __post_init__(self) -> None:
        if self.user is None and self.history is None:
            raise RequestError("a request needs a user or a history; for a stranger give history=[]")
        if self.user is not None and not _is_id(self.user):
            raise RequestError(f"a user is a whole number or a text, received {self.user!r}")
        if not _is_whole(self.k) or not 1 <= self.k <= MAX_K:
            raise RequestError(f"k must be a whole number from 1 to {MAX_K}, received {self.k!r}")
        object.__setattr__(self, "k", int(self.k))
        if self.history is not None:
            self._check_history(self.history)
        if self.diversity is not None and not (_is_real(self.diversity) and 0 <= self.diversity < float("inf")):
            raise RequestError(f"diversity must be 0 or a positive number, received {self.diversity!r}")
        for name in ("filters", "context"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Mapping):
                raise RequestError(f"{name} are written {{name: value}}, received {value!r}")

    @staticmethod
    def _check_history(history: Sequence[Any]) -> None:
        if isinstance(history, str | bytes) or not isinstance(history, Sequence):
            raise RequestError(f"a history is a list of item ids, newest last, received {history!r}")
        if len(history) > MAX_HISTORY:
            raise RequestError(f"a history has at most {MAX_HISTORY} items, received {len(history)}; send the newest")
        wrong = [h for h in history if not _is_id(h)]
        if wrong:
            raise RequestError(f"an item of a history is a whole number or a text, received {wrong[0]!r}")

    def options(self) -> tuple[Any, ...]:
        """What requests must share to be answered in one batch."""
        filters = json.dumps(self.filters or {}, sort_keys=True, default=str)
        return self.k, filters, self.diversity, self.exclude_seen


@dataclass(frozen=True, slots=True)
class Recommended:
    """One item of an answer. `score` is what the list was ordered by before re-ranking (the ranker's logit, else the
    matcher's score); `match_place` is the place, from 0, at which retrieval had it; `probability` is how likely a click
    is, where the funnel was calibrated and the ranker gave the score."""

    item: Any
    score: float
    match_score: float
    match_place: int
    attributes: Mapping[str, Any] = field(default_factory=dict)
    probability: float | None = None


@dataclass(frozen=True, slots=True)
class Recommendation:
    """An answer, best first. `fallback` says why the items are merely the recently popular ones, None if they are not:
    "unknown user", "empty history" or "unknown items". Fewer than k items where the filters leave fewer."""

    items: tuple[Recommended, ...]
    fallback: str | None = None

    @property
    def ids(self) -> list[Any]:
        """The item ids."""
        return [r.item for r in self.items]


@dataclass(frozen=True, slots=True)
class SimilarUser:
    """A user who is like the one asked about; `score` is at most 1."""

    user: Any
    score: float
