"""LogisticRegression — one weight for each value of each field; the baseline that every ranker has to beat.

Paper: McMahan et al. Ad click prediction: a view from the trenches. KDD 2013. doi:10.1145/2487575.2488200
Idea:  the logit is a sum of weights, so a step costs one look-up a field and the model can be read off its table.

Eq. (1)  p = σ(w·x)       forward (we return the logit w·x + b; σ lives in the loss)
Differs: trained by whichever optimiser the loop was given; FTRL-Proximal, the paper's, is an optimiser and not a model.
         A field of many values adds the mean of their weights, not the sum; a number adds weight times value.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.core.config import keeps_config
from funnelrec.core.nn.embedding import FieldEmbedding
from funnelrec.core.schema import Spec

__all__ = ["LogisticRegression"]


@keeps_config
class LogisticRegression(nn.Module):
    """Logit of a click as a sum of one weight a field."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.weight = FieldEmbedding(spec, 1, std=0.0)  # starts at w = 0
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, batch: Batch) -> Float[Tensor, "B"]:
        """Logits [B] from `ids` and `numbers`."""
        logit: Tensor = self.weight(batch).sum((1, 2)) + self.bias  # (B, F, 1) -> (B,)   Eq. (1)
        return logit
