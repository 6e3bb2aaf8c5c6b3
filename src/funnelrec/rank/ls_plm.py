"""LS-PLM — a mixture of logistic regressions: a gate divides the space of features, one regression fits each region.

Paper: Gai, Zhu, Li, Liu, Wang. Learning Piece-wise Linear Models from Large Scale Data for Ad Click Prediction. 2017.
       arXiv:1704.05194 (also known as MLR, mixed logistic regression)
Idea:  a click follows different linear rules in different parts of the space. Learn the parts and the rules together;
       with m regions the model is still a few sums of looked-up numbers.

Eq. (2)  p(y=1|x) = Σ_j softmax_j(u_j·x) σ(w_j·x), j = 1..m        forward
         log p = logsumexp_j(log softmax_j(u·x) + log σ(w_j·x)), log(1−p) the same with σ(−w_j·x)
         logit = log p − log(1−p), so that σ(logit) = p            forward (probabilities are mixed, never logits)
         Eq. (5)'s penalties, L1 and L2,1 over the 2m numbers of a value: learn.regularise.Proximal on "weight"
         Structural prior: some fields divide the space, others fit it     `dividing`, `fitting`
         Common features: what a page's candidates share is summed once    sums, mix
Differs: the paper's quasi-Newton method is replaced by a gradient step and the penalties' proximal step. The always-on
         column is a bias of its own, drawn like the other weights because equal regions would stay equal. A field of
         many values is the mean of their rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.core.config import keeps_config
from funnelrec.core.nn.embedding import FieldEmbedding
from funnelrec.core.schema import Side, Spec

__all__ = ["LSPLM"]

START = 0.1  #: standard deviation of all weights at the start


@keeps_config
class LSPLM(nn.Module):
    """Logit of a click from `num_regions` logistic regressions, mixed by a softmax over regions.

    `dividing` names the fields that the gate reads, `fitting` those that the regressions read; absent, all of them.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        num_regions: int = 12,
        dividing: Sequence[str] | None = None,
        fitting: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if num_regions < 1:
            raise ValueError(f"num_regions counts the regressions that are mixed, at least 1, received {num_regions}")
        self.spec = spec
        self.num_regions = num_regions
        self.weight = FieldEmbedding(spec, 2 * num_regions, std=START)  # a row is u_1..u_m, w_1..w_m of one value
        self.bias = nn.Parameter(torch.empty(2 * num_regions).normal_(0.0, START))
        names = [c.name for c in spec.categories] + [n.name for n in spec.numbers for _ in range(n.start, n.stop)]
        reads = [_which(names, chosen, what) for chosen, what in ((dividing, "dividing"), (fitting, "fitting"))]
        self.register_buffer("reads", torch.stack(reads, 1).float().repeat_interleave(num_regions, 1), persistent=False)
        self.reads: Tensor  # (F, 2m): 1 where a field has a say

    def sums(self, batch: Batch, *sides: Side) -> Float[Tensor, "B M"]:
        """u·x and w·x over the fields of some `sides` (absent: all), without the bias.

        A user's part may come from a batch of one row and be added to the items' part of many: each is looked up once.
        """
        parts = []
        fields = self.spec.categories
        for side in sides or ("user", "item", "context"):
            own = [n for n, field in enumerate(fields) if field.side == side]
            if own:
                columns = slice(fields[own[0]].start, fields[own[-1]].stop)
                looked_up = self.weight.lookup(batch.ids[:, columns], columns)  # (B, f, 2m)
                parts.append((looked_up * self.reads[own[0] : own[-1] + 1]).sum(1))
            numbers = [n for n in self.spec.numbers if n.side == side]
            if numbers and self.weight.number_vectors is not None:
                at, to = numbers[0].start, numbers[-1].stop
                vectors = self.weight.number_vectors[at:to] * self.reads[len(fields) + at : len(fields) + to]
                parts.append(batch.numbers[:, at:to] @ vectors)  # (B, n) @ (n, 2m)
        return sum(parts, torch.zeros_like(self.bias))

    def mix(self, sums: Float[Tensor, "B M"]) -> Float[Tensor, "B"]:
        """Logits [B] of all the sums of an example; finite also where p is 1 to the last bit."""
        gate, fit = torch.split((sums + self.bias).float(), self.num_regions, dim=1)  # (B, m) each: u_j·x, w_j·x
        log_gate = torch.log_softmax(gate, dim=1)
        log_p = torch.logsumexp(log_gate + F.logsigmoid(fit), dim=1)  # (B,)   Eq. (2)
        log_not_p = torch.logsumexp(log_gate + F.logsigmoid(-fit), dim=1)
        return log_p - log_not_p

    def forward(self, batch: Batch) -> Float[Tensor, "B"]:
        """Logits [B] from `ids` and `numbers`."""
        return self.mix(self.sums(batch))


def _which(names: list[str], chosen: Sequence[str] | None, what: str) -> Tensor:
    """Which of `names` are chosen, bool [F]."""
    unknown = [name for name in chosen or () if name not in names]
    if unknown:
        raise ValueError(f"{what} names '{unknown[0]}', which is no field; there are {', '.join(dict.fromkeys(names))}")
    return torch.tensor([chosen is None or name in chosen for name in names])
