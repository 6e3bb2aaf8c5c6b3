"""Popularity — the same list for everyone: the items that most users took, or took lately.

Source: the baseline of every evaluation.
Idea:   what many users like, the next one may like too; with a half-life, what many users liked lately.

Eq. (1)  s_i = Σ_{u: u took i} 2^((t_ui − t_max) / half_life)     fit; without a half-life every user counts 1
Differs: nothing.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.core.config import keeps_config
from funnelrec.core.interactions import DAY, Events, distinct_pairs
from funnelrec.core.schema import Spec
from funnelrec.core.shapes import FIRST_KNOWN
from funnelrec.match.index.topk import top_rows

__all__ = ["Popularity"]


@keeps_config
class Popularity(nn.Module):
    """A user counts once per item, with the latest time. `half_life` in days; None counts all times alike."""

    scores: Tensor

    def __init__(self, spec: Spec, *, half_life: int | float | None = None) -> None:
        super().__init__()
        if half_life is not None and half_life <= 0:
            raise ValueError(f"half_life must be above 0 days or None, received {half_life}")
        self.spec = spec
        self.half_life = half_life
        self.register_buffer("scores", torch.zeros(spec.num_items))  # (N,)

    def fit(self, users: Events, items: Events, times: Events) -> Popularity:
        """Count the positive events of the training part: user rows, item rows, seconds."""
        _, item, time = distinct_pairs(users, items, times)
        weights = torch.ones(len(item), dtype=torch.float64)
        if self.half_life is not None and len(item):
            weights = torch.exp2((time - time.max()).double() / (self.half_life * DAY))
        self.scores = torch.bincount(item, weights, minlength=self.spec.num_items).float()  # (N,) Eq. (1)
        return self

    @torch.no_grad()
    def recommend(
        self,
        batch: Batch,
        k: int,
        exclude: Int[Tensor, "B X"] | None = None,
        allowed: Bool[Tensor, "N"] | None = None,
    ) -> tuple[Int[Tensor, "B k"], Float[Tensor, "B k"]]:
        """The most popular items that are not excluded; equal counts by row."""
        scores = self.scores.clone()
        scores[:FIRST_KNOWN] = -torch.inf
        if allowed is not None:
            scores[~allowed] = -torch.inf
        if exclude is None:
            rows, values = top_rows(scores.unsqueeze(0), k)
            return rows.expand(batch.size, -1).clone(), values.expand(batch.size, -1).clone()
        # nobody's list reaches beyond the k + X best of all
        best, values = top_rows(scores.unsqueeze(0), min(k + exclude.shape[1], len(scores)))  # (1, M)
        values = values.expand(batch.size, -1).clone()
        place_of = torch.full((len(scores),), -1).scatter(0, best[0], torch.arange(best.shape[1]))
        owner, slot = (place_of[exclude] >= 0).nonzero(as_tuple=True)
        values[owner, place_of[exclude[owner, slot]]] = -torch.inf
        places, chosen = top_rows(values, k)
        return best[0][places].masked_fill(chosen == -torch.inf, 0), chosen
