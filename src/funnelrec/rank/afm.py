"""AFM — a factorisation machine that learns which pairs of features matter.

Paper: Xiao, Ye, He, Zhang, Wu, Chua. Attentional Factorization Machines: Learning the Weight of Feature Interactions
       via Attention Networks. IJCAI 2017. arXiv:1708.04617
Idea:  FM gives every pair of features the same weight. A small attention network looks at the product of each pair
       and says how much it should count.

         p_ij = (v_i ∘ v_j) x_i x_j for all pairs i < j of features that are there    pairs
Eq. (5)  a'_ij = hᵀ ReLU(W p_ij + b), a = softmax over all pairs                      weights
Eq. (6)  ŷ = w₀ + ⟨w, x⟩ + pᵀ Σ_ij a_ij p_ij                                          forward (the logit)
Differs: from the authors' code, whose softmax runs over an axis of length one, so that every weight is 1 there; here
         it runs over the pairs, as in the paper. A pair with a missing field has no weight. p starts at ones.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.core.config import keeps_config
from funnelrec.core.nn.attention import masked_softmax
from funnelrec.core.nn.crosses import pair_index
from funnelrec.core.nn.dropout import Dropout
from funnelrec.core.nn.embedding import FieldEmbedding
from funnelrec.core.nn.linear import Linear
from funnelrec.core.schema import Spec

__all__ = ["AFM"]


@keeps_config
class AFM(nn.Module):
    """Logit of a click from first-order weights and pairs of vectors, weighed by attention.

    `attention_dim` is the width of the attention network; `dropout` acts on the pooled pairs. Memory grows with the
    number of pairs of fields, F (F - 1) / 2.
    """

    def __init__(self, spec: Spec, *, embedding_dim: int = 16, attention_dim: int = 16, dropout: float = 0.5) -> None:
        super().__init__()
        self.embedding = FieldEmbedding(spec, embedding_dim, linear=True)
        self.attend = Linear(embedding_dim, attention_dim)
        self.score = Linear(attention_dim, 1, bias=False)  # h
        self.project = Linear(embedding_dim, 1)  # p, and w₀ as its bias
        self.drop = Dropout(dropout)
        nn.init.xavier_uniform_(self.attend.weight)
        nn.init.zeros_(self.attend.bias)
        nn.init.normal_(self.score.weight)
        nn.init.ones_(self.project.weight)
        nn.init.zeros_(self.project.bias)
        left, right = pair_index(self.embedding.output_fields)
        self.register_buffer("left", left, persistent=False)
        self.register_buffer("right", right, persistent=False)
        self.left: Tensor
        self.right: Tensor

    def pairs(self, e: Float[Tensor, "B F D"]) -> tuple[Float[Tensor, "B P D"], Bool[Tensor, "B P"]]:
        """The products of all pairs, and of which of them both fields are there (a field of value 0 is not)."""
        present = (e != 0).any(-1)  # (B, F)
        real = present[:, self.left] & present[:, self.right]  # (B, P)
        return e[:, self.left] * e[:, self.right], real  # (B, P, D)

    def weights(self, pairs: Float[Tensor, "B P D"], real: Bool[Tensor, "B P"]) -> Float[Tensor, "B P"]:
        """a: how much each pair counts; sums to 1 over the pairs that are there."""
        scores = self.score(torch.relu(self.attend(pairs))).squeeze(-1)  # (B, P)
        return masked_softmax(scores, real)  # Eq. (5)

    def forward(self, batch: Batch) -> Float[Tensor, "B"]:
        """Logits [B] from `ids` and `numbers`."""
        first_order, e = self.embedding.with_linear(batch)  # (B,), (B, F, D)
        pairs, real = self.pairs(e)
        pooled = (self.weights(pairs, real).unsqueeze(1) @ pairs).squeeze(1)  # (B, D)
        second_order: Tensor = self.project(self.drop(pooled)).squeeze(1)  # (B,)
        return first_order + second_order  # (B,)   Eq. (6)
