"""Features: from user rows, item rows and a context to the columns a model reads.

User and item attributes are never copied onto the events: they are gathered here when a batch is made, from tables
whose ids are already offset into the fused embedding table. Training and serving use this same gather.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from funnelrec.core.schema import Side, Spec
from funnelrec.core.shapes import UNKNOWN

__all__ = ["Features"]


@dataclass(frozen=True)
class Features:
    """The attribute tables of users and items. Row 0 is padding (zeros), row 1 is unknown.

    `spec` says which column of `ids` and `numbers` belongs to whom: user columns, item columns, context columns.
    """

    spec: Spec
    user_ids: Int[Tensor, "U Cu"]
    user_numbers: Float[Tensor, "U Mu"]
    item_ids: Int[Tensor, "N Ci"]
    item_numbers: Float[Tensor, "N Mi"]

    def __post_init__(self) -> None:
        for name, side, kind in (
            ("user_ids", "user", "categories"),
            ("user_numbers", "user", "numbers"),
            ("item_ids", "item", "categories"),
            ("item_numbers", "item", "numbers"),
        ):
            wanted = sum(f.stop - f.start for f in getattr(self.spec, kind) if f.side == side)
            received = getattr(self, name).shape[1]
            if wanted != received:
                raise ValueError(f"{name} needs the {wanted} columns of the spec, received {received}")

    def gather(
        self,
        users: Int[Tensor, "B"] | None,
        items: Int[Tensor, "B"] | None,
        context_ids: Int[Tensor, "B Cc"] | None = None,
        context_numbers: Float[Tensor, "B Mc"] | None = None,
    ) -> dict[str, Tensor]:
        """The columns "ids" int32 [B, C] and "numbers" float32 [B, M] of B (user, item, context) rows.

        What is None is not known: an unknown user, an unknown item, padding for the context. `context_ids` are offset
        into the fused table already.
        """
        given = [t for t in (users, items, context_ids, context_numbers) if t is not None]
        if not given:
            raise ValueError("nothing to gather: give users, items or a context")
        size = given[0].shape[0]
        context_columns, context_width = self._context_widths
        ids = [
            _take(self.user_ids, users, size),
            _take(self.item_ids, items, size),
            torch.zeros((size, context_columns), dtype=torch.int32) if context_ids is None else context_ids,
        ]
        numbers = [
            _take(self.user_numbers, users, size),
            _take(self.item_numbers, items, size),
            torch.zeros((size, context_width)) if context_numbers is None else context_numbers,
        ]
        return {"ids": _join(ids), "numbers": _join(numbers)}

    def history_ids(self, history: Int[Tensor, "B L"]) -> Int[Tensor, "B L Ci"]:
        """The item columns of `ids` for each item of a history; zeros at padding."""
        return self.item_ids[history]  # (B, L, Ci)

    @cached_property
    def _context_widths(self) -> tuple[int, int]:
        side: Side = "context"
        ids = sum(c.stop - c.start for c in self.spec.categories if c.side == side)
        return ids, sum(n.stop - n.start for n in self.spec.numbers if n.side == side)


def _take(table: Tensor, rows: Tensor | None, size: int) -> Tensor:
    """Rows of a table; the unknown row for all when the rows are not known."""
    if rows is not None and table.shape[1]:
        return table.index_select(0, rows)
    if rows is None and table.shape[1]:
        return table[UNKNOWN].expand(size, -1)
    return table.new_zeros((size, 0))


def _join(parts: list[Tensor]) -> Tensor:
    """Columns side by side; a single non-empty part is handed on without a copy."""
    filled = [p for p in parts if p.shape[1]]
    if not filled:
        return parts[0]
    return filled[0] if len(filled) == 1 else torch.cat(filled, dim=1)
