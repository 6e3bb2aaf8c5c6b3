"""NFM — a network on top of the pairwise interactions of FM.

Paper: He, Chua. Neural Factorization Machines for Sparse Predictive Analytics. SIGIR 2017. arXiv:1708.05027
Idea:  FM sums the products of all pairs of vectors into one number. Keep the sum as a vector and let a small network
       read it: interactions of higher order, at the cost of FM.

         ŷ = w₀ + ⟨w, x⟩ + hᵀ z_L                                forward (the logit); h is the last layer, w₀ its bias
Eq. (3)  f_BI = Σ_{i<j} x_i v_i ∘ x_j v_j                         core.nn.crosses.bi_interaction
Eq. (4)  = ½ [(Σ x_i v_i)² − Σ (x_i v_i)²]                        there
         z_l = ReLU(W_l z_{l-1} + b_l), z_0 = f_BI after batch norm and dropout   forward
Differs: with `hidden=()` h starts at ones, as in the authors' code, so that the model starts as FM. Trained by
         cross-entropy where the paper regresses on ±1 with squared loss.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.core.config import keeps_config
from funnelrec.core.nn.activation import MaskedBatchNorm
from funnelrec.core.nn.crosses import bi_interaction
from funnelrec.core.nn.dropout import Dropout
from funnelrec.core.nn.embedding import FieldEmbedding
from funnelrec.core.nn.mlp import MLP
from funnelrec.core.schema import Spec

__all__ = ["NFM"]


@keeps_config
class NFM(nn.Module):
    """Logit of a click from first-order weights and a network over the pooled pairs of vectors.

    `pair_dropout` acts on the pooled pairs, `dropout` on the hidden layers; `batch_norm` on both.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        embedding_dim: int = 64,
        hidden: Sequence[int] = (64,),
        pair_dropout: float = 0.5,
        dropout: float = 0.2,
        batch_norm: bool = True,
    ) -> None:
        super().__init__()
        self.embedding = FieldEmbedding(spec, embedding_dim, linear=True)
        self.norm = MaskedBatchNorm(embedding_dim) if batch_norm else nn.Identity()
        self.drop = Dropout(pair_dropout)
        self.top = MLP(embedding_dim, (*hidden, 1), dropout=dropout, batch_norm=batch_norm)
        if not hidden:
            nn.init.ones_(self.top.layers[0].get_parameter("weight"))  # h = 1: FM

    def forward(self, batch: Batch) -> Float[Tensor, "B"]:
        """Logits [B] from `ids` and `numbers`."""
        first_order, e = self.embedding.with_linear(batch)  # (B,), (B, F, D)
        pooled = self.drop(self.norm(bi_interaction(e)))  # (B, D)   Eq. (3)-(4)
        higher: Tensor = self.top(pooled).squeeze(1)  # (B,)
        return first_order + higher  # (B,)
