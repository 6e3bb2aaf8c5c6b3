"""FM — factorisation machine: every pair of fields interacts through the dot product of their vectors.

Paper: Rendle. Factorization Machines. ICDM 2010. doi:10.1109/ICDM.2010.127
Idea:  factorised pair weights can be learnt for pairs that never occurred together, in time linear in the fields.

Eq. (1)  ŷ = w₀ + Σ w_i x_i + Σ_{i<j} ⟨v_i, v_j⟩ x_i x_j      forward (the logit)
         the pairs in O(F·D): ½ Σ_d [(Σ_i v_id x_i)² − Σ_i v_id² x_i²]   core.nn.crosses.fm_pairs
Differs: w_i and v_i of a value are one row of one table, so a field costs one look-up. A field of many values is the
         mean of their rows, so its values do not pair with each other.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.core.config import keeps_config
from funnelrec.core.nn.crosses import fm_pairs
from funnelrec.core.nn.embedding import FieldEmbedding
from funnelrec.core.schema import Spec

__all__ = ["FM"]


@keeps_config
class FM(nn.Module):
    """Logit of a click from first-order weights and all pairs of fields."""

    def __init__(self, spec: Spec, *, embedding_dim: int = 10) -> None:
        super().__init__()
        self.embedding = FieldEmbedding(spec, embedding_dim, linear=True)  # a row holds v_i and w_i
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, batch: Batch) -> Float[Tensor, "B"]:
        """Logits [B] from `ids` and `numbers`."""
        first_order, vectors = self.embedding.with_linear(batch)  # (B,), (B, F, D)
        return self.bias + first_order + fm_pairs(vectors)  # (B,)   Eq. (1)
