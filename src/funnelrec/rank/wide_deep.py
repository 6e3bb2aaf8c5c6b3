"""Wide & Deep — memorise with crosses of features, generalise with a network, trained as one.

Paper: Cheng, Koc, Harmsen, et al. Wide & Deep Learning for Recommender Systems. DLRS 2016. arXiv:1606.07792
Idea:  a linear model over declared crosses remembers which combinations occurred; a network over embeddings answers for
       those that never did. Their logits are added before the loss, so each learns what the other leaves over.

Eq. (1)  φ_k(x) = Π_i x_i^{c_ki}: a cross is 1 only if all of its parts are there     _Wide.cross_rows
Eq. (3)  logit = w_wideᵀ [x, φ(x)] + w_deepᵀ a^L + b                                 forward, b in the MLP's last layer
         wide by FTRL with L1, the rest by AdamW                                     fit(ftrl={"wide": {"l1": …}})
Differs: a cross whose combinations fit into `buckets` has a weight for each of them; a larger one is hashed.
         A part that is missing or was never seen in training switches its crosses off. The paper trains the deep part
         by AdaGrad.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.core.config import keeps_config
from funnelrec.core.nn.embedding import FieldEmbedding, Table
from funnelrec.core.nn.mlp import MLP
from funnelrec.core.nn.stack import Stack
from funnelrec.core.schema import CategorySpec, Spec
from funnelrec.core.shapes import FIRST_KNOWN

__all__ = ["WideDeep"]

MIX = -7046029254386353131  #: 2^64 over the golden ratio, as int64: spreads neighbouring keys (Knuth, vol. 3, 6.4)


class _Wide(nn.Module):
    """The linear part: a weight for every value of every field, and for every combination of the declared crosses."""

    def __init__(self, spec: Spec, crosses: Sequence[Sequence[str]], buckets: int) -> None:
        super().__init__()
        self.values = FieldEmbedding(replace(spec, numbers=()), 1, std=0.0)
        self.parts = [[_single(spec, name) for name in cross] for cross in crosses]
        self.sizes = [min(buckets, math.prod(part.rows for part in cross)) for cross in self.parts]
        self.combinations = Table(1 + sum(self.sizes), 1, std=0.0) if crosses else None  # row 0: the cross is off

    def cross_rows(self, ids: Int[Tensor, "B C"]) -> Int[Tensor, "B X"]:
        """The row of each cross in `combinations`; 0 where one of its parts is missing or unknown."""
        rows, offset = [], 1
        for parts, size in zip(self.parts, self.sizes, strict=True):
            key = torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
            known = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
            for part in parts:
                value = ids[:, part.start].long() - (part.offset - 1)  # vocabulary row; padding becomes negative
                known &= value >= FIRST_KNOWN
                key = key * part.rows + value
            if math.prod(part.rows for part in parts) > size:
                key = ((key * MIX) >> 20) % size  # the upper bits are the well mixed ones
            rows.append(torch.where(known, key + offset, 0))
            offset += size
        return torch.stack(rows, dim=1)

    def forward(self, batch: Batch) -> Float[Tensor, "B"]:
        total: Tensor = self.values(batch).sum((1, 2))  # (B, F, 1) -> (B,)
        if self.combinations is not None:
            total = total + self.combinations(self.cross_rows(batch.ids)).sum((1, 2))  # (B, X, 1) -> (B,)   Eq. (1)
        return total


@keeps_config
class WideDeep(nn.Module):
    """Logit of a click from a linear model over values and crosses plus an MLP.

    `crosses` names fields of one value, e.g. `(("education", "occupation"),)`; a cross has at most `buckets` weights.
    The parameters of the linear part begin with "wide.".
    """

    def __init__(
        self,
        spec: Spec,
        *,
        embedding_dim: int = 32,
        crosses: Sequence[Sequence[str]] = (),
        buckets: int = 100_000,
        hidden: Sequence[int] = (1024, 512, 256),
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        if not spec.categories:
            raise ValueError("Wide & Deep needs a categorical field for its wide part, and this spec has only numbers")
        if buckets < 1:
            raise ValueError(f"buckets is the largest number of weights of a cross, at least 1, received {buckets}")
        self.wide = _Wide(spec, crosses, buckets)
        self.stack = Stack(spec, embedding_dim)
        self.deep = MLP(self.stack.out_features, (*hidden, 1), dropout=dropout, batch_norm=batch_norm)

    def forward(self, batch: Batch) -> Float[Tensor, "B"]:
        """Logits [B] from `ids` and `numbers`."""
        logit: Tensor = self.wide(batch) + self.deep(self.stack(batch)).squeeze(1)  # (B,)   Eq. (3)
        return logit


def _single(spec: Spec, name: str) -> CategorySpec:
    """The field of this name, which must have one value an example."""
    field = next((c for c in spec.categories if c.name == name), None)
    if field is None:
        raise ValueError(f"crosses name '{name}', which is no categorical field; there are {_names(spec)}")
    if field.stop - field.start != 1:
        raise ValueError(f"crosses name '{name}', which holds many values; cross fields of one value each")
    return field


def _names(spec: Spec) -> str:
    return ", ".join(c.name for c in spec.categories) or "none"
