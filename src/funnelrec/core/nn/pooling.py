"""A history to one vector. In all of them `mask` is True at real positions and an empty history gives zeros."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from funnelrec.core.nn.attention import masked_softmax
from funnelrec.core.nn.linear import Linear

__all__ = ["AttentionPooling", "masked_last", "masked_max", "masked_mean", "masked_sum"]


def masked_sum(x: Float[Tensor, "*B L D"], mask: Bool[Tensor, "*B L"]) -> Float[Tensor, "*B D"]:
    """Sum over the real positions."""
    return x.masked_fill(~mask.unsqueeze(-1), 0.0).sum(-2)


def masked_mean(x: Float[Tensor, "*B L D"], mask: Bool[Tensor, "*B L"]) -> Float[Tensor, "*B D"]:
    """Mean over the real positions."""
    return masked_sum(x, mask) / mask.sum(-1, keepdim=True).clamp(min=1).to(x.dtype)


def masked_max(x: Float[Tensor, "*B L D"], mask: Bool[Tensor, "*B L"]) -> Float[Tensor, "*B D"]:
    """Largest value per channel over the real positions."""
    best = x.masked_fill(~mask.unsqueeze(-1), float("-inf")).amax(-2)
    return best.masked_fill(~mask.any(-1, keepdim=True), 0.0)


def masked_last(x: Float[Tensor, "*B L D"], mask: Bool[Tensor, "*B L"]) -> Float[Tensor, "*B D"]:
    """The vector of the last real position, wherever the padding stands."""
    position = (mask * torch.arange(mask.shape[-1], device=mask.device)).amax(-1)  # (B,)
    index = position[..., None, None].expand(*position.shape, 1, x.shape[-1])
    return x.gather(-2, index).squeeze(-2).masked_fill(~mask.any(-1, keepdim=True), 0.0)


class AttentionPooling(nn.Module):
    """Σ_l a_l x_l with a = softmax(vᵀ tanh(W x_l + b)) over the real positions (additive self-attention)."""

    def __init__(self, dim: int, *, hidden: int | None = None) -> None:
        super().__init__()
        self.project = Linear(dim, hidden or dim)
        self.score = Linear(hidden or dim, 1, bias=False)

    def weights(self, x: Float[Tensor, "*B L D"], mask: Bool[Tensor, "*B L"]) -> Float[Tensor, "*B L"]:
        """Non-negative, 0 at padding, summing to 1 over the real positions."""
        return masked_softmax(self.score(torch.tanh(self.project(x))).squeeze(-1), mask)

    def forward(self, x: Float[Tensor, "*B L D"], mask: Bool[Tensor, "*B L"]) -> Float[Tensor, "*B D"]:
        """One vector per history."""
        weights = self.weights(x, mask)  # (B, L)
        return (weights.unsqueeze(-2) @ x.masked_fill(~mask.unsqueeze(-1), 0.0)).squeeze(-2)  # (B, D)
