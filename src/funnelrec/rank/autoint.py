"""AutoInt — fields that attend to one another.

Paper: Song, Shi, Xiao, Duan, Xu, Zhang, Tang. AutoInt: Automatic Feature Interaction Learning via Self-Attentive
       Neural Networks. CIKM 2019. arXiv:1810.11921
Idea:  a field combines with the fields that matter to it, which self-attention finds; each layer adds one order, and a
       residual keeps the lower ones.

Eq. (5)  α_mk = softmax_k ⟨W_Q e_m, W_K e_k⟩, for each head, unscaled            _Interact
Eq. (6)  ẽ_m = Σ_k α_mk W_V e_k                                                 _Interact
Eq. (7)  heads side by side                                                     _Interact
Eq. (8)  e'_m = ReLU(ẽ_m + W_Res e_m)                                           _Interact
Eq. (9)  logit = wᵀ [e'_1, …, e'_F] + b                                         forward
AutoInt+ adds the logit of an MLP over the same vectors (`hidden`).
Differs: from the authors' code, which scales the scores, puts biases and ReLU on all projections and normalises layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.core.config import keeps_config
from funnelrec.core.nn.embedding import FieldEmbedding
from funnelrec.core.nn.linear import linear
from funnelrec.core.nn.mlp import MLP
from funnelrec.core.schema import Spec

__all__ = ["AutoInt"]


class _Interact(nn.Module):
    """One interacting layer: vectors of width D in, of width H · head_dim out."""

    def __init__(self, dim: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.project = nn.Parameter(torch.empty(4, num_heads * head_dim, dim))  # W_Q, W_K, W_V, W_Res
        for weight in self.project:
            nn.init.xavier_uniform_(weight)

    def forward(self, e: Float[Tensor, "B F D"]) -> Float[Tensor, "B F E"]:
        query, key, value, residual = linear(e, self.project.flatten(0, 1)).chunk(4, dim=-1)  # (B, F, E) each
        q, k, v = (
            x.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2) for x in (query, key, value)
        )  # (B, H, F, d)
        # fused attention is slower for so few fields and narrow heads, and far slower in bfloat16 on CPU
        combined = torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ v  # Eq. (5)-(6)
        return torch.relu(combined.transpose(1, 2).flatten(2) + residual)  # Eq. (7)-(8)


@keeps_config
class AutoInt(nn.Module):
    """Logit of a click from `num_layers` interacting layers; with `hidden` it is AutoInt+."""

    def __init__(
        self,
        spec: Spec,
        *,
        embedding_dim: int = 16,
        num_layers: int = 3,
        num_heads: int = 2,
        head_dim: int = 32,
        hidden: Sequence[int] = (),
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        if min(num_layers, num_heads, head_dim) < 1:
            raise ValueError(
                f"num_layers, num_heads and head_dim are at least 1, received {num_layers}, {num_heads} and {head_dim}"
            )
        self.embedding = FieldEmbedding(spec, embedding_dim)
        fields, width = self.embedding.output_fields, num_heads * head_dim
        widths = [embedding_dim] + [width] * (num_layers - 1)
        self.layers = nn.ModuleList(_Interact(dim, num_heads, head_dim) for dim in widths)
        self.top = MLP(fields * width, (1,))
        self.deep = (
            MLP(fields * embedding_dim, (*hidden, 1), dropout=dropout, batch_norm=batch_norm) if hidden else None
        )

    def forward(self, batch: Batch) -> Float[Tensor, "B"]:
        """Logits [B] from `ids` and `numbers`."""
        e = self.embedding(batch)  # (B, F, D)
        x = e
        for layer in self.layers:
            x = layer(x)
        logit: Tensor = self.top(x.flatten(1)).squeeze(1)  # (B,)   Eq. (9)
        if self.deep is not None:
            logit = logit + self.deep(e.flatten(1)).squeeze(1)
        return logit
