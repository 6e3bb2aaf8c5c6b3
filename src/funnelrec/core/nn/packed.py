"""Attention over histories of different lengths without a look at padding.

`Packed` lines up the real items of a batch, T of them, so that every layer computes those alone. For attention the
examples are split into groups of similar length, which halves its time on histories as uneven as MovieLens's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["Packed", "pack"]

GROUPS = 8  #: groups of similar length that attention works on one after the other


@dataclass(frozen=True)
class _Group:
    """Examples of similar length, next to one another in the packed order; padded to `longest` for attention."""

    lengths: Tensor  # int64 [b]
    longest: int
    slots: Tensor  # int64 [t]: where each item stands in the flattened [b, longest]
    even: bool  # all lengths are equal

    def spread(self, x: Float[Tensor, "t D"], heads: int) -> Float[Tensor, "b H l d"]:
        """The packed items of this group as left-aligned histories, split into heads."""
        grid = x.new_zeros(len(self.lengths) * self.longest, x.shape[1]).index_copy(0, self.slots, x)
        return grid.view(len(self.lengths), self.longest, heads, -1).transpose(1, 2)

    def collect(self, x: Float[Tensor, "b H l d"]) -> Float[Tensor, "t D"]:
        """The inverse of `spread`: the items of this group, packed."""
        return x.transpose(1, 2).reshape(len(self.lengths) * self.longest, -1).index_select(0, self.slots)

    def keys(self) -> Bool[Tensor, "b 1 1 l"] | None:
        """Which keys are items; None where all are."""
        if self.even:
            return None
        real = torch.arange(self.longest, device=self.lengths.device) < self.lengths.unsqueeze(1)
        return real[:, None, None, :]


class Packed:
    """The real items of a batch in one row, examples ordered by length, oldest item first.

    `example` and `column` [T] say where each stood in the batch; `mask` is True at real items.
    """

    def __init__(self, mask: Bool[Tensor, "B L"]) -> None:
        self.shape = tuple(mask.shape)
        order = mask.sum(1).argsort(stable=True)
        row, self.column = mask[order].nonzero(as_tuple=True)  # (T,) each
        self.example = order[row]
        rank = mask[order].cumsum(1)[row, self.column] - 1  # (T,) position among the example's real items
        counts = mask[order].sum(1)
        ends = [0, *counts.cumsum(0).tolist()]
        lengths = counts.tolist()
        size = max(1, -(-len(lengths) // GROUPS))
        self._groups = []
        for first in range(0, len(lengths), size):
            last = min(first + size, len(lengths))
            start, stop, longest = ends[first], ends[last], lengths[last - 1]
            if stop > start:
                slots = (row[start:stop] - first) * longest + rank[start:stop]
                self._groups.append(_Group(counts[first:last], longest, slots, lengths[first] == longest))
        final = rank == counts[row] - 1
        self._newest, self._owner = final.nonzero().squeeze(1), self.example[final]

    def attend(
        self,
        query: Float[Tensor, "T D"],
        key: Float[Tensor, "T D"],
        value: Float[Tensor, "T D"],
        num_heads: int,
        *,
        causal: bool,
    ) -> Float[Tensor, "T D"]:
        """softmax(Q Kᵀ / √d) V of each head within each example; `causal`: an item looks at itself and older ones."""
        out = []
        sizes = [len(group.slots) for group in self._groups]
        # split and not sliced: the backward of every slice would fill a tensor of all T items with zeros
        for group, *parts in zip(self._groups, *(torch.split(x, sizes) for x in (query, key, value)), strict=True):
            q, k, v = (group.spread(x, num_heads) for x in parts)  # (b, H, l, D / H)
            # histories stand left-aligned in a group, so the causal rule alone keeps padding out
            attended = F.scaled_dot_product_attention(
                q, k, v, attn_mask=None if causal else group.keys(), is_causal=causal
            )
            out.append(group.collect(attended))
        return torch.cat(out) if out else query

    def newest(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "B D"]:
        """What stands at the newest item of each example; zero for one without items."""
        return x.new_zeros(self.shape[0], x.shape[1]).index_copy(0, self._owner, x.index_select(0, self._newest))

    def grid(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "B L D"]:
        """Each item back in its place, zero at padding."""
        count, length = self.shape
        flat = x.new_zeros(count * length, x.shape[1]).index_copy(0, self.example * length + self.column, x)
        return flat.view(count, length, -1)


class _Whole(Packed):
    """Every slot of the batch, padding too: slower, but no shape depends on what the mask holds."""

    def __init__(self, mask: Bool[Tensor, "B L"]) -> None:
        self.shape = tuple(mask.shape)
        self.mask = mask
        count, length = self.shape
        self.example = torch.arange(count, device=mask.device).repeat_interleave(length)
        self.column = torch.arange(length, device=mask.device).repeat(count)

    def attend(
        self,
        query: Float[Tensor, "T D"],
        key: Float[Tensor, "T D"],
        value: Float[Tensor, "T D"],
        num_heads: int,
        *,
        causal: bool,
    ) -> Float[Tensor, "T D"]:
        count, length = self.shape
        q, k, v = (x.view(count, length, num_heads, -1).transpose(1, 2) for x in (query, key, value))  # (B, H, L, D/H)
        itself = torch.eye(length, dtype=torch.bool, device=query.device)  # a slot of padding has to look somewhere
        allowed = self.mask.unsqueeze(1).expand(-1, length, -1)  # (B, L, L)
        allowed = (allowed.tril() if causal else allowed) | itself
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed.unsqueeze(1))
        return attended.transpose(1, 2).reshape(count * length, -1)

    def newest(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "B D"]:
        length = self.shape[1]
        last = (self.mask * torch.arange(1, length + 1, device=x.device)).argmax(1)  # (B,)
        states = self.grid(x).gather(1, last.view(-1, 1, 1).expand(-1, -1, x.shape[1]))
        return states.squeeze(1)

    def grid(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "B L D"]:
        count, length = self.shape
        return x.view(count, length, -1) * self.mask.unsqueeze(2)


def pack(mask: Bool[Tensor, "B L"]) -> Packed:
    """The items of a batch, packed; unpacked while a graph is exported, which holds no shape that depends on data."""
    return _Whole(mask) if torch.compiler.is_exporting() else Packed(mask)
