"""The language model to beat: counts of what followed, mixed over contexts of all lengths.

Paper: Witten, Bell. The zero-frequency problem. IEEE Transactions on Information Theory. 1991
Idea:  believe what was seen after these words as far as it was seen often; for the rest ask the shorter context.

Eq. (1)  p(w | h) = (#(h, w) + T(h) p(w | h')) / (#(h) + T(h))     T(h) how many different tokens followed h,
                                                                   h' is h without its first token
Eq. (2)  p(w | nothing) begins from 1 / V; a context never seen has # = T = 0 and gives p(w | h')
Differs: nothing; the counts of an order are two sorted arrays of 64-bit codes, so that a look-up is a binary search.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["CountModel"]


class CountModel:
    """An n-gram model of `order` n over `num_tokens` V, from the stream of token rows it is given."""

    def __init__(self, rows: Int[Tensor, "T"], *, num_tokens: int, order: int) -> None:
        if order < 1 or num_tokens**order >= 2**62:
            raise ValueError(f"order is at least 1 and {num_tokens}^order below 2^62, received order {order}")
        if len(rows) < order:
            raise ValueError(f"counts of order {order} need {order} tokens at least, received {len(rows)}")
        self.num_tokens, self.order = num_tokens, order
        self._grams = []
        for n in range(1, order + 1):
            codes, counts = _codes(rows, n, num_tokens).unique(return_counts=True)  # type: ignore[no-untyped-call]
            contexts, different = (codes // num_tokens).unique_consecutive(return_counts=True)
            place = torch.repeat_interleave(torch.arange(len(contexts)), different)
            totals = torch.zeros(len(contexts), dtype=torch.int64).index_add_(0, place, counts)
            self._grams.append((codes, counts, contexts, totals, different))

    def log_probabilities(self, rows: Int[Tensor, "T"]) -> Float[Tensor, "T"]:
        """log p of each token after up to `order` - 1 before it."""
        p = torch.full((len(rows),), 1 / self.num_tokens, dtype=torch.float64)
        for n, (codes, counts, contexts, totals, different) in enumerate(self._grams[: len(rows)], start=1):
            asked = _codes(rows, n, self.num_tokens)
            seen = _found(codes, counts, asked)
            total, kinds = (_found(contexts, values, asked // self.num_tokens) for values in (totals, different))
            shorter = p[n - 1 :]
            p[n - 1 :] = torch.where(total > 0, (seen + kinds * shorter) / (total + kinds).clamp(min=1), shorter)
        return p.log()

    def perplexity(self, rows: Int[Tensor, "T"]) -> float:
        """exp(- mean log p) of every token but the first, as for the language models that learn."""
        return math.exp(-float(self.log_probabilities(rows)[1:].mean()))


def _codes(rows: Tensor, n: int, base: int) -> Tensor:
    """Each run of n tokens as one number, the last token its lowest digit."""
    code = torch.zeros(len(rows) - n + 1, dtype=torch.int64)
    for i in range(n):
        code = code * base + rows[i : len(rows) - n + 1 + i]
    return code


def _found(keys: Tensor, values: Tensor, asked: Tensor) -> Tensor:
    """The value of each key that is asked for, 0 where there is none."""
    place = torch.searchsorted(keys, asked).clamp(max=len(keys) - 1)
    return values[place] * (keys[place] == asked)
