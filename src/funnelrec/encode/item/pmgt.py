"""PMGT: item vectors from pictures, texts and the item graph, learnt before any recommender is.

Paper: Liu, Yang, Lei, Wang, Tang, Zhang, Sun, Miao. Pre-training Graph Transformer with Multimodal Side Information for
    Recommendation. ACM MM 2021. arXiv:2010.12284.
Idea:  an item and the items most often met around it are one short sequence; a Transformer whose attention also seeks
    what differs reads it, and must tell neighbours from strangers and restore features that were hidden.

| paper                                                | here                                                   |
|------------------------------------------------------|--------------------------------------------------------|
| Eq. (1) MCNSampling                                  | `ItemGraph.contexts`                                   |
| Eq. (2) x^m ← W_m x^m / ‖x^m‖ + b_m                  | `_Modalities`                                          |
| Eq. (3) a = softmax(W_a tanh[x^1; …; x^M]), Σ a_m x^m | `_Modalities`                                          |
| Eq. (4) e_i = LN(m_i + p_i + r_i)                    | `_embed`: rank in the context, target or context       |
| Eq. (5) S₁ = softmax(QKᵀ/√d), S₂ = softmax(1 − cos(D_i, D_j) + I) | `_DiverseAttention`                       |
| Eq. (6) A = (1 − α) S₁ + α S₂                        | `_DiverseAttention`                                    |
| Eq. (7) structure: BCE of cos(h_t, h_x) over neighbours and strangers | `training_terms`                      |
| Eq. (8) features: ‖W_r h_i − x_i‖² at hidden positions | `training_terms`                                     |

Differs:
- Of the cosine alone Eq. (7) is made; the released code feeds the norms of the vectors too. It is divided by
  `temperature`; at 1 the loss cannot fall below ln(1 + e⁻¹).
- A modality that an item lacks has no part in Eq. (3) and Eq. (8), where the code draws noise for it. An item with
  fewer neighbours than slots has masked slots, and none is repeated; an item is not in its own context.
- A context is empty at times in training (`Neighbourhoods.alone`), so that an item without neighbours, a new one, is no
  surprise.
- One masked pass serves both losses, as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.core.config import keeps_config
from funnelrec.core.nn.attention import masked_softmax
from funnelrec.encode.item.neighbourhoods import VISIBLE, Neighbourhoods

__all__ = ["PMGT"]


class _Modalities(nn.Module):
    """Each modality to D, then one vector an item by attention over the modalities that it has."""

    def __init__(self, feature_dims: Sequence[int], dim: int) -> None:
        super().__init__()
        self.feature_dims = list(feature_dims)
        self.projections = nn.ModuleList(nn.Linear(size, dim) for size in feature_dims)
        self.score = nn.Linear(len(feature_dims) * dim, len(feature_dims))

    def forward(self, features: Float[Tensor, "*B M"], present: Bool[Tensor, "*B m"]) -> Float[Tensor, "*B D"]:
        parts = torch.split(features, self.feature_dims, dim=-1)
        x = torch.stack(
            [p(F.normalize(f, dim=-1)) for p, f in zip(self.projections, parts, strict=True)], -2
        )  # Eq. (2)
        x = x.masked_fill(~present.unsqueeze(-1), 0.0)  # (*B, m, D)
        weights = masked_softmax(self.score(torch.tanh(x).flatten(-2)), present)
        return (weights.unsqueeze(-2) @ x).squeeze(-2)  # Eq. (3)


class _DiverseAttention(nn.Module):
    """Attention to what is alike and, by the share α, to what is not."""

    def __init__(self, dim: int, num_heads: int, diversity: float) -> None:
        super().__init__()
        self.num_heads, self.diversity = num_heads, diversity
        self.into = nn.Linear(dim, 4 * dim)
        self.out = nn.Linear(dim, dim)

    def weights(self, x: Float[Tensor, "B S D"], mask: Bool[Tensor, "B S"]) -> tuple[Tensor, Tensor]:
        """A [B, H, S, S], whose rows sum to 1 over the real slots, and the values."""
        heads = self.into(x).unflatten(2, (4, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (4, B, H, S, D / H)
        q, k, v, d = heads
        keys = mask[:, None, None, :]
        alike = masked_softmax(q @ k.transpose(2, 3) / q.shape[-1] ** 0.5, keys)
        d = F.normalize(d, dim=-1)
        itself = torch.eye(x.shape[1], device=x.device, dtype=x.dtype)
        unlike = masked_softmax(1 - d @ d.transpose(2, 3) + itself, keys)  # Eq. (5)
        return (1 - self.diversity) * alike + self.diversity * unlike, v  # Eq. (6)

    def forward(self, x: Float[Tensor, "B S D"], mask: Bool[Tensor, "B S"]) -> Float[Tensor, "B S D"]:
        weights, values = self.weights(x, mask)
        out: Tensor = self.out((weights @ values).transpose(1, 2).flatten(2))
        return out


class _Layer(nn.Module):
    """Attention and an MLP, normalised after each."""

    def __init__(self, dim: int, num_heads: int, hidden: int, diversity: float, dropout: float) -> None:
        super().__init__()
        self.attention = _DiverseAttention(dim, num_heads, diversity)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.first, self.second, self.dropout = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "B S D"], mask: Bool[Tensor, "B S"]) -> Float[Tensor, "B S D"]:
        x = self.first(x + self.dropout(self.attention(x, mask)))
        out: Tensor = self.second(x + self.dropout(self.mlp(x)))
        return out


@keeps_config
class PMGT(nn.Module):
    """Items with their contexts to vectors [B, D].

    `feature_dims`: width of each modality. `diversity` α of Eq. (6). `max_len` S, the slots of a context.
    """

    def __init__(
        self,
        *,
        feature_dims: Sequence[int],
        embedding_dim: int = 128,
        num_layers: int = 2,
        num_heads: int = 2,
        hidden: int = 64,
        max_len: int = 10,
        diversity: int | float = 0.2,
        temperature: int | float = 1.0,
        dropout: int | float = 0.0,
    ) -> None:
        super().__init__()
        if not feature_dims or min(feature_dims) < 1:
            raise ValueError(f"feature_dims are the widths of the modalities, received {list(feature_dims)}")
        if embedding_dim % num_heads:
            raise ValueError(f"num_heads must divide embedding_dim, received {num_heads} and {embedding_dim}")
        if not 0 <= diversity <= 1 or temperature <= 0:
            raise ValueError(f"diversity is in 0..1 and temperature positive, received {diversity} and {temperature}")
        self.temperature = temperature
        self.modalities = _Modalities(feature_dims, embedding_dim)
        self.positions = nn.Parameter(torch.empty(1 + max_len, embedding_dim))
        self.roles = nn.Parameter(torch.empty(2, embedding_dim))
        self.norm = nn.LayerNorm(embedding_dim)
        self.layers = nn.ModuleList(
            _Layer(embedding_dim, num_heads, hidden, float(diversity), float(dropout)) for _ in range(num_layers)
        )
        self.out = nn.Linear(embedding_dim, embedding_dim)
        self.restore = nn.Linear(embedding_dim, sum(feature_dims))
        nn.init.normal_(self.positions, std=0.02)
        nn.init.normal_(self.roles, std=0.02)

    def _embed(self, features: Tensor, present: Tensor) -> Float[Tensor, "B S D"]:
        role = (torch.arange(features.shape[1], device=features.device) > 0).long()
        x: Tensor = self.norm(
            self.modalities(features, present) + self.positions[: features.shape[1]] + self.roles[role]
        )
        return x  # Eq. (4)

    def states(
        self, features: Float[Tensor, "B S F"], present: Bool[Tensor, "B S m"], mask: Bool[Tensor, "B S"]
    ) -> Float[Tensor, "B S D"]:
        """Every slot after the last layer; slot 0 is the item, the others its context."""
        x = self._embed(features, present)
        for layer in self.layers:
            x = layer(x, mask)
        return x

    def forward(self, content: Batch) -> Float[Tensor, "B D"]:
        """Vectors of length 1 for `features` [B, 1 + S, ΣM], `present` [B, 1 + S, m] and `mask` [B, 1 + S]."""
        x = self.states(content.features, content.present, content.mask)
        return F.normalize(self.out(x[:, 0]), dim=1)

    def training_terms(self, batch: Batch) -> dict[str, Tensor]:
        """Both losses on a batch of `Neighbourhoods`."""
        x = self.states(*(batch[name].flatten(0, 1) for name in ("features", "present", "mask")))  # (3B, S, D)
        vectors = F.normalize(self.out(x[:, 0]), dim=1).view(-1, 3, self.out.out_features)  # (B, 3, D)
        cosine = (vectors[:, :1] * vectors[:, 1:]).sum(2) / self.temperature  # (B, 2)
        label = torch.tensor([1.0, 0.0], device=cosine.device).expand_as(cosine)
        weight = batch.known[:, 1:].to(cosine.dtype)
        each = F.binary_cross_entropy_with_logits(cosine, label, reduction="none")
        structure = (each * weight).sum() / weight.sum().clamp(min=1)  # Eq. (7)
        hidden = (batch.fate != VISIBLE).flatten(0, 1)
        restored = self.restore(x[hidden])  # (h, ΣM)
        widths = torch.tensor(self.modalities.feature_dims, device=x.device)
        real = batch.restorable.flatten(0, 1)[hidden].repeat_interleave(widths, dim=1)
        error = (restored - batch.original.flatten(0, 1)[hidden]).square() * real
        return {"structure": structure, "features": error.sum() / real.sum().clamp(min=1)}  # Eq. (8)

    @torch.no_grad()
    def item_vectors(
        self, items: Neighbourhoods, rows: Int[Tensor, "n"], *, draws: int = 4, seed: int = 0
    ) -> Float[Tensor, "n D"]:
        """Vectors of items, the mean over some drawn contexts, of length 1; the same for the same seed."""
        was_training = self.training
        self.eval()
        generator = torch.Generator().manual_seed(seed)
        parts = []
        for part in torch.split(rows, 1024):
            total = sum(self(items.context(part, generator)) for _ in range(draws))
            parts.append(F.normalize(torch.as_tensor(total), dim=1))
        self.train(was_training)
        return torch.cat(parts) if parts else torch.zeros(0, self.positions.shape[1])
