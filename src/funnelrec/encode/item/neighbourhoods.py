"""Neighbourhoods: items with their features and what is drawn around them, as batches for `learn.fit` (PMGT)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from funnelrec.core.batch import Batch
from funnelrec.encode.item.graph import ItemGraph

__all__ = ["VISIBLE", "Neighbourhoods"]

HOPS = (10, 5, 2)  #: neighbours drawn at each hop
VISIBLE, ZEROED, KEPT, SWAPPED = 0, 1, 2, 3  #: what is done to a slot's features; all but the first are to be restored


@dataclass(frozen=True)
class Neighbourhoods:
    """Items with their features and drawn contexts, as batches for `learn.fit` (an example is an item of `nodes`).

    `features` [N, ΣM] of all modalities side by side, `present` [N, m] which of them an item has. Row 0 is padding.
    A batch holds the item, one of its neighbours and a stranger, drawn uniformly: `features` [B, 3, 1 + S, ΣM],
    `present`, `mask` (real slots), `fate` (what was done to each slot's features) and `original` features.
    """

    graph: ItemGraph
    features: Float[Tensor, "N F"]
    present: Bool[Tensor, "N m"]
    nodes: Int[Tensor, "n"]
    size: int = 10
    hidden: float = 0.2  #: share of the context whose features are hidden
    alone: float = 0.2  #: share of the contexts that are taken away

    def __len__(self) -> int:
        return len(self.nodes)

    def context(self, nodes: Int[Tensor, "n"], generator: torch.Generator | None) -> Batch:
        """The slots of some items, nothing hidden: `features`, `present`, `mask`, and `slots` (item rows)."""
        context, real = self.graph.contexts(nodes, HOPS, self.size, generator)
        slots = torch.cat([nodes[:, None], context], 1)  # (n, 1 + S)
        mask = torch.cat([torch.ones(len(nodes), 1, dtype=torch.bool), real], 1)
        return Batch(features=self.features[slots], present=self.present[slots], mask=mask, slots=slots)

    def gather(self, index: Int[Tensor, "B"], generator: torch.Generator | None) -> Batch:
        target = self.nodes[index]
        neighbour = self.graph.draw(target, 1, generator).squeeze(1)
        stranger = self.nodes[torch.randint(len(self.nodes), (len(index),), generator=generator)]
        trio = torch.stack([target, neighbour, stranger], 1)  # (B, 3)
        drawn = self.context(trio.flatten(), generator)
        mask, slots = drawn.mask, drawn.slots
        mask[:, 1:] &= torch.rand(len(mask), 1, generator=generator) >= self.alone
        chance = torch.rand(mask.shape, generator=generator)
        fate = torch.full(mask.shape, VISIBLE)
        for kind, below in ((SWAPPED, 1.0), (KEPT, 0.9), (ZEROED, 0.8)):  # 80 % zeroed, 10 % kept, 10 % another's
            fate[chance < self.hidden * below] = kind
        fate[:, 0] = VISIBLE
        fate = fate.masked_fill(~mask, VISIBLE)
        other = self.nodes[torch.randint(len(self.nodes), mask.shape, generator=generator)]
        shown = torch.where(fate == SWAPPED, other, slots)
        zeroed = (fate == ZEROED).unsqueeze(-1)
        batch = {
            "features": self.features[shown].masked_fill(zeroed, 0.0),
            "present": self.present[shown] & ~zeroed,
            "mask": mask,
            "fate": fate,
            "original": self.features[slots],
            "restorable": self.present[slots],
            "known": (neighbour > 0)[:, None].expand(-1, 3).reshape(-1),
        }
        return Batch(**{name: t.view(-1, 3, *t.shape[1:]) for name, t in batch.items()})
