"""ExactIndex: maximum inner product search over every item. Exact, needs no training, right up to ~200,000 items.

Items are gone through in blocks for many users at once. From the second block on, a user's k-th best score so far is a
bar that few items clear, so one comparison a score replaces sorting. Beyond that size `FaissIndex` is faster; both give
the same answers in the same order.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from funnelrec.core.nn.linear import linear
from funnelrec.core.shapes import FIRST_KNOWN
from funnelrec.match.index.topk import order_by_score, top_rows

__all__ = ["ExactIndex"]

SCORES_AT_ONCE = 2**22  #: scores alive at a time (16 MiB); more users than fit are answered in parts
ITEMS_AT_ONCE = 2**14  #: items of a block


class ExactIndex:
    """All items against all queries, in parts of bounded memory.

    `vectors` [N, D] belong to the item rows 0..N-1 and are kept as they are (no copy where they are float32 and
    contiguous). Raises ValueError when one of them is not finite.
    """

    def __init__(self, vectors: Float[Tensor, "N D"]) -> None:
        self.vectors = checked_vectors(vectors)

    @torch.no_grad()
    def search(
        self,
        queries: Float[Tensor, "B K D"],
        valid: Bool[Tensor, "B K"],
        k: int,
        exclude: Int[Tensor, "B X"] | None = None,
        allowed: Bool[Tensor, "N"] | None = None,
    ) -> tuple[Int[Tensor, "B k"], Float[Tensor, "B k"]]:
        """Item rows by falling score, ties to the lower row; (row 0, -inf) where fewer than k items qualify.

        An item's score is its best product over the valid queries of the user. Rows 0 and 1, the rows of `exclude`
        and rows where `allowed` is False are never returned.
        """
        count, interests, dim = queries.shape
        if dim != self.vectors.shape[1]:
            raise ValueError(f"queries are {dim} wide but item vectors {self.vectors.shape[1]}; use one model for both")
        users_at_once = max(1, SCORES_AT_ONCE // (interests * min(ITEMS_AT_ONCE, len(self.vectors))))
        parts = []
        for start in range(0, count, users_at_once):
            part = slice(start, start + users_at_once)
            skipped = None if exclude is None else exclude[part]
            parts.append(self._best(queries[part], valid[part], k, skipped, allowed))
        if not parts:
            return torch.zeros(0, k, dtype=torch.int64), torch.zeros(0, k)
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def _best(
        self, queries: Tensor, valid: Tensor, k: int, exclude: Tensor | None, allowed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        rows, values = queries.new_zeros(0, dtype=torch.int64), queries.new_zeros(0)
        for start in range(0, len(self.vectors), ITEMS_AT_ONCE):
            block = slice(start, min(start + ITEMS_AT_ONCE, len(self.vectors)))
            scores = self._scores(queries, valid, self.vectors[block])  # (b, n)
            if allowed is not None:
                scores.masked_fill_(~allowed[block], -torch.inf)
            if exclude is not None:
                user, place = ((exclude >= start) & (exclude < block.stop)).nonzero(as_tuple=True)
                scores[user, exclude[user, place] - start] = -torch.inf
            if start == 0:
                scores[:, :FIRST_KNOWN] = -torch.inf
                rows, values = top_rows(scores, k)
            else:
                found, better = _above(scores, values[:, -1:], k)
                rows, values = order_by_score(torch.cat([rows, found + start], 1), torch.cat([values, better], 1))
                rows, values = rows[:, :k], values[:, :k]
        return rows.masked_fill(values == -torch.inf, 0), values

    @staticmethod
    def _scores(queries: Tensor, valid: Tensor, vectors: Tensor) -> Float[Tensor, "b n"]:
        count, interests, _ = queries.shape
        scores = linear(queries.flatten(0, 1), vectors).view(count, interests, -1)  # (b, K, n)
        if not valid.all():
            scores = scores.masked_fill_(~valid.unsqueeze(2), -torch.inf)
        return scores[:, 0] if interests == 1 else scores.amax(1)


def _above(
    scores: Float[Tensor, "b n"], bar: Float[Tensor, "b 1"], k: int
) -> tuple[Int[Tensor, "b m"], Float[Tensor, "b m"]]:
    """The columns of each line whose score is above its bar, or the k best of them; -inf fills the rest. An item with
    just the bar's score stands behind those that set it: their rows are lower."""
    user, column = (scores > bar).nonzero(as_tuple=True)  # users rising
    counts = torch.bincount(user, minlength=len(scores))
    most = int(counts.max())
    if most > k:
        return top_rows(scores, k)
    place = torch.arange(len(user)) - (counts.cumsum(0) - counts)[user]
    columns = user.new_zeros(len(scores), most)
    values = scores.new_full((len(scores), most), -torch.inf)
    columns[user, place], values[user, place] = column, scores[user, column]
    return columns, values


def checked_vectors(vectors: Tensor) -> Float[Tensor, "N D"]:
    """Detached contiguous float32 item vectors; ValueError when one is not finite or there are no known rows."""
    vectors = vectors.detach().to(torch.float32).contiguous()
    if len(vectors) <= FIRST_KNOWN:
        raise ValueError(f"an index needs vectors of at least one known item, received {len(vectors)} rows")
    finite = vectors.isfinite().all(1)
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise ValueError(f"the vector of item row {row} is not finite; train with a lower learning rate or clip_norm")
    return vectors
