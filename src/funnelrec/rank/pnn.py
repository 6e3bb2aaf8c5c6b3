"""PNN — a product layer between the embeddings and the network.

Paper: Qu, Cai, Ren, Zhang, Yu, Wen, Wang. Product-based Neural Networks for User Response Prediction. ICDM 2016.
       arXiv:1611.00144
Idea:  an MLP learns products of its inputs only slowly. Compute the products of the fields' vectors and hand them to
       its first layer beside the vectors themselves.

Eq. (3)  l₁ = ReLU(l_z + l_p + b₁)                     the first layer of MLP, on [z, p] side by side
         z = [f_1, …, f_F], l_z = W_z ⊙ z              forward
         IPNN: p_ij = ⟨f_i, f_j⟩, l_p = W_p ⊙ p        _inner; i < j, as p is symmetric
         OPNN: p = Σ_ij f_i f_jᵀ = f_Σ f_Σᵀ, f_Σ = Σ f _outer; the upper triangle, as p is symmetric
Differs: W_p of the inner product is kept whole where the paper approximates each of its matrices by one of rank one;
         a matrix of inner products costs less than the rank-one form once F < D₁. The diagonal ⟨f_i, f_i⟩ is left out,
         as in the authors' code. Their later code puts kernels in place of the summed outer product; this is the
         paper's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.core.config import keeps_config
from funnelrec.core.nn.crosses import pair_index
from funnelrec.core.nn.embedding import FieldEmbedding
from funnelrec.core.nn.mlp import MLP
from funnelrec.core.schema import Spec

__all__ = ["PNN"]


@keeps_config
class PNN(nn.Module):
    """Logit of a click from an MLP over the vectors and their products.

    `product`: "inner" (IPNN), "outer" (OPNN) or "both".
    """

    def __init__(
        self,
        spec: Spec,
        *,
        embedding_dim: int = 10,
        product: str = "inner",
        hidden: Sequence[int] = (400, 400, 400),
        dropout: float = 0.2,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        if product not in ("inner", "outer", "both"):
            raise ValueError(f"product is 'inner', 'outer' or 'both', received {product!r}")
        self.product = product
        self.embedding = FieldEmbedding(spec, embedding_dim)
        fields = self.embedding.output_fields
        left, right = pair_index(fields)
        self.register_buffer("inner_entries", left * fields + right, persistent=False)
        row, column = torch.triu_indices(embedding_dim, embedding_dim)
        self.register_buffer("outer_entries", row * embedding_dim + column, persistent=False)
        self.inner_entries: Tensor
        self.outer_entries: Tensor
        in_features = fields * embedding_dim
        in_features += len(left) if product != "outer" else 0
        in_features += len(row) if product != "inner" else 0
        self.top = MLP(in_features, (*hidden, 1), dropout=dropout, batch_norm=batch_norm)

    def _inner(self, f: Float[Tensor, "B F D"]) -> Float[Tensor, "B P"]:
        """⟨f_i, f_j⟩ for i < j."""
        return (f @ f.transpose(1, 2)).flatten(1).index_select(1, self.inner_entries)  # (B, F, F) -> (B, P)

    def _outer(self, f: Float[Tensor, "B F D"]) -> Float[Tensor, "B E"]:
        """The upper triangle of the sum of all outer products, which is one outer product."""
        total = f.sum(1)  # (B, D)
        return (total.unsqueeze(2) * total.unsqueeze(1)).flatten(1).index_select(1, self.outer_entries)

    def forward(self, batch: Batch) -> Float[Tensor, "B"]:
        """Logits [B] from `ids` and `numbers`."""
        f = self.embedding(batch)  # (B, F, D)
        signals = [f.flatten(1)]  # z
        if self.product != "outer":
            signals.append(self._inner(f))
        if self.product != "inner":
            signals.append(self._outer(f))
        logit: Tensor = self.top(torch.cat(signals, dim=1)).squeeze(1)  # (B,)   Eq. (3) and the layers above
        return logit
