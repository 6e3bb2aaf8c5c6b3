"""MMR — maximal marginal relevance: every next item is good and unlike all that stand before it.

Paper: Carbonell, Goldstein. The Use of MMR, Diversity-Based Reranking for Reordering Documents and Producing
       Summaries. SIGIR 1998.
Idea:  an item's worth falls with its likeness to the most similar item already in the list.

Eq. (1)  MMR = argmax_{i∉S} [λ Sim1(i, query) − (1 − λ) max_{j∈S} Sim2(i, j)]     rerank
Differs:
- Sim1 is the score of the stage before, moved to [0, 1] over the candidates, since its scale may be any.
- Sim2 is the cosine of the item vectors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from funnelrec.core.config import keeps_config
from funnelrec.core.schema import Spec

__all__ = ["MMR"]


@keeps_config
class MMR:
    """`trade_off` is λ: 1 keeps the k best, 0 looks at novelty alone (after the best item).

    `spec` is taken as every model takes it, and not needed.
    """

    def __init__(self, spec: Spec | None = None, *, trade_off: int | float = 0.7) -> None:
        if not 0 <= trade_off <= 1:
            raise ValueError(f"trade_off must lie in [0, 1], received {trade_off}")
        self.trade_off = trade_off

    def rerank(
        self, scores: Float[Tensor, "C"], k: int, *, categories: Int[Tensor, "C G"], vectors: Float[Tensor, "C D"]
    ) -> Int[Tensor, "k"]:
        """Positions of the chosen candidates in the order chosen; ties to the earlier one. `categories` is unused.

        O(k C D) time, O(C D) memory.
        """
        kept = min(k, len(scores))
        relevance = scores.to(torch.float64)
        if self.trade_off == 1 or kept < 2:
            return relevance.argsort(descending=True, stable=True)[:kept]
        low, high = relevance.min(), relevance.max()
        relevance = (relevance - low) / (high - low).clamp(min=torch.finfo(torch.float64).tiny)  # (C,) in [0, 1]
        unit = F.normalize(vectors.to(torch.float64), dim=1)  # (C, D)
        chosen = torch.empty(kept, dtype=torch.int64, device=scores.device)
        chosen[0] = relevance.argmax()  # nothing to be unlike yet
        nearest = unit @ unit[chosen[0]]  # (C,) cosine to the most similar chosen item
        relevance[chosen[0]] = -torch.inf
        for place in range(1, kept):
            value = self.trade_off * relevance - (1 - self.trade_off) * nearest
            value[chosen[:place]] = -torch.inf  # 0 · -inf is no number
            chosen[place] = value.argmax()  # the first of equal ones
            nearest = torch.maximum(nearest, unit @ unit[chosen[place]])
        return chosen
