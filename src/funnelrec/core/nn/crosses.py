"""Interactions between the vectors of the fields."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

__all__ = ["fm_pairs"]


def fm_pairs(e: Float[Tensor, "B F D"]) -> Float[Tensor, "B"]:
    """Σ_{i<j} ⟨e_i, e_j⟩ = ½ Σ_d [(Σ_i e_id)² - Σ_i e_id²], in O(F·D) (Rendle 2010, Lemma 3.1).

    `e` are the vectors already multiplied by their values.
    """
    total = e.sum(1)  # (B, D)
    return 0.5 * (total.square().sum(1) - e.square().sum((1, 2)))  # (B,)
