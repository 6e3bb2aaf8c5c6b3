"""Blocks of a transformer on padded grids: attention that can be continued, residuals, encoder and decoder blocks.

Masks are True at real positions. Texts stand on the left of their grid, padding on the right: then the causal rule
alone keeps a real position from seeing padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from funnelrec.core.nn.attention import MultiHeadAttention
from funnelrec.core.nn.dropout import Dropout
from funnelrec.core.nn.linear import Linear

__all__ = [
    "Attention",
    "DecoderBlock",
    "EncoderBlock",
    "FeedForward",
    "Residual",
    "causal_bias",
    "padding_bias",
    "sinusoidal_positions",
]

HIDDEN = -1e30  #: a score that no softmax sees; finite, so that nothing becomes NaN where all are such


def sinusoidal_positions(length: int, dim: int) -> Float[Tensor, "L D"]:
    """PE(p, 2i) = sin(p / 10000^(2i / dim)), PE(p, 2i + 1) = cos of the same (Vaswani et al. 2017, Section 3.5)."""
    if dim % 2:
        raise ValueError(f"sines and cosines come in pairs, so the width must be even, received {dim}")
    rates = torch.exp(torch.arange(0, dim, 2, dtype=torch.float64) * (-math.log(10_000.0) / dim))
    angles = torch.arange(length, dtype=torch.float64).unsqueeze(1) * rates  # (L, D / 2)
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1).float()


class Attention(MultiHeadAttention):
    """Multi-head attention in three parts, so that keys and values can be kept while a text is written.

    `bias` is added to the scores: `padding_bias` or `causal_bias`; None: everything may be seen. A query that may see
    nothing sees everything, and what it finds has no meaning. On CPU the fused kernel is left out: in bfloat16 its
    backward takes 5 to 10 times as long as these four lines (torch 2.13, 16 to 256 positions).
    """

    def forward(  # type: ignore[override]  # one mask instead of two
        self,
        query: Float[Tensor, "B Q D"],
        keys: Float[Tensor, "B L D"] | None = None,
        bias: Float[Tensor, "*b #Q L"] | None = None,
    ) -> Float[Tensor, "B Q D"]:
        """Attend from `query` to `keys` (absent: to itself)."""
        return self.recall(query, *self.remember(query if keys is None else keys), bias)

    def remember(self, x: Float[Tensor, "B L D"]) -> tuple[Float[Tensor, "B H L d"], Float[Tensor, "B H L d"]]:
        """Keys and values of `x`."""
        return self._heads(self.key(x)), self._heads(self.value(x))

    def recall(
        self,
        query: Float[Tensor, "B Q D"],
        keys: Float[Tensor, "B H L d"],
        values: Float[Tensor, "B H L d"],
        bias: Float[Tensor, "*b #Q L"] | None = None,
    ) -> Float[Tensor, "B Q D"]:
        """Attend to what `remember` gave."""
        q = self._heads(self.query(query))  # (B, H, Q, d)
        if q.device.type != "cpu":
            bias = None if bias is None else bias.to(q.dtype)
            found = F.scaled_dot_product_attention(q, keys, values, attn_mask=bias)
        else:
            with torch.autocast("cpu", enabled=False):  # the softmax stays in the type of its input
                scores = (q * q.shape[-1] ** -0.5) @ keys.transpose(2, 3)  # (B, H, Q, L)
                scores = scores if bias is None else scores + bias.to(q.dtype)
                found = scores.softmax(3) @ values
        joined: Tensor = self.out(found.transpose(1, 2).flatten(2))  # (B, Q, D)
        return joined


def padding_bias(mask: Bool[Tensor, "B L"]) -> Float[Tensor, "B 1 1 L"] | None:
    """What hides padding from attention; None where there is none."""
    if bool(mask.all()):
        return None
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, HIDDEN)[:, None, None]


def causal_bias(length: int, device: torch.device) -> Float[Tensor, "L L"]:
    """What hides the positions after one's own."""
    return torch.full((length, length), HIDDEN, device=device).triu(1)


