"""VectorRetriever: a vector model joined to an index is a `Matcher`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.core.contracts import Index, Matcher, VectorMatcher

__all__ = ["VectorRetriever", "item_vectors"]

ROWS_AT_ONCE = 65_536


@contextmanager
def _eval_mode(model: object) -> Iterator[None]:
    """Dropout off inside, as it was afterwards."""
    training = isinstance(model, nn.Module) and model.training
    if isinstance(model, nn.Module):
        model.eval()
    try:
        yield
    finally:
        if isinstance(model, nn.Module):
            model.train(training)


@torch.no_grad()
def item_vectors(model: VectorMatcher, num_items: int) -> Float[Tensor, "N D"]:
    """The vectors of all item rows, in parts of bounded memory, without dropout."""
    with _eval_mode(model):
        parts = [
            model.encode_items(torch.arange(start, min(start + ROWS_AT_ONCE, num_items)))
            for start in range(0, num_items, ROWS_AT_ONCE)
        ]
    return torch.cat(parts)  # (N, D)


class VectorRetriever:
    """Retrieval by maximum inner product; users of whom the model knows nothing get `fallback`'s answer.

    Without a fallback such a user gets row 0 and -inf. `index` must hold `item_vectors(model, N)`.
    """

    def __init__(self, model: VectorMatcher, index: Index, fallback: Matcher | None = None) -> None:
        self.model = model
        self.index = index
        self.fallback = fallback

    @torch.no_grad()
    def recommend(
        self,
        batch: Batch,
        k: int,
        exclude: Int[Tensor, "B X"] | None = None,
        allowed: Bool[Tensor, "N"] | None = None,
    ) -> tuple[Int[Tensor, "B k"], Float[Tensor, "B k"]]:
        """Item rows, best first, and their scores. A fallback's scores are on its own scale."""
        with _eval_mode(self.model):
            queries, valid = self.model.encode_users(batch)  # (B, K, D), (B, K)
        rows, scores = self.index.search(queries, valid, k, exclude, allowed)
        unknown = (~valid.any(1)).nonzero().squeeze(1)
        if self.fallback is not None and len(unknown):
            skipped = None if exclude is None else exclude[unknown]
            rows[unknown], scores[unknown] = self.fallback.recommend(batch.select(unknown), k, skipped, allowed)
        return rows, scores
