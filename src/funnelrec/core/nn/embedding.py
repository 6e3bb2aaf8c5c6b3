"""Embedding tables whose cost per step depends on the batch and not on the number of rows.

`Table` is one matrix of vectors; `FieldEmbedding` turns `Batch.ids` and `Batch.numbers` into one vector per field,
with a single gather from one fused table (row layout: `CategorySpec`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from funnelrec.core.batch import Batch
from funnelrec.core.schema import CategorySpec, Spec
from funnelrec.core.shapes import PADDING

__all__ = ["FieldEmbedding", "Table", "coalesced", "suggested_dim", "sum_by_row"]


def suggested_dim(n: int, rule: str = "log2", k: float = 6.0) -> int:
    """A width for the vectors of `n` values, at least 1.

    rule "log2": ⌈log2 n⌉; "root4": ⌈k · n^¼⌉ (k = 6 in DCN, arXiv:1708.05123).
    """
    if n < 1:
        raise ValueError(f"the number of values must be at least 1, received {n}")
    if rule == "log2":
        return max(1, math.ceil(math.log2(n)))
    if rule == "root4":
        return max(1, math.ceil(k * math.pow(n, 0.25)))
    raise ValueError(f"rule must be 'log2' or 'root4', received {rule!r}")


RADIX = 40_000  #: so many numbers torch sorts by radix, on one thread as fast as numpy and on several faster

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _never_compiled(function: _Function) -> _Function:
    """`torch.compiler.disable` with its type kept.

    The compiled backward of a look-up on CPU can return wrong gradients (torch 2.13 inductor, vectorised scatter), so
    a look-up always runs eagerly and only the dense body of a model is compiled.
    """
    eager: _Function = torch.compiler.disable(function)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return eager


def sum_by_row(rows: Int[Tensor, "P"], values: Float[Tensor, "P D"]) -> tuple[Int[Tensor, "U"], Float[Tensor, "U D"]]:
    """The distinct rows in ascending order (int64) and the sum of the values of each.

    A stable sort, then one embedding bag per run of equal rows: the sums are the same bits on every call, and on CPU
    five times as fast as `Tensor.coalesce` (docs/decisions/0001-sparse-gradients.md).
    """
    if rows.numel() == 0:
        return rows.long(), values
    ordered, order = _in_order(rows)
    first = torch.ones_like(ordered, dtype=torch.bool)
    torch.ne(ordered[1:], ordered[:-1], out=first[1:])
    starts = first.nonzero().view(-1)  # (U,)
    return ordered[starts], F.embedding_bag(order, values, starts, mode="sum")


def _in_order(rows: Int[Tensor, "P"]) -> tuple[Int[Tensor, "P"], Int[Tensor, "P"]]:
    """A stable sort of row numbers: the rows (int64) and where each of them stood.

    torch sorts short lists by comparing and long ones by radix. On CPU short ones are packed instead, row and place in
    one number, which numpy sorts with vector instructions: 12,800 rows in .06 ms, not .67. Both fit: a table has fewer
    than 2^40 rows.
    """
    if rows.device.type != "cpu" or len(rows) >= RADIX:
        ordered, order = torch.sort(rows, stable=True)
        return ordered.long(), order
    bits = (len(rows) - 1).bit_length()
    packed = torch.arange(len(rows)).bitwise_or_(rows.long() << bits)
    packed.numpy().sort()
    return packed >> bits, packed & ((1 << bits) - 1)


def coalesced(gradient: Tensor) -> Tensor:
    """A sparse gradient [V, D] in which every row occurs once, rows ascending; the same object if it is so already."""
    if gradient.is_coalesced():
        return gradient
    if gradient.dim() != 2 or gradient.sparse_dim() != 1:
        return gradient.coalesce()
    rows, values = gradient._indices()[0], gradient._values()
    if not bool((rows[1:] > rows[:-1]).all()):  # autograd forgets the flag of a gradient that is in order
        rows, values = sum_by_row(rows, values)
    return _sparse_rows(rows, values, gradient.shape)


def _sparse_rows(rows: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    return torch.sparse_coo_tensor(rows.unsqueeze(0), values, shape, is_coalesced=True, check_invariants=False)


class _LookUp(torch.autograd.Function):
    """weight[ids] whose gradient is sparse, with every row once and without the padding row."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding: bool) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape, ctx.padding = weight.shape, padding
        return weight.index_select(0, ids.reshape(-1)).view(*ids.shape, weight.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (ids,) = ctx.saved_tensors
        rows, values = ids.reshape(-1), gradient.reshape(-1, gradient.shape[-1])
        if rows.dtype != torch.int64 or not bool((rows[1:] > rows[:-1]).all()):  # else each occurs once already
            rows, values = sum_by_row(rows, values)
        if ctx.padding and rows.numel() and rows[0] == PADDING:  # in ascending order it can only stand first
            rows, values = rows[1:], values[1:]
        return _sparse_rows(rows, values, ctx.shape), None, None


class Table(nn.Module):
    """`rows` vectors of width `dim`, drawn from N(0, std²).

    The gradient of `weight` is sparse (COO, one entry for every distinct row of the batch), so the cost of backward
    and of the optimisers of learn/optim.py does not depend on `rows`. Set `dense = True` for an ordinary gradient,
    e.g. for an item table under a full softmax, where every row gets a gradient anyway.
    With `padding`, row 0 is zero and receives no gradient. An initialiser run over all weights must spare it.
    """

    def __init__(self, rows: int, dim: int, *, std: float = 0.01, padding: bool = True, dense: bool = False) -> None:
        super().__init__()
        if rows < 1 or dim < 1:
            raise ValueError(f"a table needs at least one row and one column, received rows={rows}, dim={dim}")
        self.rows = rows
        self.dim = dim
        self.std = std
        self.padding = padding
        self.dense = dense
        self.weight = nn.Parameter(torch.empty(rows, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew; row 0 is zero when it is padding."""
        with torch.no_grad():
            self.weight.normal_(0.0, self.std)
            if self.padding:
                self.weight[PADDING].zero_()

    @_never_compiled
    def forward(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape D"]:
        """Rows of the table; ids int32 or int64 of any shape."""
        if self.dense:
            return F.embedding(ids, self.weight, padding_idx=PADDING if self.padding else None)
        found: Tensor = _LookUp.apply(self.weight, ids, self.padding)  # type: ignore[no-untyped-call]
        return found

    def extra_repr(self) -> str:
        return f"rows={self.rows}, dim={self.dim}, dense={self.dense}"


class FieldEmbedding(nn.Module):
    """One vector per field of a batch, [B, F, D]: the categorical fields of `spec` in order, then the numeric columns.

    A multi-valued field is the mean over its real slots (zero when it has none). A numeric column is its value times
    a learned vector. All categories share one `Table`, so a batch costs one gather.

    `linear=True` adds a first-order weight to every row and numeric column, stored beside the vector (the row is
    D + 1 wide, the weight stands last and starts at 0): FM-like models read both with one random access through
    `with_linear` or `rows`.
    """

    def __init__(self, spec: Spec, dim: int, *, linear: bool = False, std: float = 0.01) -> None:
        super().__init__()
        self.spec = spec
        self.dim = dim
        self.linear = linear
        self._num_ids = spec.num_ids
        width = dim + 1 if linear else dim
        self.table = Table(spec.table_rows, width, std=std)
        self.number_vectors = nn.Parameter(torch.empty(spec.num_numbers, width)) if spec.num_numbers else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw vectors from N(0, std²); first-order weights start at 0."""
        self.table.reset_parameters()
        with torch.no_grad():
            for weight in (self.table.weight, self.number_vectors):
                if weight is None:
                    continue
                if weight is self.number_vectors:
                    weight.normal_(0.0, self.table.std)
                if self.linear:
                    weight[:, self.dim].zero_()

    @property
    def output_fields(self) -> int:
        """F: vectors per example, categorical fields plus numeric columns."""
        return self.spec.num_fields + self.spec.num_numbers

    def forward(self, batch: Batch) -> Float[Tensor, "B F D"]:
        """The vectors of `batch.ids` and `batch.numbers`."""
        return self._fields(batch)[..., : self.dim]  # (B, F, D)

    def rows(self, batch: Batch) -> Float[Tensor, "B F E"]:
        """The vectors of the fields with their first-order weights last, E = D + 1. Needs `linear=True`."""
        if not self.linear:
            raise ValueError("this FieldEmbedding has no first-order weights; build it with linear=True")
        return self._fields(batch)

    def with_linear(self, batch: Batch) -> tuple[Float[Tensor, "B"], Float[Tensor, "B F D"]]:
        """⟨w, x⟩ and the vectors, from one look-up. Needs `linear=True`."""
        vectors, weights = torch.split(self.rows(batch), [self.dim, 1], dim=-1)  # one backward for both
        return weights.squeeze(-1).sum(1), vectors

    def lookup(self, ids: Int[Tensor, "*shape C"], columns: slice | None = None) -> Float[Tensor, "*shape F D"]:
        """The vectors of some columns of `ids`, one per field of those columns.

        `columns` says which columns of `Batch.ids` the last axis holds, e.g. `spec.item_ids` for `batch.history_ids`;
        absent, all of them. It must not cut a multi-valued field in two.
        """
        return self._categories(ids, columns)[..., : self.dim]  # (..., F, D)

    def _fields(self, batch: Batch) -> Tensor:
        parts = []
        if self._num_ids:
            parts.append(self._categories(batch.ids))
        if self.number_vectors is not None:
            parts.append(batch.numbers.unsqueeze(-1) * self.number_vectors)  # (B, M, D)
        if not parts:
            raise ValueError("this spec has neither categories nor numbers; there is nothing to embed")
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)  # (B, F, D)

    def _categories(self, ids: Tensor, columns: slice | None = None) -> Tensor:
        if columns is None:
            columns, fields = slice(0, self._num_ids), self.spec.categories
        else:
            fields = _fields_between(self.spec, columns.start, columns.stop)
        width = columns.stop - columns.start
        if ids.shape[-1] != width:
            raise ValueError(f"ids hold {ids.shape[-1]} columns but columns {columns.start}:{columns.stop} are {width}")
        rows: Tensor = self.table(ids)  # (..., C, D)
        if len(fields) == width:
            return rows
        pieces, single = [], columns.start  # `single`: where the pending run of one-column fields begins
        for field in fields:
            if field.stop - field.start == 1:
                continue
            if single < field.start:
                pieces.append(rows[..., single - columns.start : field.start - columns.start, :])
            slots = slice(field.start - columns.start, field.stop - columns.start)
            real = (ids[..., slots] != PADDING).sum(-1, keepdim=True).clamp(min=1).to(rows.dtype)
            # padding is a zero row, so a plain sum is the sum over the real slots
            pieces.append((rows[..., slots, :].sum(-2) / real).unsqueeze(-2))
            single = field.stop
        if single < columns.stop:
            pieces.append(rows[..., single - columns.start :, :])
        return torch.cat(pieces, dim=-2)  # (..., F, D)


def _fields_between(spec: Spec, start: int, stop: int) -> tuple[CategorySpec, ...]:
    """The fields that lie in columns start..stop of `ids`."""
    fields = tuple(c for c in spec.categories if c.start < stop and c.stop > start)
    if not fields or fields[0].start != start or fields[-1].stop != stop:
        raise ValueError(f"columns {start}:{stop} do not hold whole fields; the spec has {spec.num_ids} columns of ids")
    return fields
