"""Target attention: a history read with the item being scored in mind (the local activation unit of DIN)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from funnelrec.core.nn.activation import Activation
from funnelrec.core.nn.attention import MLPScore, masked_softmax

__all__ = ["TargetAttention"]


class TargetAttention(nn.Module):
    """Σ_j w_j k_j with w_j = MLP([q, k_j, q - k_j, q ∘ k_j]), Eq. (3) of DIN (arXiv:1706.06978).

    Without `softmax` (the paper) the sum of the weights is free and tells how strong the interest is. Weights at
    padding are exactly 0 in both forms, and an empty history gives the zero vector.
    """

    def __init__(
        self,
        dim: int,
        *,
        hidden: Sequence[int] = (80, 40),
        activation: Activation = "dice",
        softmax: bool = False,
    ) -> None:
        super().__init__()
        self.softmax = softmax
        self.score = MLPScore(dim, hidden, activation=activation)

    def weights(
        self, query: Float[Tensor, "B D"], keys: Float[Tensor, "B L D"], mask: Bool[Tensor, "B L"]
    ) -> Float[Tensor, "B L"]:
        """w [B, L]."""
        if torch.compiler.is_exporting():  # a graph holds no shape that depends on data
            scores = self.score(query.unsqueeze(1), keys, mask).squeeze(1)  # (B, L)
        else:  # real keys alone: on histories half as long as the longest this takes half the time
            real = mask.flatten().nonzero().squeeze(1)  # (T,)
            owner = torch.div(real, mask.shape[1], rounding_mode="floor")
            found = self.score.of_pairs(query, keys.flatten(0, 1).index_select(0, real), owner)
            scores = found.new_zeros(mask.numel()).index_copy(0, real, found).view(mask.shape)
        return masked_softmax(scores, mask) if self.softmax else scores.masked_fill(~mask, 0.0)

    def forward(
        self, query: Float[Tensor, "B D"], keys: Float[Tensor, "B L D"], mask: Bool[Tensor, "B L"]
    ) -> Float[Tensor, "B D"]:
        """The interest vector of each example."""
        weights = self.weights(query, keys, mask)
        return (weights.unsqueeze(1) @ keys).squeeze(1)  # (B, D)
