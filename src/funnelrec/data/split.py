"""Which events train, which validate, which test.

Every split is plain data with `assign(user, time) -> part`, one of TRAIN, VALID, TEST for each event. The default is by
time over the whole table (`GlobalTime`): what a model learns is older than everything it is judged by, for all users
at once. `LeaveLastOut` is the protocol of much published work and lets one user's training events be younger than
another's test event; it is here so that such numbers can be compared ("legacy"). `HeldOutUsers` asks about people whom
training never saw.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

__all__ = [
    "HISTORY",
    "PARTS",
    "TEST",
    "TRAIN",
    "VALID",
    "AnySplit",
    "Given",
    "GlobalTime",
    "HeldOutUsers",
    "LeaveLastOut",
    "Part",
    "Ratio",
    "Split",
    "split_from_dict",
]

Part = Literal["train", "valid", "test"]
PARTS: tuple[Part, ...] = ("train", "valid", "test")
TRAIN, VALID, TEST = 0, 1, 2
HISTORY = 3  #: read as history of what the same person does later, and in no part
Int64Array = npt.NDArray[np.int64]
PartArray = npt.NDArray[np.uint8]


@runtime_checkable
class Split(Protocol):
    """Assigns each event to a part, or to HISTORY. `user` and `time` int64 [n], in any order of rows."""

    def assign(self, user: Int64Array, time: Int64Array) -> PartArray: ...

    def to_dict(self) -> dict[str, Any]: ...


def _check_shares(valid: float, test: float) -> None:
    if not (0.0 <= valid < 1.0 and 0.0 <= test < 1.0 and valid + test < 1.0):
        raise ValueError(
            f"valid and test are shares of the events and leave some for training, received valid={valid} test={test}"
        )


@dataclass(frozen=True)
class GlobalTime:
    """The youngest events test, those before them validate. Events of equal time stay on one side.

    `boundaries` (t_valid, t_test): train is time < t_valid, test is time >= t_test, valid is between. Left out, they
    are found at the quantiles of the event times, by `fit`.
    """

    valid: float = 0.1
    test: float = 0.1
    boundaries: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        _check_shares(self.valid, self.test)
        if self.boundaries is not None and self.boundaries[0] > self.boundaries[1]:
            raise ValueError(f"boundaries are (t_valid, t_test), t_valid first, received {self.boundaries}")

    def fit(self, time: Int64Array) -> GlobalTime:
        """The same split with its boundaries set from the event times; unchanged when they are set already."""
        if self.boundaries is not None:
            return self
        n = len(time)
        if n == 0:
            raise ValueError("a split by time needs at least one event, received none")
        ordered = np.sort(time)
        beyond = int(ordered[-1]) + 1  # later than every event: the part is empty
        # A count rounds to the nearest event, and equal times move the boundary to the first of them.
        test_from, valid_from = n - round(n * self.test), n - round(n * self.test) - round(n * self.valid)
        t_test = int(ordered[test_from]) if test_from < n else beyond
        t_valid = int(ordered[valid_from]) if valid_from < n else beyond
        return dataclasses.replace(self, boundaries=(t_valid, t_test))

    def assign(self, user: Int64Array, time: Int64Array) -> PartArray:
        """Part of each event; `user` is not looked at."""
        t_valid, t_test = self.fit(time).boundaries or (0, 0)
        return (time >= t_valid).astype(np.uint8) + (time >= t_test).astype(np.uint8)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able data; `split_from_dict` is the inverse."""
        return {"kind": "global_time", **dataclasses.asdict(self)}


