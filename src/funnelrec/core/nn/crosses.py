"""Interactions between the vectors of the fields. All take vectors that are already multiplied by their values."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["bi_interaction", "fm_pairs", "pair_index"]


def pair_index(fields: int) -> tuple[Int[Tensor, "P"], Int[Tensor, "P"]]:
    """The pairs i < j of so many fields, as two index tensors of P = F (F - 1) / 2 entries, (0, 1), (0, 2), …"""
    left, right = torch.triu_indices(fields, fields, offset=1)
    return left, right


def fm_pairs(e: Float[Tensor, "B F D"]) -> Float[Tensor, "B"]:
    """Σ_{i<j} ⟨e_i, e_j⟩ = ½ Σ_d [(Σ_i e_id)² - Σ_i e_id²], in O(F·D) (Rendle 2010, Lemma 3.1)."""
    total = e.sum(1)  # (B, D)
    return 0.5 * (total.square().sum(1) - e.square().sum((1, 2)))  # (B,)


def bi_interaction(e: Float[Tensor, "B F D"]) -> Float[Tensor, "B D"]:
    """Σ_{i<j} e_i ∘ e_j = ½ [(Σ_i e_i)² - Σ_i e_i²], in O(F·D) (He and Chua 2017, Eq. 4). Its sum is `fm_pairs`."""
    return 0.5 * (e.sum(1).square() - e.square().sum(1))  # (B, F, D) -> (B, D)
