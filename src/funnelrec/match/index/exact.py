"""ExactIndex: maximum inner product search by one matrix product. Exact, needs no training, right up to ~200,000 items.

Beyond that `FaissIndex` is faster; both give the same answers in the same order.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from funnelrec.core.shapes import FIRST_KNOWN
from funnelrec.match.index.topk import top_rows

__all__ = ["ExactIndex"]

SCORES_AT_ONCE = 2**24  #: scores alive at a time (64 MiB); more users than fit are answered in parts


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
        at_once = max(1, SCORES_AT_ONCE // (interests * len(self.vectors)))
        parts = []
        for start in range(0, count, at_once):
            part = slice(start, start + at_once)
            scores = self._scores(queries[part], valid[part])  # (b, N)
            if allowed is not None:
                scores.masked_fill_(~allowed, -torch.inf)
            if exclude is not None:
                scores.scatter_(1, exclude[part], -torch.inf)  # the filler 0 of `exclude` falls on row 0
            scores[:, :FIRST_KNOWN] = -torch.inf
            parts.append(top_rows(scores, k))
        if not parts:
            return torch.zeros(0, k, dtype=torch.int64), torch.zeros(0, k)
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def _scores(self, queries: Tensor, valid: Tensor) -> Float[Tensor, "b N"]:
        count, interests, _ = queries.shape
        scores = (queries.flatten(0, 1) @ self.vectors.T).view(count, interests, -1)  # (b, K, N)
        if not valid.all():
            scores = scores.masked_fill_(~valid.unsqueeze(2), -torch.inf)
        return scores[:, 0] if interests == 1 else scores.amax(1)


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
