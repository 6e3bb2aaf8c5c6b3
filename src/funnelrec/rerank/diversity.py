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

        O(k C G²) time, O(C G) memory.
        """
        gain = scores.to(torch.float64)
        kept = min(k, len(gain))
        if self.diversity == 0:
            return gain.argsort(descending=True, stable=True)[:kept]
        gain = gain.clone()
        real = categories != 0  # (C, G)
        chosen = torch.empty(kept, dtype=torch.int64, device=scores.device)
        for place in range(kept):
            best = gain.argmax()  # the first of equal ones
            chosen[place] = best
            gain -= self.diversity * _sameness(categories, real, int(best))
            gain[best] = -torch.inf
        return chosen


def _sameness(categories: Int[Tensor, "C G"], real: Tensor, item: int) -> Float[Tensor, "C"]:
    """1 − g(i, j) of every candidate and one item."""
    own = categories[item][real[item]]  # (g,)
    counts = real.sum(1)
    common = ((categories.unsqueeze(2) == own) & real.unsqueeze(2)).any(2).sum(1)  # (C, G, g) -> (C,)
    union = counts + len(own) - common
    return torch.where(union > 0, common / union.clamp(min=1), 1.0).to(torch.float64)  # two empty sets are the same
