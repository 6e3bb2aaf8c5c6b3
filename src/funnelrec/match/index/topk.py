"""The k best of many scores, with ties to the lower row."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["order_by_score", "top_rows"]


def top_rows(scores: Float[Tensor, "B N"], k: int) -> tuple[Int[Tensor, "B k"], Float[Tensor, "B k"]]:
    """Columns of the k best scores of each line, best first, equal scores in the order of their columns.

    -inf means "never": where fewer than k scores are finite, column 0 and -inf fill the rest.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, received {k}")
    count, width = scores.shape
    kept = min(k, width)
    values, columns = scores.topk(min(kept + 1, width), dim=1)
    if width > kept:
        # topk breaks ties as it likes; it matters only where the first score left out equals the last one taken
        cut = ((values[:, kept] == values[:, kept - 1]) & (values[:, kept] > -torch.inf)).nonzero().squeeze(1)
        values, columns = values[:, :kept], columns[:, :kept]
        if len(cut):
            columns = columns.index_copy(0, cut, _lowest_of_ties(scores[cut], values[cut, -1:], kept))
    columns, values = order_by_score(columns, scores.gather(1, columns))
    columns = columns.masked_fill(values == -torch.inf, 0)
    if kept < k:
        columns = torch.cat([columns, columns.new_zeros(count, k - kept)], 1)
        values = torch.cat([values, values.new_full((count, k - kept), -torch.inf)], 1)
    return columns, values


def order_by_score(
    rows: Int[Tensor, "B M"], scores: Float[Tensor, "B M"]
) -> tuple[Int[Tensor, "B M"], Float[Tensor, "B M"]]:
    """Sort each line by falling score, equal scores by rising row."""
    rows, order = rows.sort(dim=1)
    scores, by_score = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
    return rows.gather(1, by_score), scores


def _lowest_of_ties(scores: Tensor, last: Tensor, k: int) -> Tensor:
    """Columns of the k best where more columns than fit have the score `last` [b, 1]: the lowest of them."""
    better, equal = scores > last, scores == last
    room = k - better.sum(1, keepdim=True)
    chosen = better | (equal & (equal.cumsum(1) <= room))
    return chosen.nonzero()[:, 1].view(-1, k)  # (b, k)
