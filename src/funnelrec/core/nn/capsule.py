"""Capsules: squash and routing by agreement (Sabour et al. 2017, arXiv:1710.09829).

`route` serves MIND and ComiRec-DR (capsules = interests, inputs = history items) and capsule networks for pictures
(capsules = classes, inputs = primary capsules).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

__all__ = ["SlotVotes", "route", "squash"]


def squash(s: Float[Tensor, "*shape D"], eps: float = 1e-8) -> Float[Tensor, "*shape D"]:
    """‖s‖²/(1 + ‖s‖²) · s/‖s‖: the direction of s, a length below 1. `eps` keeps the gradient finite at s = 0."""
    squared = s.square().sum(-1, keepdim=True)
    return s * (squared / ((1 + squared) * torch.sqrt(squared + eps)))


def route(
    votes: Float[Tensor, "B L K D"] | Float[Tensor, "B L D"],
    mask: Bool[Tensor, "B L"] | None = None,
    logits: Float[Tensor, "#B L K"] | None = None,
    *,
    iterations: int = 3,
    detach: bool = True,
) -> Float[Tensor, "B K D"]:
    """K capsules from the votes that L inputs cast for each of them, one routing per example.

    Each iteration: c = softmax of the logits over the K capsules (0 at padded inputs), s_k = Σ_l c_lk votes_lk,
    v_k = squash(s_k), and, but for the last one, logits_lk += ⟨v_k, votes_lk⟩. `logits` is where they start (zeros
    when absent). With `detach` only the last iteration passes a gradient to the votes; the values are the same.
    Votes [B, L, D] are the same for every capsule; `logits` then says how many capsules there are, and must tell them
    apart. A capsule whose logits are all -inf takes nothing and is zero.
    """
    if iterations < 1:
        raise ValueError(f"routing needs at least 1 iteration, received {iterations}")
    if logits is None:
        if votes.dim() == 3:
            raise ValueError("capsules that share their votes need logits that differ, received none")
        logits = votes.new_zeros(votes.shape[:3])
    agreement = logits.expand(*votes.shape[:2], -1)  # (B, L, K)
    fixed = votes.detach() if detach else votes
    for _ in range(iterations - 1):
        v = squash(_gather_votes(agreement, fixed, mask))  # (B, K, D)
        agreement = agreement + (
            torch.einsum("bkd,blkd->blk", v, fixed) if fixed.dim() == 4 else fixed @ v.transpose(1, 2)
        )
    return squash(_gather_votes(agreement, votes, mask))


def _gather_votes(logits: Tensor, votes: Tensor, mask: Tensor | None) -> Tensor:
    c = torch.softmax(logits, dim=-1)  # (B, L, K), over the capsules: an input divides its vote among them
    if mask is not None:
        c = c.masked_fill(~mask.unsqueeze(-1), 0.0)
    return torch.einsum("blk,blkd->bkd", c, votes) if votes.dim() == 4 else c.transpose(1, 2) @ votes  # (B, K, D)


class SlotVotes(nn.Module):
    """What each item of a history says of each of K capsules: a matrix of its own for each slot and capsule.

    Slots are counted from the newest. The matrices, K · D² numbers a slot, start at I + N(0, 1/D): from matrices that
    have nothing in common, a vote says where an item stands and not what it is.
    """

    def __init__(self, max_len: int, dim: int, num_capsules: int) -> None:
        super().__init__()
        self.num_capsules = num_capsules
        self.maps = nn.Parameter(torch.empty(max_len, dim, num_capsules * dim))  # row p: p slots before the newest
        nn.init.normal_(self.maps, std=dim**-0.5)
        with torch.no_grad():
            self.maps.add_(torch.eye(dim).repeat(1, num_capsules))

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L K D"]:
        """L may not exceed `max_len`."""
        maps = self.maps[: x.shape[1]].flip(0)  # (L, D, K·D) newest last
        votes = torch.bmm(x.transpose(0, 1), maps)  # (L, B, K·D)
        return votes.transpose(0, 1).reshape(*x.shape[:2], self.num_capsules, -1)  # (B, L, K, D)