class FeedForward(nn.Module):
    """W2 f(W1 x + b1) + b2, f ReLU or GELU; dropout after f."""

    def __init__(self, dim: int, ff_dim: int, dropout: float, activation: Literal["relu", "gelu"] = "relu") -> None:
        super().__init__()
        self.inner, self.outer = Linear(dim, ff_dim), Linear(ff_dim, dim)
        self.dropout = Dropout(dropout)
        self.activation = F.relu if activation == "relu" else F.gelu
        for linear in (self.inner, self.outer):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        out: Tensor = self.outer(self.dropout(self.activation(self.inner(x))))
        return out


class Residual(nn.Module):
    """x + Dropout(f(LN(x))) with `pre_norm`, else LN(x + Dropout(f(x)))."""

    def __init__(self, dim: int, dropout: float, pre_norm: bool, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.dropout = Dropout(dropout)
        self.pre_norm = pre_norm

    def forward(self, x: Float[Tensor, "B L D"], f: Callable[[Tensor], Tensor]) -> Float[Tensor, "B L D"]:
        if self.pre_norm:
            added: Tensor = x + self.dropout(f(self.norm(x)))
            return added
        out: Tensor = self.norm(x + self.dropout(f(x)))
        return out


class EncoderBlock(nn.Module):
    """Self-attention, then a feed-forward network, each inside a residual."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        ff_dim: int,
        dropout: float,
        *,
        pre_norm: bool = False,
        activation: Literal["relu", "gelu"] = "relu",
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.attention = Attention(dim, num_heads)
        self.feed_forward = FeedForward(dim, ff_dim, dropout, activation)
        self.attention_residual = Residual(dim, dropout, pre_norm, eps)
        self.forward_residual = Residual(dim, dropout, pre_norm, eps)

    def forward(self, x: Float[Tensor, "B L D"], bias: Float[Tensor, "B 1 1 L"] | None) -> Float[Tensor, "B L D"]:
        """`bias` hides padding."""
        x = self.attention_residual(x, lambda y: self.attention(y, bias=bias))
        out: Tensor = self.forward_residual(x, self.feed_forward)
        return out


class DecoderBlock(nn.Module):
    """Causal self-attention, attention to the encoder's output, then a feed-forward network."""

    def __init__(self, dim: int, num_heads: int, ff_dim: int, dropout: float, *, pre_norm: bool = False) -> None:
        super().__init__()
        self.attention = Attention(dim, num_heads)
        self.cross = Attention(dim, num_heads)
        self.feed_forward = FeedForward(dim, ff_dim, dropout)
        self.attention_residual = Residual(dim, dropout, pre_norm)
        self.cross_residual = Residual(dim, dropout, pre_norm)
        self.forward_residual = Residual(dim, dropout, pre_norm)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        memory: Float[Tensor, "B S D"],
        causal: Float[Tensor, "T T"],
        bias: Float[Tensor, "B 1 1 S"] | None,
    ) -> Float[Tensor, "B T D"]:
        """`causal` hides what comes later, `bias` the padding of `memory`."""
        x = self.attention_residual(x, lambda y: self.attention(y, bias=causal))
        x = self.cross_residual(x, lambda y: self.cross(y, memory, bias))
        out: Tensor = self.forward_residual(x, self.feed_forward)
        return out

    def step(
        self,
        x: Float[Tensor, "B 1 D"],
        past: tuple[Tensor, Tensor],
        memory: tuple[Tensor, Tensor],
        bias: Float[Tensor, "B 1 1 S"] | None,
    ) -> tuple[Float[Tensor, "B 1 D"], tuple[Tensor, Tensor]]:
        """`forward` of the newest position alone: its output, and `past` with its keys and values [B, H, t, d]."""
        together: list[Tensor] = []

        def attend(y: Tensor) -> Tensor:
            together.extend(torch.cat(pair, dim=2) for pair in zip(past, self.attention.remember(y), strict=True))
            return self.attention.recall(y, together[0], together[1])

        x = self.attention_residual(x, attend)
        x = self.cross_residual(x, lambda y: self.cross.recall(y, *memory, bias))
        return self.forward_residual(x, self.feed_forward), (together[0], together[1])
