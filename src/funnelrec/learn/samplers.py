"""Samplers of negative items. Each draws with replacement among the real items (rows 2 and up) and knows its own odds.

`sample(n, generator)` gives item rows [n] and the log-probability of each under one draw; `log_q_of(rows)` the latter
for any rows. Without a generator the draws come from torch's default one, which `fit` seeds and checkpoints.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from funnelrec.core.shapes import FIRST_KNOWN

__all__ = ["LogUniform", "Popularity", "Sampler", "Uniform"]


@runtime_checkable
class Sampler(Protocol):
    """What a loss needs to know of a sampler."""

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Int[Tensor, "n"], Float[Tensor, "n"]]:
        """Rows and their log-probabilities."""
        ...

    def log_q_of(self, rows: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Log-probability of each row under one draw."""
        ...


@dataclass(frozen=True)
class Uniform:
    """Every real item with the same probability. `num_items` counts all rows, padding and unknown included."""

    num_items: int

    def __post_init__(self) -> None:
        _require_items(self.num_items)

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Int[Tensor, "n"], Float[Tensor, "n"]]:
        rows = torch.randint(FIRST_KNOWN, self.num_items, (n,), generator=generator)
        return rows, self.log_q_of(rows)

    def log_q_of(self, rows: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
        return torch.full(rows.shape, -math.log(self.num_items - FIRST_KNOWN), device=rows.device)


@dataclass(frozen=True)
class LogUniform:
    """q of row r is (log(k+2) - log(k+1)) / log(n+1) with k = r - 2, n the number of real items.

    It imitates popularity without counts, because a vocabulary's rows are sorted by falling frequency.
    """

    num_items: int

    def __post_init__(self) -> None:
        _require_items(self.num_items)

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Int[Tensor, "n"], Float[Tensor, "n"]]:
        real = self.num_items - FIRST_KNOWN
        draws = torch.rand(n, generator=generator, dtype=torch.float64)
        ranks = (draws * math.log(real + 1)).exp().long().sub_(1)  # inverse of the distribution function
        rows = ranks.clamp_(0, real - 1).add_(FIRST_KNOWN)
        return rows, self.log_q_of(rows)

    def log_q_of(self, rows: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
        rank = (rows - FIRST_KNOWN).double()
        return (torch.log1p(1 / (rank + 1)) / math.log(self.num_items - FIRST_KNOWN + 1)).log().float()


class Popularity:
    """q proportional to max(count, 1)^alpha; `counts` [N] are events per item row, rows 0 and 1 are ignored."""

    def __init__(self, counts: Int[Tensor, "N"], alpha: float = 1.0) -> None:
        _require_items(counts.shape[0])
        weights = counts.double().clamp(min=1) ** alpha
        weights[:FIRST_KNOWN] = 0
        self.alpha = alpha
        self._cumulative = weights.cumsum(0)
        self._log_q = (weights / self._cumulative[-1]).log().float()
        self._digest = hashlib.sha256(weights.numpy().tobytes()).hexdigest()[:12]

    def __repr__(self) -> str:
        return f"Popularity(num_items={len(self._log_q)}, alpha={self.alpha}, digest={self._digest})"

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Int[Tensor, "n"], Float[Tensor, "n"]]:
        draws = torch.rand(n, generator=generator, dtype=torch.float64) * self._cumulative[-1]
        rows = torch.searchsorted(self._cumulative, draws, right=True).clamp_(FIRST_KNOWN, len(self._log_q) - 1)
        return rows, self.log_q_of(rows)

    def log_q_of(self, rows: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
        return self._log_q[rows.to(self._log_q.device)].to(rows.device)


def _require_items(num_items: int) -> None:
    if num_items <= FIRST_KNOWN:
        raise ValueError(f"a sampler needs at least one real item: num_items above {FIRST_KNOWN}, received {num_items}")
