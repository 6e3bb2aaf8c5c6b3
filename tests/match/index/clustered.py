"""Clustered vectors and questions about them, for every approximate index."""

from __future__ import annotations

import torch
from torch import Tensor

from funnelrec.match.index.exact import ExactIndex

__all__ = ["QUERIES", "VALID", "VECTORS", "limits"]


def world(items: int = 3000, users: int = 16, interests: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Clustered item vectors, queries near some of them, valid."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(40, 16, generator=generator)
    vectors = centres[torch.randint(40, (items,), generator=generator)]
    vectors = vectors + 0.4 * torch.randn(items, 16, generator=generator)
    vectors[:2] = 100.0  # rows 0 and 1 would win every search
    queries = vectors[torch.randint(2, items, (users, interests), generator=generator)]
    queries = queries + 0.3 * torch.randn(queries.shape, generator=generator)
    valid = torch.ones(users, interests, dtype=torch.bool)
    valid[0], valid[1, 0] = False, False
    return vectors, queries, valid


VECTORS, QUERIES, VALID = world()


def limits() -> tuple[Tensor, Tensor]:
    """Exclude the true best of every user; allow four items of five."""
    best, _ = ExactIndex(VECTORS).search(QUERIES, VALID, 7)
    return best, torch.arange(len(VECTORS)) % 5 != 0
