"""DCN-V2 — cross layers with a full matrix, a low-rank one, or a mixture of low-rank experts.

Paper: Wang, Shivanna, Cheng, Jain, Lin, Hong, Chi. DCN V2: Improved Deep & Cross Network and Practical Lessons for
       Web-scale Learning to Rank Systems. WWW 2021. arXiv:2008.13535
Idea:  a cross layer of DCN knows one direction. With a matrix every feature chooses what it is multiplied by; the
       matrices turn out to be nearly of low rank, so a few small experts under a gate do as well and cost less.

Eq. (1)  x_{l+1} = x₀ ∘ (W_l x_l + b_l) + x_l                                  _Cross
         W_l = U_l V_lᵀ                                                       _LowRankCross with one expert
         x_{l+1} = Σ_i G_i(x_l) E_i(x_l) + x_l                                _LowRankCross
         E_i(x) = x₀ ∘ (U_i g(C_i g(V_iᵀ x)) + b), g = tanh, G = softmax       _LowRankCross
         stacked: logit = wᵀ MLP(x_L); parallel: logit = wᵀ [x_L, MLP(x₀)]    forward
Differs: one expert has no gate, no C and no tanh: it is the plain low-rank layer.
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

__all__ = ["DCNV2"]


class _Cross(nn.Module):
    """One cross layer with a full matrix."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.matrix = Linear(width, width)
        nn.init.xavier_normal_(self.matrix.weight)
        nn.init.zeros_(self.matrix.bias)

    def forward(self, start: Float[Tensor, "B X"], x: Float[Tensor, "B X"]) -> Float[Tensor, "B X"]:
        return torch.addcmul(x, start, self.matrix(x))  # Eq. (1)


class _LowRankCross(nn.Module):
    """One cross layer of E experts of rank R."""

    def __init__(self, width: int, rank: int, num_experts: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(num_experts, width, rank))  # V
        self.up = nn.Parameter(torch.empty(num_experts, rank, width))  # Uᵀ
        self.bias = nn.Parameter(torch.zeros(width))
        self.middle = nn.Parameter(torch.empty(num_experts, rank, rank)) if num_experts > 1 else None  # C
        self.gate = Linear(width, num_experts, bias=False) if num_experts > 1 else None
        for weight in (self.down, self.up, self.middle):
            for expert in () if weight is None else weight:
                nn.init.xavier_normal_(expert)

    def forward(self, start: Float[Tensor, "B X"], x: Float[Tensor, "B X"]) -> Float[Tensor, "B X"]:
        small = x @ self.down  # (B, X) @ (E, X, R) -> (E, B, R)
        if self.middle is None or self.gate is None:
            return torch.addcmul(x, start, small[0] @ self.up[0] + self.bias)
        small = torch.tanh(torch.tanh(small) @ self.middle)
        gates = torch.softmax(self.gate(x), dim=1)  # (B, E); they sum to 1, so the bias is added once
        mixed = (gates.T.unsqueeze(2) * small).transpose(0, 1).flatten(1) @ self.up.flatten(0, 1)  # (B, E·R) -> (B, X)
        return torch.addcmul(x, start, mixed + self.bias)


@keeps_config
class DCNV2(nn.Module):
    """Logit of a click from `num_layers` cross layers and an MLP, one after the other or side by side.

    `rank` absent: full matrices. With `rank`, `num_experts` low-rank matrices a layer under a gate.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        embedding_dim: int = 16,
        num_layers: int = 3,
        rank: int | None = None,
        num_experts: int = 1,
        stacked: bool = False,
        hidden: Sequence[int] = (400, 400, 400),
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        if rank is None and num_experts != 1:
            raise ValueError(f"experts are of low rank: num_experts={num_experts} needs a rank, e.g. rank=64")
        if (rank is not None and rank < 1) or num_experts < 1:
            raise ValueError(f"rank and num_experts are at least 1, received {rank} and {num_experts}")
        self.stacked = stacked
        self.stack = Stack(spec, embedding_dim)
        width = self.stack.out_features
        self.crosses = nn.ModuleList(
            _Cross(width) if rank is None else _LowRankCross(width, rank, num_experts) for _ in range(num_layers)
        )
        self.deep = MLP(width, hidden, dropout=dropout, batch_norm=batch_norm, activate_last=True) if hidden else None
        beside = 0 if stacked and hidden else width
        self.top = MLP(beside + (hidden[-1] if hidden else 0), (1,))

    def forward(self, batch: Batch) -> Float[Tensor, "B"]:
        """Logits [B] from `ids` and `numbers`."""
        start = self.stack(batch)  # (B, X)
        x = start
        for cross in self.crosses:
            x = cross(start, x)
        if self.deep is not None:
            x = self.deep(x) if self.stacked else torch.cat((x, self.deep(start)), dim=1)
        logit: Tensor = self.top(x).squeeze(1)  # (B,)
        return logit
