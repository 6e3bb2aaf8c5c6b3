"""LS-PLM — a mixture of logistic regressions: a gate divides the space of features, one regression fits each region.

Paper: Gai, Zhu, Li, Liu, Wang. Learning Piece-wise Linear Models from Large Scale Data for Ad Click Prediction. 2017.
       arXiv:1704.05194 (also known as MLR, mixed logistic regression)
Idea:  a click follows different linear rules in different parts of the space. Learn the parts and the rules together;
       with m regions the model is still a few sums of looked-up numbers.

Eq. (2)  p(y=1|x) = Σ_j softmax_j(u_j·x) σ(w_j·x), j = 1..m        forward
         log p = logsumexp_j(log softmax_j(u·x) + log σ(w_j·x)), log(1−p) the same with σ(−w_j·x)
         logit = log p − log(1−p), so that σ(logit) = p            forward (probabilities are mixed, never logits)
Differs: trained by whichever optimiser and penalty the loop was given; the paper's L1 and L2,1 with a quasi-Newton
         method for non-smooth problems are no part of the model. The always-on column is a bias of its own, drawn like
         the other weights because equal regions would stay equal. A field of many values is the mean of their rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.core.config import keeps_config
from funnelrec.core.nn.embedding import FieldEmbedding
from funnelrec.core.schema import Spec

__all__ = ["LSPLM"]

START = 0.1  #: standard deviation of all weights at the start


@keeps_config
class LSPLM(nn.Module):
    """Logit of a click from `num_regions` logistic regressions, mixed by a softmax over regions."""

    def __init__(self, spec: Spec, *, num_regions: int = 12) -> None:
        super().__init__()
        if num_regions < 1:
            raise ValueError(f"num_regions counts the regressions that are mixed, at least 1, received {num_regions}")
        self.num_regions = num_regions
        self.weight = FieldEmbedding(spec, 2 * num_regions, std=START)  # a row is u_1..u_m, w_1..w_m of one value
        self.bias = nn.Parameter(torch.empty(2 * num_regions).normal_(0.0, START))

    def forward(self, batch: Batch) -> Float[Tensor, "B"]:
        """Logits [B] from `ids` and `numbers`; finite also where p is 1 to the last bit."""
        sums = self.weight(batch).sum(1) + self.bias  # (B, F, 2m) -> (B, 2m)
        gate, fit = sums.float().split(self.num_regions, dim=1)  # (B, m) each: u_j·x, w_j·x
        log_gate = torch.log_softmax(gate, dim=1)
        log_p = torch.logsumexp(log_gate + F.logsigmoid(fit), dim=1)  # (B,)   Eq. (2)
        log_not_p = torch.logsumexp(log_gate + F.logsigmoid(-fit), dim=1)
        return log_p - log_not_p
