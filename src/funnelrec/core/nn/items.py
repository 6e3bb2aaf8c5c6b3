"""What retrieval models that read a history of items share."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from funnelrec.core.batch import Batch
from funnelrec.core.nn.content import ContentTable
from funnelrec.core.nn.embedding import Table
from funnelrec.core.schema import Spec
from funnelrec.core.shapes import FIRST_KNOWN, PADDING, UNKNOWN

__all__ = ["any_known", "closest_interest", "item_table", "newest_items"]


def item_table(spec: Spec, dim: int, *, std: float, owner: str) -> Table:
    """One vector an item, N(0, std²), joined to its content where the spec has any; padding and the unknown item start
    at zero. `owner` is named in the message."""
    if spec.num_items <= FIRST_KNOWN:
        raise ValueError(f"{owner} needs a catalogue; the spec has {spec.num_items} item rows, name the item column")
    if spec.content_dim:
        table: Table = ContentTable(spec.num_items, dim, content_dim=spec.content_dim, std=std)
    else:
        table = Table(spec.num_items, dim, std=std)
    with torch.no_grad():
        table.weight[UNKNOWN].zero_()
    return table


def newest_items(batch: Batch, max_len: int) -> tuple[Int[Tensor, "B L"], Bool[Tensor, "B L"]]:
    """The newest `max_len` slots of the history, and which of them are real."""
    history = batch.history[:, -max_len:]
    return history, batch.mask[:, -max_len:] & (history != PADDING)


def any_known(history: Int[Tensor, "B L"], mask: Bool[Tensor, "B L"]) -> Bool[Tensor, "B"]:
    """Whether a history holds an item that training saw: without one, nothing is known of the user."""
    return ((history >= FIRST_KNOWN) & mask).any(1)


def closest_interest(
    interests: Float[Tensor, "B K D"], valid: Bool[Tensor, "B K"], target: Float[Tensor, "B D"]
) -> Float[Tensor, "B D"]:
    """The valid interest with the largest product with the target; the others receive no gradient."""
    with torch.no_grad():
        scores = (interests @ target.unsqueeze(-1)).squeeze(-1)  # (B, K)
        chosen = scores.masked_fill(~valid, -torch.inf).argmax(1)
    return interests[torch.arange(len(chosen), device=chosen.device), chosen]  # (B, D)
