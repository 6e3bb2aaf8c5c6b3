"""Session-based recommendation as it is measured in the literature: after each event of a session, the next one.

The whole catalogue is ranked, items seen before are allowed, and equal scores count against the model. Items that
training never saw are left out of the sessions first, as GRU4Rec's authors do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from funnelrec.core.batch import Batch
from funnelrec.core.nn.linear import linear
from funnelrec.core.shapes import FIRST_KNOWN
from funnelrec.data.histories import Histories

__all__ = ["Positions", "evaluate_sessions", "next_item_ranks"]


@runtime_checkable
class Positions(Protocol):
    """A matcher with a vector after each item of a history."""

    def encode_positions(self, batch: Batch) -> Tensor: ...

    def encode_items(self, rows: Tensor) -> Tensor: ...


@torch.inference_mode()
def next_item_ranks(
    model: Positions, sessions: Histories, num_items: int, *, max_len: int = 200, batch_size: int = 256
) -> Int[Tensor, "P"]:
    """The rank, 1 = best, of each next item of each session among the items FIRST_KNOWN..num_items - 1.

    Of a session the newest `max_len` + 1 events with known items count. The model must be in eval mode.
    """
    sessions = _known(sessions, num_items)
    catalogue = model.encode_items(torch.arange(FIRST_KNOWN, num_items))  # (N - 2, D)
    lengths = sessions.offsets[1:] - sessions.offsets[:-1]
    order = lengths.argsort(stable=True)
    order = order[lengths[order] > 1]
    ranks = []
    for users in torch.split(order, batch_size) if len(order) else ():
        longest = min(int(lengths[users].max()), max_len + 1)
        items, _, mask = sessions.take(sessions.offsets[users], sessions.offsets[users + 1], longest)
        asked = mask[:, :-1]
        vectors = model.encode_positions(Batch(history=items[:, :-1], mask=asked))[asked]  # (P, D)
        scores = linear(vectors, catalogue)
        own = scores.gather(1, items[:, 1:][asked].unsqueeze(1) - FIRST_KNOWN)
        ranks.append((~(scores < own)).sum(1))  # a score that is not a number is no win either
    return torch.cat(ranks) if ranks else torch.zeros(0, dtype=torch.int64)


def evaluate_sessions(
    model: Positions, sessions: Histories, num_items: int, *, ks: Sequence[int] = (20,), max_len: int = 200
) -> dict[str, float]:
    """recall@k and mrr@k (1 / rank where it is at most k, else 0), means over all events but the first of a session.

    Raises ValueError when no session has two known items.
    """
    ranks = next_item_ranks(model, sessions, num_items, max_len=max_len).double()
    if not len(ranks):
        raise ValueError("no session has two events with known items: there is nothing to predict")
    result: dict[str, float] = {}
    for k in ks:
        found = ranks <= k
        result |= {f"recall@{k}": float(found.double().mean()), f"mrr@{k}": float((found / ranks).mean())}
    return result


def _known(sessions: Histories, num_items: int) -> Histories:
    """The sessions without items that have no row of their own."""
    kept = (sessions.items >= FIRST_KNOWN) & (sessions.items < num_items)
    before = torch.cat([torch.zeros(1, dtype=torch.int64), kept.cumsum(0)])
    return Histories(before[sessions.offsets].numpy(), sessions.items[kept].numpy(), sessions.times[kept].numpy())
