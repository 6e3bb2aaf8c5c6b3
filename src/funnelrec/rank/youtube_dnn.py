"""YouTubeDNN (ranking) — a deep network whose odds are expected watch time.

Paper: Covington, Adams, Sargin. Deep Neural Networks for YouTube Recommendations. RecSys 2016, Section 4.
       doi:10.1145/2959100.2959190
Idea:  a click is cheap; what counts is how long it is watched. Weigh each click by its watch time in a logistic
       regression, and the odds that it learns are the expected watch time of an impression.

Fig. 7   [vectors of all fields, mean of the watched items, numbers] -> ReLU tower -> s        forward
         a number enters as x̃, x̃², √x̃                        data: a number with the transform "powers"
Sec. 4.2 loss: a click weighs its watch time, all else 1      learn.losses.WeightedLogistic
Eq. (1)  odds e^s = Σ T_i / (N − k) ≈ E[T] (1 + P)            watch_time (the number is ours)
Differs: all vectors have one width, where the paper lets it grow with the logarithm of the vocabulary. An unknown
         value has a learned vector of its own, where the paper has zeros. Item and history share tables, as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.core.config import keeps_config
from funnelrec.core.nn.embedding import FieldEmbedding
from funnelrec.core.nn.mlp import MLP
from funnelrec.core.nn.pooling import masked_mean
from funnelrec.core.schema import Spec

__all__ = ["YouTubeDNN"]

LARGEST_LOGIT = 80.0  #: e^80 is still a number in float32


@keeps_config
class YouTubeDNN(nn.Module):
    """Logit s of an impression; e^s is the expected watch time when `WeightedLogistic` trained it."""

    reads_history = True

    def __init__(
        self,
        spec: Spec,
        *,
        embedding_dim: int = 16,
        hidden: Sequence[int] = (1024, 512, 256),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        item_fields = sum(field.side == "item" for field in spec.categories)
        if not item_fields:
            raise ValueError(
                "YouTubeDNN averages the items of the history, but this spec has no item column; "
                "name user and item in the schema, or use rank/deepfm for a table of rows"
            )
        self.item_columns = spec.item_ids
        self.embedding = FieldEmbedding(replace(spec, numbers=()), embedding_dim)  # numbers enter the tower as they are
        in_features = (spec.num_fields + item_fields) * embedding_dim + spec.num_numbers
        self.tower = MLP(in_features, (*hidden, 1), dropout=dropout)

    def forward(self, batch: Batch) -> Float[Tensor, "B"]:
        """Logits [B] from `ids`, `numbers`, `history_ids` [B, L, Ci] and `mask` [B, L]."""
        fields = self.embedding(batch).flatten(1)  # (B, F, D) -> (B, F·D)
        history = self.embedding.lookup(batch.history_ids, self.item_columns).flatten(2)  # (B, L, fields·D)
        watched = masked_mean(history, batch.mask)  # (B, fields·D)
        s: Tensor = self.tower(torch.cat((fields, watched, batch.numbers), dim=1)).squeeze(1)  # (B,)
        return s

    def watch_time(self, batch: Batch) -> Float[Tensor, "B"]:
        """e^s, the expected watch time in the unit of the weights; its order is the order of the logits.

        It estimates E[T] (1 + P) with P the click rate, so it is a little high where clicks are not rare.
        """
        s: Tensor = self(batch)
        return s.clamp(max=LARGEST_LOGIT).exp()
