"""FiBiNET — fields weighed by what they hold, and a product with a matrix inside.

Paper: Huang, Zhang, Zhang. FiBiNET: Combining Feature Importance and Bilinear Feature Interaction for Click-Through
       Rate Prediction. RecSys 2019. arXiv:1905.09433
Idea:  a squeeze-and-excitation gate says how much each field counts in this example, and pairs interact through a
       matrix between the two vectors, finer than an inner product and than a Hadamard product.

Numbered here: Eq. (1) z_i = mean_d e_id, A = σ₂(W₂ σ₁(W₁ z)), v_i = a_i e_i                _Gate
               Eq. (2) p_ij = (e_i W) ∘ e_j for i < j, W for all, of field i, or of the pair  _Bilinear
               Eq. (3) logit = ⟨w, x⟩ + MLP([p, q]), p of the vectors e, q of the gated v    forward
Differs: the two bilinear layers have parameters of their own. `gate="sigmoid"` is ours: a ReLU can close a field for
         good. `hidden=()` is the paper's shallow form, which adds all entries of p and q up.
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
from funnelrec.core.nn.linear import Linear
from funnelrec.core.nn.mlp import MLP
from funnelrec.core.schema import Spec

__all__ = ["FiBiNET"]

KINDS = ("all", "each", "interaction")
GATES = {"relu": torch.relu, "sigmoid": torch.sigmoid}


class _Gate(nn.Module):
    """SENET: one weight a field from the means of all vectors."""

    def __init__(self, fields: int, reduction: int, gate: str) -> None:
        super().__init__()
        self.gate = gate
        self.squeeze = Linear(fields, max(1, fields // reduction), bias=False)
        self.excite = Linear(max(1, fields // reduction), fields, bias=False)

    def forward(self, e: Float[Tensor, "B F D"]) -> Float[Tensor, "B F"]:
        z = e.mean(2)  # (B, F)
        return GATES[self.gate](self.excite(torch.relu(self.squeeze(z))))  # Eq. (1)


class _Bilinear(nn.Module):
    """p_ij = (e_i W) ∘ e_j for the pairs i < j."""

    def __init__(self, fields: int, dim: int, kind: str) -> None:
        super().__init__()
        left, right = pair_index(fields)
        self.register_buffer("left", left, persistent=False)
        self.register_buffer("right", right, persistent=False)
        self.left: Tensor
        self.right: Tensor
        self.kind = kind
        matrices = {"all": 1, "each": fields - 1, "interaction": len(left)}[kind]  # the last field stands left nowhere
        self.weight = nn.Parameter(torch.empty(matrices, dim, dim))
        for matrix in self.weight:
            nn.init.xavier_normal_(matrix)

    def forward(self, e: Float[Tensor, "B F D"]) -> Float[Tensor, "B P D"]:
        fields_first = e.transpose(0, 1)  # (F, B, D): one matrix product a field or a pair
        if self.kind == "interaction":
            turned = fields_first.index_select(0, self.left) @ self.weight  # (P, B, D) @ (P, D, D)
        else:
            turned = (fields_first[:-1] @ self.weight).index_select(0, self.left)  # (F - 1, B, D) -> (P, B, D)
        return (turned * fields_first.index_select(0, self.right)).transpose(0, 1)  # (B, P, D)   Eq. (2)


@keeps_config
class FiBiNET(nn.Module):
    """Logit of a click from first-order weights and an MLP over bilinear pairs of plain and of gated vectors.

    `bilinear`: "all" fields share one matrix, "each" field has one, each "interaction" has one. `reduction`: fields per
    hidden unit of the gate. The first layer of the MLP reads F (F - 1) D numbers.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        embedding_dim: int = 10,
        bilinear: str = "interaction",
        reduction: int = 3,
        gate: str = "relu",
        hidden: Sequence[int] = (400, 400, 400),
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        if bilinear not in KINDS or gate not in GATES or reduction < 1:
            raise ValueError(
                f"bilinear is one of {', '.join(KINDS)}, gate of {', '.join(GATES)} and reduction at least 1, "
                f"received {bilinear!r}, {gate!r} and {reduction}"
            )
        self.embedding = FieldEmbedding(spec, embedding_dim, linear=True)
        fields = self.embedding.output_fields
        if fields < 2:
            raise ValueError("FiBiNET multiplies pairs of fields and this spec has only one; use rank/deepfm")
        self.gate = _Gate(fields, reduction, gate)
        self.plain = _Bilinear(fields, embedding_dim, bilinear)
        self.gated = _Bilinear(fields, embedding_dim, bilinear)
        self.bias = nn.Parameter(torch.zeros(())) if not hidden else 0.0
        in_features = fields * (fields - 1) * embedding_dim
        self.deep = MLP(in_features, (*hidden, 1), dropout=dropout, batch_norm=batch_norm) if hidden else None

    def forward(self, batch: Batch) -> Float[Tensor, "B"]:
        """Logits [B] from `ids` and `numbers`."""
        first_order, e = self.embedding.with_linear(batch)  # (B,), (B, F, D)
        v = self.gate(e).unsqueeze(2) * e
        pairs = torch.cat((self.plain(e), self.gated(v)), dim=1).flatten(1)  # (B, 2 P D)
        if self.deep is None:
            return first_order + self.bias + pairs.sum(1)  # (B,)
        logit: Tensor = first_order + self.deep(pairs).squeeze(1)  # (B,)   Eq. (3)
        return logit
