"""BestInterestSoftmax: a softmax over the score that serving uses, the best product with any of a user's interests.

Paper: Weston, Weiss, Yee. Nonlinear Latent Factorization by Embedding Multiple User Interests. RecSys 2013 (the score).

`FullSoftmax` and `SampledSoftmax` train a multi-interest model as its papers do: the target chooses an interest, and
only that one is compared with the other items. An interest is then never told which items it puts too high for users
who have no use for it, though serving lets it put them into the list. Here the score is max_k ⟨v_k, e⟩ for the target
and for every other item alike. What that is worth: docs/matching.md
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from funnelrec.core.batch import Batch
from funnelrec.core.shapes import FIRST_KNOWN
from funnelrec.learn.samplers import Sampler, Uniform

__all__ = ["BestInterestSoftmax"]

SCORES_BYTES = 64 * 2**20  #: of scores of all interests that are kept for the backward pass; more are computed again


@dataclass(frozen=True)
class BestInterestSoftmax:
    """Mean of -log(exp f(u, target) / Σ_i exp f(u, i)), f(u, i) = max_k ⟨v_k, e_i⟩ / temperature.

    The sum is over the whole catalogue, or, with `num_negatives`, over the target and a shared sample, whose log-Q is
    subtracted as in `SampledSoftmax` (`sampler` absent: uniform). For models of one target a user and item rows.
    """

    num_negatives: int = 0
    sampler: Sampler | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.num_negatives < 0 or not self.temperature > 0:
            raise ValueError(
                "num_negatives must be at least 0 (the whole catalogue) and temperature positive, received "
                f"{self.num_negatives} and {self.temperature}"
            )

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        target = batch.target
        if target.dim() != 1:
            raise ValueError("BestInterestSoftmax needs one target a user; make examples of mode='cut' or mode='last'")
        interests, valid = model.encode_users(batch)  # (B, K, D), (B, K)
        kept = ((target >= FIRST_KNOWN) & valid.any(1)).nonzero().squeeze(1)
        interests, valid, target = interests[kept] / self.temperature, valid[kept], target[kept]
        if self.num_negatives:
            sampler = Uniform(model.spec.num_items) if self.sampler is None else self.sampler
            rows, log_q = (found.to(target.device) for found in sampler.sample(self.num_negatives))
            shift = -(log_q.float() + math.log(self.num_negatives))  # log of the expected count
        else:
            rows = torch.arange(FIRST_KNOWN, model.spec.num_items, device=target.device)
            shift = torch.zeros(len(rows), device=target.device)
        distinct, place = torch.unique(torch.cat([target, rows]), return_inverse=True)
        vectors = model.encode_items(distinct)
        own, items = vectors[place[: len(target)]], vectors[place[len(target) :]]
        step = max(1, SCORES_BYTES // (4 * max(1, interests.shape[1] * len(rows))))
        total: Tensor = interests.sum() * 0.0
        for start in range(0, len(target), step):
            part = slice(start, start + step)
            chunk = (interests[part], valid[part], own[part], target[part], items, rows, shift)
            total = total + (_sum(*chunk) if step >= len(target) else checkpoint(_sum, *chunk, use_reentrant=False))
        return total / max(1, len(target))


def _sum(
    interests: Float[Tensor, "p K D"],
    valid: Bool[Tensor, "p K"],
    own: Float[Tensor, "p D"],
    target: Int[Tensor, "p"],
    items: Float[Tensor, "S D"],
    rows: Int[Tensor, "S"],
    shift: Float[Tensor, "S"],
) -> Float[Tensor, ""]:
    """Sum over p users; the target stands in the sum once, whether the sample holds it or not."""
    positive = _best((interests @ own.unsqueeze(2)).squeeze(2).float(), valid)  # (p,)
    products = (interests.flatten(0, 1) @ items.T).view(*interests.shape[:2], -1)  # (p, K, S)
    others = _best(products, valid.unsqueeze(2)).float() + shift
    others = others.masked_fill(rows == target.unsqueeze(1), -torch.inf)
    return (torch.cat([positive.unsqueeze(1), others], 1).logsumexp(1) - positive).sum()


def _best(scores: Float[Tensor, "p K *S"], valid: Bool[Tensor, "p K *one"]) -> Float[Tensor, "p *S"]:
    """The largest over the valid interests."""
    return scores.masked_fill(~valid, -torch.inf).amax(1)
