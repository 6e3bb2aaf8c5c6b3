"""ControllableDiversity — trade the score of a list against how different its items are.

Paper: Cen, Zhang, Zou, Zhou, Yang, Tang. Controllable Multi-Interest Framework for Recommendation. KDD 2020.
       arXiv:2005.09347
Idea:  take the items one by one; an item loses `diversity` for every chosen item of its own category.

Eq. (12)     Q(u, S) = Σ_{i∈S} f(u, i) + λ Σ_{i∈S} Σ_{j∈S} g(i, j)          what the greedy choice climbs
Eq. (13)     g(i, j) = [CATE(i) ≠ CATE(j)]                                   _sameness is 1 − g
Algorithm 2  add argmax_i f(u, i) + λ Σ_{j∈S} g(i, j)                        rerank
Differs:
- Items may have several categories: g(i, j) = 1 − |A ∩ B| / |A ∪ B|, which is Eq. (13) when each has one. Items without
  any category count as one category of their own.
- f(u, i) − λ Σ (1 − g(i, j)) is maximised. |S| is common to all candidates, so the choice is the same.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from funnelrec.core.config import keeps_config
from funnelrec.core.schema import Spec

__all__ = ["ControllableDiversity"]


def _many_hot(categories: Int[Tensor, "C G"]) -> Float[Tensor, "C V"]:
    """1 where a candidate has a category; column 0 stands for having none."""
    values, column = torch.unique(categories, return_inverse=True)
    hot = torch.zeros(len(categories), len(values) + 1, dtype=torch.float64)
    hot.scatter_add_(1, column + 1, (categories != 0).double())
    hot.clamp_(max=1.0)
    hot[:, 0] = hot.sum(1) == 0
    return hot


def _sameness(hot: Float[Tensor, "C V"], counts: Float[Tensor, "C"], item: Int[Tensor, ""]) -> Float[Tensor, "C"]:
    """1 − g(i, j) of every candidate and one item."""
    common = hot @ hot[item]  # (C,)
    return common / (counts + counts[item] - common)


@keeps_config
class ControllableDiversity:
    """`diversity` is λ in units of the score: 0 keeps the k best; a very large one takes distinct categories first.

    `spec` is taken as every model takes it, and not needed.
    """

    def __init__(self, spec: Spec | None = None, *, diversity: int | float = 0.05) -> None:
        if diversity < 0:
            raise ValueError(f"diversity must be at least 0, received {diversity}")
        self.diversity = diversity

    def rerank(
        self, scores: Float[Tensor, "C"], k: int, *, categories: Int[Tensor, "C G"], vectors: Float[Tensor, "C D"]
    ) -> Int[Tensor, "k"]:
        """Positions of the chosen candidates in the order chosen; ties to the earlier candidate. `vectors` is unused.

        O(k C V) time, O(C V) memory, V the distinct categories of the candidates.
        """
        gain = scores.to(torch.float64)
        kept = min(k, len(gain))
        if self.diversity == 0:
            return gain.argsort(descending=True, stable=True)[:kept]
        gain = gain.clone()
        hot = _many_hot(categories)  # (C, V)
        counts = hot.sum(1)
        chosen = torch.empty(kept, dtype=torch.int64, device=scores.device)
        for place in range(kept):
            best = gain.argmax()  # the first of equal ones
            chosen[place] = best
            gain -= self.diversity * _sameness(hot, counts, best)
            gain[best] = -torch.inf
        return chosen
