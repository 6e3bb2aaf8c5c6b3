"""Item graph: which items the same people took, and the neighbourhoods that are drawn from it (PMGT, Section 3.2).

Edges are counted in blocks of bounded memory and drawn by one search in the running sum of all weights, so nothing
loops over items. Item rows are those of a Dataset: 0 is padding and is never a node with neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["ItemGraph"]

BLOCK_BYTES = 64 * 2**20  #: of one block of users × items while counting


@dataclass(frozen=True)
class ItemGraph:
    """An undirected weighted graph of N items as lists of neighbours: those of item i are at offsets[i]..offsets[i+1].

    Every edge stands in both lists. Neighbours of an item are in rising order.
    """

    offsets: Int[Tensor, "M"]  # N + 1
    neighbours: Int[Tensor, "E"]
    weights: Float[Tensor, "E"]  # float64, above 0

    @classmethod
    def from_interactions(
        cls,
        users: Int[Tensor, "n"],
        items: Int[Tensor, "n"],
        num_items: int,
        *,
        min_count: int = 3,
        min_cosine: int | float = 0.0,
    ) -> ItemGraph:
        """Items that at least `min_count` users took both of, and whose cosine over users is at least `min_cosine`.

        w_ij = (ln c_ij + 1) / (ln √(deg_i deg_j) + 1), c_ij the users in common and deg the neighbours of an item.
        """
        _, people = users.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        pairs = torch.stack([people, items]).unique(dim=1)  # type: ignore[no-untyped-call]
        people, items = pairs[0], pairs[1]
        count = int(people.max()) + 1 if len(people) else 0
        ones = torch.ones(len(items))
        by_item = torch.sparse_coo_tensor(
            torch.stack([items, people]), ones, (num_items, count), check_invariants=False
        )
        popularity = torch.bincount(items, minlength=num_items).float()
        width = max(1, BLOCK_BYTES // (4 * max(1, count)))
        rows, columns, counts = [], [], []
        for first in range(0, num_items, width):
            inside = (items >= first) & (items < first + width)
            block = torch.zeros(count, min(width, num_items - first))
            block[people[inside], items[inside] - first] = 1.0
            together = torch.sparse.mm(by_item, block).T  # (b, N) users in common
            enough = together >= min_count
            if min_cosine > 0:
                norms = (popularity[first : first + width, None] * popularity).sqrt()
                enough &= together >= min_cosine * norms
            row, column = enough.nonzero(as_tuple=True)
            apart = row + first != column
            rows.append(row[apart] + first)
            columns.append(column[apart])
            counts.append(together[row[apart], column[apart]])
        row, column = torch.cat(rows), torch.cat(columns)
        degree = torch.bincount(row, minlength=num_items).double()
        weight = (torch.cat(counts).double().log() + 1) / (0.5 * (degree[row] * degree[column]).log() + 1)
        return cls._of(row, column, weight, num_items)

    @classmethod
    def _of(cls, row: Tensor, column: Tensor, weight: Tensor, num_items: int) -> ItemGraph:
        offsets = torch.zeros(num_items + 1, dtype=torch.int64)
        offsets[1:] = torch.bincount(row, minlength=num_items).cumsum(0)
        return cls(offsets, column, weight)

    @property
    def num_items(self) -> int:
        """N."""
        return len(self.offsets) - 1

    @cached_property
    def degree(self) -> Int[Tensor, "N"]:
        """Neighbours of each item."""
        return self.offsets.diff()

    @cached_property
    def rows(self) -> Int[Tensor, "E"]:
        """The item whose list each entry of `neighbours` stands in."""
        return torch.arange(self.num_items).repeat_interleave(self.degree)

    @cached_property
    def _running(self) -> Tensor:
        return torch.cat([self.weights.new_zeros(1), self.weights.cumsum(0)])

    def without(self, nodes: Int[Tensor, "n"]) -> ItemGraph:
        """The same graph when nothing is known of these items: all their edges are gone."""
        gone = torch.zeros(self.num_items, dtype=torch.bool)
        gone[nodes] = True
        kept = ~(gone[self.rows] | gone[self.neighbours])
        return self._of(self.rows[kept], self.neighbours[kept], self.weights[kept], self.num_items)

    def draw(self, nodes: Int[Tensor, "n"], count: int, generator: torch.Generator | None) -> Int[Tensor, "n count"]:
        """Neighbours of each node with replacement, in proportion to their weights; 0 where there are none."""
        start, stop = self.offsets[nodes], self.offsets[nodes + 1]
        low, high = self._running[start], self._running[stop]
        u = torch.rand(len(nodes), count, generator=generator, dtype=torch.float64)
        place = torch.searchsorted(self._running, low[:, None] + u * (high - low)[:, None], right=True) - 1
        place = torch.minimum(place.clamp(min=0), (stop - 1).clamp(min=0)[:, None])
        drawn = self.neighbours[place] if len(self.neighbours) else torch.zeros_like(place)
        return drawn.masked_fill((start == stop)[:, None], 0)

    def contexts(
        self, nodes: Int[Tensor, "B"], hops: Sequence[int], size: int, generator: torch.Generator | None
    ) -> tuple[Int[Tensor, "B S"], Bool[Tensor, "B S"]]:
        """The `size` items most often met around each node, most important first, and which of them there are.

        From a node hops[0] neighbours are drawn, from each of these hops[1], and so on: K hops. A visit at hop k
        counts K − k + 1; the node itself is no part of its context. Equal scores go to the lower row.
        """
        if not hops or min(hops) < 1 or size < 1:
            raise ValueError(f"hops and size are positive, received hops={tuple(hops)} and size={size}")
        owner, at = torch.arange(len(nodes)), nodes
        keys, scores = [], []
        for hop, count in enumerate(hops):
            at = self.draw(at, count, generator).flatten()
            owner = owner.repeat_interleave(count)
            real = (at > 0) & (at != nodes[owner])
            keys.append((owner * self.num_items + at)[real])
            scores.append(torch.full((int(real.sum()),), len(hops) - hop))
        met, place = torch.cat(keys).unique(return_inverse=True)  # type: ignore[no-untyped-call]
        score = torch.zeros(len(met), dtype=torch.int64).index_add_(0, place, torch.cat(scores))
        whose, item = met // self.num_items, met % self.num_items
        order = (whose * (int(score.max()) + 1 if len(score) else 1) - score).argsort(stable=True)
        whose, item = whose[order], item[order]
        first = torch.searchsorted(whose, torch.arange(len(nodes)))
        rank = torch.arange(len(whose)) - first[whose]
        chosen = rank < size
        context = torch.zeros(len(nodes), size, dtype=torch.int64)
        context[whose[chosen], rank[chosen]] = item[chosen]
        return context, context > 0
