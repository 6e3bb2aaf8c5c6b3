"""Facts: the events as one packed int32 matrix, so that a batch is one gather.

Floats lie in the matrix bit by bit and a time fills two columns; reading them is a view, never a conversion.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from funnelrec.core.schema import Schema, Spec
from funnelrec.core.shapes import UNKNOWN

__all__ = ["Facts", "Layout"]


@dataclass(frozen=True)
class Layout:
    """Which column of the packed matrix holds what; None where the table has no such thing.

    `moment` fills two columns from an even one on, and `width` is even, so that it can be viewed as int64.
    """

    width: int
    label: int
    moment: int | None = None
    user: int | None = None
    item: int | None = None
    weight: int | None = None
    ids: tuple[int, int] = (0, 0)
    numbers: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, schema: Schema, spec: Spec) -> Layout:
        """The layout that a schema needs: only the columns of its context are stored with the facts."""
        places: dict[str, int] = {}
        at = 0
        if not schema.is_rows or schema.time is not None:
            places["moment"], at = 0, 2
        named = [] if schema.is_rows else ["user", "item"]
        for name in (*named, "label", *(["weight"] if schema.weight else [])):
            places[name], at = at, at + 1
        ids = sum(c.stop - c.start for c in spec.categories if c.side == "context")
        computed = {p.name for p in schema.past}
        numbers = sum(n.stop - n.start for n in spec.numbers if n.side == "context" and n.name not in computed)
        end = at + ids + numbers
        return cls(width=end + end % 2, ids=(at, at + ids), numbers=(at + ids, end), **places)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able data; `from_dict` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Layout:
        """Read what `to_dict` wrote."""
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**plain)

    def ids_of(self, rows: Int[Tensor, "B W"]) -> Int[Tensor, "B Cc"]:
        """The context's ids, offset into the fused table."""
        return rows[:, self.ids[0] : self.ids[1]]

    def numbers_of(self, rows: Int[Tensor, "B W"]) -> Float[Tensor, "B Mc"]:
        """The context's numbers."""
        return rows[:, self.numbers[0] : self.numbers[1]].view(torch.float32)

    def float_of(self, rows: Int[Tensor, "B W"], column: int) -> Float[Tensor, "B"]:
        """One float column."""
        return rows[:, column].view(torch.float32)

    def moment_of(self, rows: Int[Tensor, "B W"]) -> Int[Tensor, "B"]:
        """When, int64: the moment at which histories are cut."""
        if self.moment is None:
            raise ValueError("these rows have no moment: the table has neither time nor users")
        return rows[:, self.moment : self.moment + 2].view(torch.int64)[:, 0]


class Facts:
    """The events in the order of time. Arrays are made when asked for, one entry an event.

    `moment` is what histories are cut at: the time; with LeaveLastOut or HeldOutUsers the ordinal (from 1) of the event
    among its user's events; in a table without times the number of the row. `person` is the user row, except that
    people whom training never saw have rows of their own from `num_users` on; models see them all as the unknown row.
    """

    def __init__(
        self,
        packed: Int[Tensor, "n W"],
        part: npt.NDArray[np.uint8],
        layout: Layout,
        *,
        num_users: int = 0,
        time: npt.NDArray[np.int64] | None = None,
    ) -> None:
        self.packed = packed
        self.part = part
        self.layout = layout
        self._num_users = num_users
        self._time = time  # only where it is not the moment

    def __len__(self) -> int:
        return len(self.packed)

    def _column(self, name: str) -> Tensor:
        place = getattr(self.layout, name)
        if place is None:
            raise ValueError(f"these events have no {name}: the schema names no such column")
        return self.packed[:, place]

    @property
    def moment(self) -> npt.NDArray[np.int64]:
        """int64 [n], never falling within a user."""
        if self.layout.moment is None:
            return np.arange(len(self), dtype=np.int64)
        return self.layout.moment_of(self.packed).numpy()

    @property
    def time(self) -> npt.NDArray[np.int64]:
        """Seconds, int64 [n]; the number of the row in a table without times."""
        return self.moment if self._time is None else self._time

    @property
    def person(self) -> npt.NDArray[np.int64]:
        """Rows of `Dataset.histories`, int64 [n]."""
        return self._column("user").numpy().astype(np.int64)

    @property
    def user(self) -> npt.NDArray[np.int64]:
        """User rows, int64 [n]; row 1 for everyone whom training never saw."""
        person = self.person
        person[person >= self._num_users] = UNKNOWN
        return person

    @property
    def item(self) -> npt.NDArray[np.int64]:
        """Item rows, int64 [n]."""
        return self._column("item").numpy().astype(np.int64)

    @property
    def label(self) -> npt.NDArray[np.float32]:
        """Labels as they stand in the table, float32 [n]; 1 where the schema has none."""
        return self._column("label").view(torch.float32).numpy()

    @property
    def weight(self) -> npt.NDArray[np.float32]:
        """Weights, float32 [n]; 1 where the schema has none."""
        if self.layout.weight is None:
            return np.ones(len(self), dtype=np.float32)
        return self._column("weight").view(torch.float32).numpy()