@dataclass(frozen=True)
class LeaveLastOut:
    """The last event of each user tests, the one before it validates, the rest trains ("legacy").

    Order is time, then the order of the rows. A user with fewer than three events trains only. In a dataset split
    this way the moment of an event is its ordinal among its user's events, so equal times do not hide one another.
    """

    def assign(self, user: Int64Array, time: Int64Array) -> PartArray:
        """Part of each event."""
        part = np.zeros(len(user), dtype=np.uint8)
        order = np.lexsort((time, user))  # stable: rows of equal user and time keep their order
        by_user = user[order]
        ends = np.flatnonzero(np.append(by_user[1:] != by_user[:-1], True)) if len(user) else np.empty(0, np.int64)
        counts = np.diff(ends, prepend=-1)
        ends = ends[counts >= 3]
        part[order[ends]] = TEST
        part[order[ends - 1]] = VALID
        return part

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able data; `split_from_dict` is the inverse."""
        return {"kind": "leave_last_out"}


@dataclass(frozen=True)
class HeldOutUsers:
    """Whole users validate and test (strong generalisation): what each does first is given, the rest is to be found.

    `valid`, `test`: shares of the users. `given`: share of a held-out user's events, rounded down but at least one,
    that are HISTORY. Order is time, then the order of the rows: shuffle the rows first where equal times have a
    meaningless order. As in `LeaveLastOut`, the moment of an event is its ordinal among its user's events.
    Source: the protocol of Cen et al., KDD 2020 (ComiRec), where the shares are .1, .1 and .8.
    """

    valid: float = 0.1
    test: float = 0.1
    given: float = 0.8
    seed: int = 0

    def __post_init__(self) -> None:
        _check_shares(self.valid, self.test)
        if not 0.0 < self.given < 1.0:
            raise ValueError(f"given is the share of a held-out user's events in (0, 1), received {self.given}")

    def assign(self, user: Int64Array, time: Int64Array) -> PartArray:
        """Part of each event; a held-out user's first ones are HISTORY."""
        users, code = np.unique(user, return_inverse=True)
        drawn = np.random.default_rng(self.seed).permutation(len(users))
        test = round(len(users) * self.test)
        held = np.full(len(users), TRAIN, dtype=np.uint8)
        held[drawn[:test]] = TEST
        held[drawn[test : test + round(len(users) * self.valid)]] = VALID
        order = np.lexsort((time, code))  # stable: rows of equal user and time keep their order
        counts = np.bincount(code, minlength=len(users))
        place = np.empty(len(user), dtype=np.int64)
        place[order] = np.arange(len(user)) - (counts.cumsum() - counts)[code[order]]
        read = np.maximum(np.floor(counts * self.given + 1e-9), 1)  # .8 · 5 is 4, whatever binary fractions say
        part = held[code]
        part[(part != TRAIN) & (place < read[code])] = HISTORY
        return part

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able data; `split_from_dict` is the inverse."""
        return {"kind": "held_out_users", **dataclasses.asdict(self)}


@dataclass(frozen=True)
class Ratio:
    """Random events, by a seed. Where users have histories this lets the future train the past: prefer GlobalTime."""

    valid: float = 0.1
    test: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        _check_shares(self.valid, self.test)

    def assign(self, user: Int64Array, time: Int64Array) -> PartArray:
        """Part of each event; exact shares, rounded to whole events."""
        n = len(user)
        order = np.random.default_rng(self.seed).permutation(n)
        part = np.zeros(n, dtype=np.uint8)
        test = round(n * self.test)
        part[order[:test]] = TEST
        part[order[test : test + round(n * self.valid)]] = VALID
        return part

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able data; `split_from_dict` is the inverse."""
        return {"kind": "ratio", **dataclasses.asdict(self)}


@dataclass(frozen=True)
class Given:
    """A published split: `part` uint8 [n] says 0 train, 1 valid, 2 test for each row, in the order of the rows, or 3
    (HISTORY) for what is read and is in no part."""

    part: PartArray | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.part is not None and self.part.size and int(self.part.max()) > HISTORY:
            raise ValueError(
                f"a published part is 0 train, 1 valid, 2 test or 3 history, received {int(self.part.max())}"
            )

    def assign(self, user: Int64Array, time: Int64Array) -> PartArray:
        """The given parts. Raises ValueError when there are none or their number is not the number of events."""
        if self.part is None:
            raise ValueError("this table has no published part; choose GlobalTime, LeaveLastOut or Ratio")
        if len(self.part) != len(user):
            raise ValueError(f"a published part needs one entry an event, received {len(self.part)} for {len(user)}")
        return self.part

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able data, without the parts: those are a column of the dataset."""
        return {"kind": "given"}


AnySplit = GlobalTime | LeaveLastOut | HeldOutUsers | Ratio | Given
KINDS: dict[str, type[AnySplit]] = {
    "global_time": GlobalTime,
    "leave_last_out": LeaveLastOut,
    "held_out_users": HeldOutUsers,
    "ratio": Ratio,
    "given": Given,
}


def split_from_dict(data: Mapping[str, Any]) -> AnySplit:
    """Read what a split's `to_dict` wrote. Raises ValueError on an unknown kind or key."""
    kind = data.get("kind")
    if kind not in KINDS:
        raise ValueError(f"a split's kind must be one of {', '.join(KINDS)}, received {kind!r}")
    options = {k: v for k, v in data.items() if k != "kind"}
    known = {f.name for f in dataclasses.fields(KINDS[kind])}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(f"split '{kind}' does not know the key '{unknown[0]}'; it knows {', '.join(sorted(known))}")
    if isinstance(options.get("boundaries"), list):  # JSON has no tuples
        options["boundaries"] = tuple(options["boundaries"])
    return KINDS[kind](**options)
