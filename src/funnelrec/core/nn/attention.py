"""Attention: multi-head self and cross attention, and the usual scores between queries and keys as small modules.

Masks are True at real positions. A query that may look at nothing gives zeros, never NaN, and a finite gradient.
Every score is called `score(query [B, Q, D], keys [B, L, D], mask [B, L]) -> [B, Q, L]`; the scores at padding are
finite and meaningless: weigh them with `masked_softmax`. `mask` only reaches batch statistics inside a score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from funnelrec.core.nn.activation import Activation, Dice
from funnelrec.core.nn.activation import activation as make_activation
from funnelrec.core.nn.linear import Linear, linear
from funnelrec.core.nn.mlp import MLP

__all__ = [
    "AdditiveScore",
    "BilinearScore",
    "DotScore",
    "MLPScore",
    "MultiHeadAttention",
    "ScaledDotScore",
    "masked_softmax",
]


def masked_softmax(scores: Float[Tensor, "*shape"], mask: Bool[Tensor, "*#shape"], dim: int = -1) -> Tensor:
    """Softmax over the real entries along `dim`; 0 at the others, all 0 where nothing is real."""
    weights = torch.softmax(scores.masked_fill(~mask, torch.finfo(scores.dtype).min), dim)
    return weights.masked_fill(~mask, 0.0)


class MultiHeadAttention(nn.Module):
    """softmax(Q Kᵀ / √(D/H)) V per head, heads joined and projected (Vaswani et al. 2017, Section 3.2).

    `dropout` acts on the attention weights in training. Projections start Xavier-uniform with biases at 0.
    """

    def __init__(self, dim: int, num_heads: int = 1, *, dropout: float = 0.0, bias: bool = True) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, received dim={dim}, num_heads={num_heads}")
        self.num_heads = num_heads
        self.dropout = dropout
        self.query = Linear(dim, dim, bias=bias)
        self.key = Linear(dim, dim, bias=bias)
        self.value = Linear(dim, dim, bias=bias)
        self.out = Linear(dim, dim, bias=bias)
        for layer in (self.query, self.key, self.value, self.out):
            nn.init.xavier_uniform_(layer.weight)
            if bias:
                nn.init.zeros_(layer.bias)

    def forward(
        self,
        query: Float[Tensor, "B Q D"],
        keys: Float[Tensor, "B L D"] | None = None,
        mask: Bool[Tensor, "B L"] | None = None,
        *,
        causal: bool = False,
    ) -> Float[Tensor, "B Q D"]:
        """Attend from `query` to `keys` (absent: to itself). `causal`: position i sees positions 0..i only (Q = L)."""
        keys = query if keys is None else keys
        if causal and query.shape[1] != keys.shape[1]:
            raise ValueError(
                f"causal attention needs as many queries as keys, received {query.shape[1]} and {len(keys[0])}"
            )
        allowed, nothing = self._allowed(query.shape[1], mask, causal)
        out = F.scaled_dot_product_attention(
            self._heads(self.query(query)),
            self._heads(self.key(keys)),
            self._heads(self.value(keys)),
            attn_mask=allowed,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=causal and allowed is None,
        )  # (B, H, Q, D/H)
        joined: Tensor = self.out(out.transpose(1, 2).flatten(2))  # (B, Q, D)
        return joined if nothing is None else joined.masked_fill(nothing.unsqueeze(-1), 0.0)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_heads, x.shape[2] // self.num_heads).transpose(1, 2)  # (B, H, L, D/H)

    @staticmethod
    def _allowed(queries: int, mask: Tensor | None, causal: bool) -> tuple[Tensor | None, Tensor | None]:
        """Which query may see which key (B, 1, Q, L), and which queries see nothing (B, Q)."""
        if mask is None:
            return None, None
        allowed = mask[:, None, :].expand(-1, queries, -1)  # (B, Q, L)
        if causal:
            allowed = allowed & torch.ones(queries, queries, dtype=torch.bool, device=mask.device).tril()
        nothing = ~allowed.any(-1)  # (B, Q)
        # a softmax over nothing is NaN in some kernels: let such a query see everything, then discard what it saw
        return (allowed | nothing.unsqueeze(-1)).unsqueeze(1), nothing


class DotScore(nn.Module):
    """⟨q, k⟩."""

    def forward(
        self, query: Float[Tensor, "B Q D"], keys: Float[Tensor, "B L D"], mask: Bool[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B Q L"]:
        return query @ keys.transpose(1, 2)


class ScaledDotScore(nn.Module):
    """⟨q, k⟩ / √D."""

    def forward(
        self, query: Float[Tensor, "B Q D"], keys: Float[Tensor, "B L D"], mask: Bool[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B Q L"]:
        return query @ keys.transpose(1, 2) / math.sqrt(query.shape[-1])


class BilinearScore(nn.Module):
    """qᵀ W k; query and keys may differ in width."""

    def __init__(self, query_dim: int, key_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(query_dim, key_dim))
        nn.init.xavier_uniform_(self.weight)

    def forward(
        self, query: Float[Tensor, "B Q E"], keys: Float[Tensor, "B L D"], mask: Bool[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B Q L"]:
        return query @ self.weight @ keys.transpose(1, 2)

    def of_pairs(
        self, query: Float[Tensor, "B E"], keys: Float[Tensor, "T D"], owner: Int[Tensor, "T"]
    ) -> Float[Tensor, "T"]:
        """The score of each key with the query of its owner, 0 … B - 1: for keys that stand without padding."""
        return ((query @ self.weight).index_select(0, owner) * keys).sum(1)


class AdditiveScore(nn.Module):
    """vᵀ tanh(W_q q + W_k k + b) (Bahdanau et al. 2015); query and keys may differ in width."""

    def __init__(self, query_dim: int, key_dim: int, hidden: int) -> None:
        super().__init__()
        self.query = Linear(query_dim, hidden)
        self.key = Linear(key_dim, hidden, bias=False)
        self.score = Linear(hidden, 1, bias=False)

    def forward(
        self, query: Float[Tensor, "B Q E"], keys: Float[Tensor, "B L D"], mask: Bool[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B Q L"]:
        joined = torch.tanh(self.query(query).unsqueeze(2) + self.key(keys).unsqueeze(1))  # (B, Q, L, hidden)
        scores: Tensor = self.score(joined).squeeze(-1)
        return scores


class MLPScore(nn.Module):
    """MLP([q, k, q - k, q ∘ k]), the activation unit of DIN (arXiv:1706.06978).

    The first layer is linear in its four blocks, so W_q q + W_d q is computed once per query and (W_k - W_d) k + W_p
    (q ∘ k) per pair: the same numbers with half the work and without the [B, Q, L, 4D] tensor.
    """

    def __init__(self, dim: int, hidden: Sequence[int] = (80, 40), *, activation: Activation = "dice") -> None:
        super().__init__()
        if not hidden:
            raise ValueError(f"MLPScore needs at least one hidden layer, received hidden={tuple(hidden)}")
        self.first = Linear(4 * dim, hidden[0])
        nn.init.xavier_uniform_(self.first.weight)
        nn.init.zeros_(self.first.bias)
        self.activation = make_activation(activation, hidden[0])
        self.rest = MLP(hidden[0], (*hidden[1:], 1), activation=activation)

    def forward(
        self, query: Float[Tensor, "B Q D"], keys: Float[Tensor, "B L D"], mask: Bool[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B Q L"]:
        of_query, of_keys, of_product = self._blocks()
        once = linear(query, of_query, self.first.bias).unsqueeze(2)  # (B, Q, 1, hidden)
        key = linear(keys, of_keys).unsqueeze(1)  # (B, 1, L, hidden)
        product = linear(query.unsqueeze(2) * keys.unsqueeze(1), of_product)  # (B, Q, L, hidden)
        real = None if mask is None else mask.unsqueeze(1).expand(product.shape[:-1])
        return self._of_first(once + key + product, real)

    def of_pairs(
        self, query: Float[Tensor, "B D"], keys: Float[Tensor, "T D"], owner: Int[Tensor, "T"]
    ) -> Float[Tensor, "T"]:
        """The score of each key with the query of its owner, 0 … B - 1: for keys that stand without padding."""
        query = query.index_select(0, owner)  # (T, D)
        weight = torch.cat(self._blocks(), 1)  # (hidden, 3D)
        return self._of_first(linear(torch.cat((query, keys, query * keys), 1), weight, self.first.bias), None)

    def _blocks(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the first layer does with the query, the keys and their product, [hidden, D] each."""
        of_q, of_k, of_difference, of_product = self.first.weight.chunk(4, dim=1)
        return of_q + of_difference, of_k - of_difference, of_product

    def _of_first(self, x: Tensor, real: Tensor | None) -> Tensor:
        x = self.activation(x, real) if isinstance(self.activation, Dice) else self.activation(x)
        scores: Tensor = self.rest(x, real).squeeze(-1)
        return scores
