"""Histories of different lengths without a look at padding.

`Packed` lines up the real items of a batch, T of them, so that every layer computes those alone. For attention the
examples are split into groups of similar length, which halves its time on histories as uneven as MovieLens's. `Steps`
lines them up for a recurrence: all that is read at one step stands side by side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

__all__ = ["Packed", "Steps", "pack", "steps"]

GROUPS = 8  #: groups of similar length that attention works on one after the other


@dataclass(frozen=True)
class _Group:
    """Examples of similar length, next to one another in the packed order; padded to `longest` for attention."""

    first: int  # place of its first example in the packed order
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
        # an example without items looks at one slot of zeros: a softmax over nothing would not be a number
        real = torch.arange(self.longest, device=self.lengths.device) < self.lengths.clamp(min=1).unsqueeze(1)
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
                self._groups.append(_Group(first, counts[first:last], longest, slots, lengths[first] == longest))
        final = rank == counts[row] - 1
        self._newest, self._owner, self._order = final.nonzero().squeeze(1), self.example[final], row[final]

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

    def attend_newest(
        self, query: Float[Tensor, "N D"], key: Float[Tensor, "T D"], value: Float[Tensor, "T D"], num_heads: int
    ) -> Float[Tensor, "N D"]:
        """What `attend` gives at the newest item of each example that has one; `query` as `newest_of` gives it."""
        queries = query.new_zeros(self.shape[0], query.shape[1]).index_copy(0, self._order, query)  # (B, D)
        out = torch.zeros_like(queries)
        sizes = [len(group.slots) for group in self._groups]
        for group, *parts in zip(self._groups, *(torch.split(x, sizes) for x in (key, value)), strict=True):
            k, v = (group.spread(x, num_heads) for x in parts)  # (b, H, l, D / H)
            own = slice(group.first, group.first + len(group.lengths))
            q = queries[own].view(len(group.lengths), 1, num_heads, -1).transpose(1, 2)  # (b, H, 1, D / H)
            out[own] = F.scaled_dot_product_attention(q, k, v, attn_mask=group.keys()).flatten(1)
        return out.index_select(0, self._order)

    def newest_of(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "N D"]:
        """What stands at the newest item of each example that has one."""
        return x.index_select(0, self._newest)

    def by_example(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "B D"]:
        """What `newest_of` and `attend_newest` give, in the order of the batch; zero for an example without items."""
        return x.new_zeros(self.shape[0], x.shape[1]).index_copy(0, self._owner, x)

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

    def attend_newest(
        self, query: Float[Tensor, "N D"], key: Float[Tensor, "T D"], value: Float[Tensor, "T D"], num_heads: int
    ) -> Float[Tensor, "N D"]:
        count, length = self.shape
        k, v = (x.view(count, length, num_heads, -1).transpose(1, 2) for x in (key, value))  # (B, H, L, D / H)
        q = query.view(count, 1, num_heads, -1).transpose(1, 2)  # (B, H, 1, D / H)
        nothing = ~self.mask.any(1, keepdim=True)  # it has to look somewhere
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=(self.mask | nothing)[:, None, None, :])
        return attended.flatten(1)

    def newest_of(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "N D"]:
        count, length = self.shape
        last = (self.mask * torch.arange(1, length + 1, device=x.device)).argmax(1)  # (B,)
        states = x.view(count, length, -1).gather(1, last.view(-1, 1, 1).expand(-1, -1, x.shape[1]))
        return states.squeeze(1)

    def by_example(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "B D"]:
        return x * self.mask.any(1, keepdim=True)

    def grid(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "B L D"]:
        count, length = self.shape
        return x.view(count, length, -1) * self.mask.unsqueeze(2)


def pack(mask: Bool[Tensor, "B L"]) -> Packed:
    """The items of a batch, packed; unpacked while a graph is exported, which holds no shape that depends on data."""
    return _Whole(mask) if torch.compiler.is_exporting() else Packed(mask)


class Steps:
    """The real items of a batch in one row, T of them, step after step; all histories end at the last step.

    So those that have begun at a step are the first `begun[step]` of the examples, the longest history first: a step
    works on a block, and on nothing else. `example` [T] says whose item it is, `slot` [T] where in [B·L] it stood.
    """

    def __init__(self, mask: Bool[Tensor, "B L"]) -> None:
        self.mask = mask
        counts = mask.sum(1)
        order = counts.argsort(descending=True, stable=True)
        longest = int(counts[order[0]]) if len(mask) else 0
        begins = longest - counts  # (B,) the step of each one's first item
        begun = torch.bincount(begins, minlength=longest)[:longest].cumsum(0)  # (steps,)
        self.begun: list[int] = begun.tolist()
        first = F.pad(begun.cumsum(0), (1, 1))[:-1] if longest else begun.new_zeros(1)
        rank = mask.cumsum(1)  # (B, L) items so far
        step = (begins.unsqueeze(1) + rank - 1).clamp(min=0)
        # where the newest item at or before each slot stands in the row; T where there is none
        place = (first[step] + order.argsort().unsqueeze(1)).masked_fill(rank == 0, sum(self.begun))
        slot = mask.flatten().nonzero().squeeze(1)
        self.slot = torch.empty_like(slot).index_copy(0, place.flatten()[slot], slot)  # (T,)
        self.example = torch.div(self.slot, mask.shape[1], rounding_mode="floor")
        self._place = place

    def __len__(self) -> int:
        return len(self.slot)

    @property
    def real(self) -> Bool[Tensor, "T"]:
        """Which of the T are items."""
        return self.mask.flatten().index_select(0, self.slot)

    def take(self, x: Shaped[Tensor, "B L *D"]) -> Shaped[Tensor, "T *D"]:
        """What a grid holds at the items."""
        return x.flatten(0, 1).index_select(0, self.slot)

    def grid(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "B L D"]:
        """What x holds at the newest item at or before each slot; zero where there is none."""
        return F.pad(x, (0, 0, 0, 1)).index_select(0, self._place.flatten()).view(*self._place.shape, x.shape[1])

    def last(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "B D"]:
        """What stands at the newest item of each example; zero for one without items."""
        ending = self.begun[-1] if self.begun else 0
        start = len(self) - ending
        return x.new_zeros(len(self.mask), x.shape[1]).index_copy(0, self.example[start:], x[start:])

    def sum(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "B D"]:
        """The sum over the items of each example."""
        rows = self.example.unsqueeze(1).expand(-1, x.shape[1])
        return x.new_zeros(len(self.mask), x.shape[1]).scatter_add(0, rows, x)

    def softmax(self, scores: Float[Tensor, "T"]) -> Float[Tensor, "T"]:
        """Over the items of each example."""
        grid = scores.new_full((self.mask.numel(),), -torch.inf).index_copy(0, self.slot, scores)
        return torch.softmax(grid.view(self.mask.shape), 1).flatten().index_select(0, self.slot)

    def pairs(self) -> tuple[Int[Tensor, "Q"], Int[Tensor, "Q"]]:
        """Where the two of all neighbouring items of one example stand: the older ones, the newer ones."""
        widths = torch.tensor(self.begun[:-1], dtype=torch.int64, device=self.slot.device)
        older = torch.arange(int(widths.sum()), device=self.slot.device)
        return older, older + widths.repeat_interleave(widths)


class _AllSteps(Steps):
    """Every slot of the batch, padding too: no shape depends on what the mask holds."""

    def __init__(self, mask: Bool[Tensor, "B L"]) -> None:
        self.mask = mask
        count, length = mask.shape
        self.begun = [count] * length
        self.slot = torch.arange(mask.numel(), device=mask.device).view(mask.shape).T.flatten()
        self.example = torch.div(self.slot, length, rounding_mode="floor")

    def take(self, x: Shaped[Tensor, "B L *D"]) -> Shaped[Tensor, "T *D"]:
        return x.transpose(0, 1).flatten(0, 1)

    def grid(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "B L D"]:
        return x.view(*self.mask.T.shape, x.shape[1]).transpose(0, 1)

    def last(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "B D"]:
        return x.view(*self.mask.T.shape, x.shape[1])[-1]

    def sum(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "B D"]:
        return (self.grid(x) * self.mask.unsqueeze(2)).sum(1)

    def softmax(self, scores: Float[Tensor, "T"]) -> Float[Tensor, "T"]:
        grid = scores.view(self.mask.T.shape).T.masked_fill(~self.mask, torch.finfo(scores.dtype).min)
        return (torch.softmax(grid, 1) * self.mask).T.flatten()


def steps(mask: Bool[Tensor, "B L"]) -> Steps:
    """The items of a batch, step after step; all slots where all are items, and while a graph is exported."""
    return _AllSteps(mask) if torch.compiler.is_exporting() or bool(mask.all()) else Steps(mask)
