"""DCN — explicit crosses of bounded degree beside a deep network.

Paper: Wang, Fu, Fu, Wang. Deep & Cross Network for Ad Click Predictions. ADKDD 2017. arXiv:1708.05123
Idea:  each cross layer multiplies the input once more with itself along one learned direction, so that L layers hold
       products of up to L + 1 features at the price of 2 numbers a feature and layer.

Eq. (3)  x_{l+1} = x₀ (x_lᵀ w_l) + b_l + x_l                     _Cross; the scalar x_lᵀ w_l first, never x₀ x_lᵀ
         x₀ = [vectors of the fields, numbers]                  core.nn.stack.Stack
         logit = wᵀ [x_L, h_L] + b, h = the deep network's top   forward
Differs: one width for all vectors, where the paper takes 6 · n^¼ of a field with n values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.core.config import keeps_config
from funnelrec.core.nn.linear import Linear
from funnelrec.core.nn.mlp import MLP
from funnelrec.core.nn.stack import Stack
from funnelrec.core.schema import Spec

__all__ = ["DCN"]


class _Cross(nn.Module):
    """One cross layer: 2 X numbers for an input of width X."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.direction = Linear(width, 1, bias=False)  # w_l
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.xavier_uniform_(self.direction.weight)

    def forward(self, start: Float[Tensor, "B X"], x: Float[Tensor, "B X"]) -> Float[Tensor, "B X"]:
        crossed: Tensor = start * self.direction(x) + self.bias + x  # (B, X) · (B, 1)   Eq. (3)
        return crossed


@keeps_config
class DCN(nn.Module):
    """Logit of a click from `num_layers` cross layers and an MLP side by side."""

    def __init__(
        self,
        spec: Spec,
        *,
        embedding_dim: int = 16,
        num_layers: int = 3,
        hidden: Sequence[int] = (400, 400, 400),
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.stack = Stack(spec, embedding_dim)
        width = self.stack.out_features
        self.crosses = nn.ModuleList(_Cross(width) for _ in range(num_layers))
        self.deep = MLP(width, hidden, dropout=dropout, batch_norm=batch_norm, activate_last=True) if hidden else None
        self.top = MLP(width + (hidden[-1] if hidden else 0), (1,))

    def forward(self, batch: Batch) -> Float[Tensor, "B"]:
        """Logits [B] from `ids` and `numbers`."""
        start = self.stack(batch)  # (B, X)
        x = start
        for cross in self.crosses:
            x = cross(start, x)
        if self.deep is not None:
            x = torch.cat((x, self.deep(start)), dim=1)  # (B, X + hidden[-1])
        logit: Tensor = self.top(x).squeeze(1)  # (B,)
        return logit
