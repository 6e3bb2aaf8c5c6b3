"""Interactions between the vectors of the fields. All take vectors that are already multiplied by their values."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from funnelrec.core.nn.linear import to_autocast

__all__ = ["bi_interaction", "fm_pairs", "fm_with_vectors", "pair_index"]


def pair_index(fields: int) -> tuple[Int[Tensor, "P"], Int[Tensor, "P"]]:
    """The pairs i < j of so many fields, as two index tensors of P = F (F - 1) / 2 entries, (0, 1), (0, 2), …"""
    left, right = torch.triu_indices(fields, fields, offset=1)
    return left, right


def fm_pairs(e: Float[Tensor, "B F D"]) -> Float[Tensor, "B"]:
    """Σ_{i<j} ⟨e_i, e_j⟩ = ½ Σ_d [(Σ_i e_id)² - Σ_i e_id²], in O(F·D) (Rendle 2010, Lemma 3.1)."""
    total = e.sum(1)  # (B, D)
    return 0.5 * (total.square().sum(1) - e.square().sum((1, 2)))  # (B,)


def fm_with_vectors(rows: Float[Tensor, "B F E"]) -> tuple[Float[Tensor, "B"], Float[Tensor, "B F D"]]:
    """Σ_i w_i + Σ_{i<j} ⟨e_i, e_j⟩ of rows (e_i, w_i), E = D + 1, and the e_i for a network, in autocast's type.

    The same as `fm_pairs` and the parts of `rows`, in fewer passes over what is large; can be differentiated once.
    """
    if torch.compiler.is_exporting():
        e, w = torch.split(rows, [rows.shape[2] - 1, 1], dim=2)
        return w.sum((1, 2)) + fm_pairs(e), to_autocast(e)
    found: tuple[Tensor, Tensor] = _FM.apply(rows)  # type: ignore[no-untyped-call]
    return found


class _FM(torch.autograd.Function):
    """∂/∂e_i = Σ_j e_j - e_i, and what the network says; ∂/∂w_i = 1: one buffer for the gradient of the rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
        e, total = rows[..., :-1], rows.sum(1)  # (B, F, D), (B, D + 1)
        value = total[:, -1] + 0.5 * (total[:, :-1].square().sum(1) - e.square().sum((1, 2)))
        ctx.save_for_backward(rows, total)
        return value, to_autocast(e).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_value: Tensor, to_vectors: Tensor) -> Tensor:
        rows, total = ctx.saved_tensors
        outer = to_value.view(-1, 1, 1)
        gradient = torch.empty_like(rows)
        gradient[..., :-1] = to_vectors
        gradient.add_(outer * total.unsqueeze(1)).addcmul_(rows, outer, value=-1)
        gradient[..., -1] = to_value.unsqueeze(1)
        return gradient


def bi_interaction(e: Float[Tensor, "B F D"]) -> Float[Tensor, "B D"]:
    """Σ_{i<j} e_i ∘ e_j = ½ [(Σ_i e_i)² - Σ_i e_i²], in O(F·D) (He and Chua 2017, Eq. 4). Its sum is `fm_pairs`."""
    return 0.5 * (e.sum(1).square() - e.square().sum(1))  # (B, F, D) -> (B, D)
