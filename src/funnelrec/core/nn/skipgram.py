"""Skip-gram with negative sampling, over words or over items: the pairs of an epoch, the two tables, the training.

Source: Mikolov, Sutskever, Chen, Corrado, Dean. Distributed representations of words and phrases and their
        compositionality. NIPS 2013. arXiv:1310.4546, and the published word2vec.c where the paper is silent.

Eq. (1)  log σ(u_iᵀ v_j) + Σ_k log σ(−u_iᵀ v_k)                 Tables.step; i the centre, j one of its contexts
Eq. (2)  k drawn with probability ∝ count^alpha                  Noise
Eq. (3)  a token stays with probability √(t/f) + t/f             Pairs, `subsample` is t; before windows are laid
Differs: mini-batches with Adagrad, one rate a vector, falling to zero with training, instead of one pair after the
    other; a pair may have negatives of its own or share many with the pairs of its batch (a matrix product, several
    times as fast), each then counting `num_negatives` over their number, so that the sum of Eq. (1) has the same mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from funnelrec.core.nn.embedding import sum_by_row

__all__ = ["Noise", "Pairs", "SkipGram", "Tables"]

PAIRS_AT_ONCE = 2**18  #: pairs of a centre and its context that are held, shuffled, at a time
STEPS_AN_EPOCH = 100  #: at least, where the data allow batches of 32
FIRST_SQUARE = 0.1  #: where Adagrad's sums start; from 0 the first step, of any gradient, would be one of size lr


class Noise:
    """Draws of tokens 0 … N - 1 with probability ∝ count^alpha; one that never occurs counts as one that did once."""

    def __init__(self, counts: Int[Tensor, "N"], alpha: int | float) -> None:
        self._cumulative = (counts.double().clamp(min=1) ** alpha).cumsum(0)

    def draw(self, n: int, generator: torch.Generator) -> Int[Tensor, "n"]:
        """n of them, with replacement."""
        draws = torch.rand(n, generator=generator, dtype=torch.float64) * self._cumulative[-1]
        return torch.searchsorted(self._cumulative, draws, right=True).clamp_(max=len(self._cumulative) - 1)


class Pairs:
    """The pairs (item, context) of an epoch. Events are ordered by user or text, then by time; items count from 0."""

    def __init__(
        self,
        user: Int[Tensor, "E"],
        item: Int[Tensor, "E"],
        window: int,
        subsample: int | float | None,
        ordered: bool,
        generator: torch.Generator,
    ) -> None:
        self.user, self.item, self.window, self.ordered, self.generator = user, item, window, ordered, generator
        share = torch.bincount(item).double() / len(item)
        t = math.inf if subsample is None else subsample
        self.stays = ((t / share).sqrt() + t / share).clamp(max=1)  # Eq. (3)

    def per_epoch(self) -> float:
        """How many there are, about."""
        lengths = torch.bincount(self.user, weights=self.stays[self.item])
        reach = (self.window + 1) / 2 if self.ordered else self.window
        return float((lengths * torch.minimum(2 * torch.tensor(reach), (lengths - 1).clamp(min=0))).sum())

    def epoch(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Blocks of (items, contexts, share of the epoch that is behind), users in a random order."""
        kept = torch.rand(len(self.item), generator=self.generator, dtype=torch.float64) < self.stays[self.item]
        user, item = self.user[kept], self.item[kept]
        if not self.ordered:
            shuffled = torch.randperm(len(user), generator=self.generator)
            user, item = user[shuffled], item[shuffled]
        place = torch.randperm(int(self.user.max()) + 1, generator=self.generator)[user]
        place, order = place.sort(stable=True)
        item = item[order]
        offsets = torch.cat([torch.arange(-self.window, 0), torch.arange(1, self.window + 1)])  # (2w,)
        size = max(1, PAIRS_AT_ONCE // (2 * self.window))
        for start in range(0, len(item), size):
            here = torch.arange(start, min(start + size, len(item)))
            there = here.unsqueeze(1) + offsets
            inside = (there >= 0) & (there < len(item))
            there = there.clamp(0, len(item) - 1)
            inside &= place[there] == place[here].unsqueeze(1)
            if self.ordered:
                radius = torch.randint(1, self.window + 1, (len(here), 1), generator=self.generator)
                inside &= offsets.abs() <= radius
            row, column = inside.nonzero(as_tuple=True)
            mixed = torch.randperm(len(row), generator=self.generator)
            row, column = row[mixed], column[mixed]
            yield item[here[row]], item[there[row, column]], start / len(item)


class Tables:
    """The two tables in training, rows numbered as the items of `Pairs`."""

    def __init__(self, count: int, dim: int, generator: torch.Generator) -> None:
        self.inputs = (torch.rand(count, dim, generator=generator) - 0.5) / dim  # u
        self.outputs = torch.zeros(count, dim)  # v
        self._squares = torch.full((count,), FIRST_SQUARE), torch.full((count,), FIRST_SQUARE)

    def step(
        self, item: Int[Tensor, "B"], context: Int[Tensor, "B"], negatives: Int[Tensor, "B n"], lr: int | float
    ) -> float:
        """One update by Eq. (1) of B pairs and the negatives of each; the mean loss before it. A negative that is the
        context itself does not count."""
        rows = torch.cat([context.unsqueeze(1), negatives], dim=1)  # (B, 1 + n)
        u, v = self.inputs[item], self.outputs[rows]  # (B, D), (B, 1 + n, D)
        scores = torch.bmm(v, u.unsqueeze(2)).squeeze(2)  # (B, 1 + n)
        scores[:, 0].neg_()
        real = torch.ones_like(scores)
        real[:, 1:] = negatives != context.unsqueeze(1)
        loss = (F.softplus(scores) * real).sum() / len(item)
        slope = torch.sigmoid(scores) * real
        slope[:, 0].neg_()
        self._update(0, item, torch.bmm(slope.unsqueeze(1), v).squeeze(1), lr)
        self._update(1, rows.flatten(), (slope.unsqueeze(2) * u.unsqueeze(1)).flatten(0, 1), lr)
        return float(loss)

    def shared_step(
        self,
        item: Int[Tensor, "B"],
        context: Int[Tensor, "B"],
        negatives: Int[Tensor, "S"],
        weight: int | float,
        lr: int | float,
    ) -> float:
        """The same where all pairs have the same S negatives, each counting `weight`."""
        u, v, against = self.inputs[item], self.outputs[context], self.outputs[negatives]  # (B, D), (B, D), (S, D)
        own = -(u * v).sum(1)  # (B,)
        scores = u @ against.T  # (B, S)
        scores[negatives == context.unsqueeze(1)] = -torch.inf  # σ and softplus are 0 there
        loss = F.softplus(own).mean() + weight * F.softplus(scores).sum() / len(item)
        pull, push = -torch.sigmoid(own).unsqueeze(1), torch.sigmoid(scores).mul_(weight)
        self._update(0, item, pull * v + push @ against, lr)
        self._update(1, torch.cat([context, negatives]), torch.cat([pull * u, push.T @ u]), lr)
        return float(loss)

    def _update(self, which: int, rows: Tensor, gradients: Tensor, lr: float) -> None:
        table, squares = (self.inputs, self.outputs)[which], self._squares[which]
        rows, total = sum_by_row(rows, gradients)
        seen = squares[rows] + total.square().mean(1)
        squares[rows] = seen
        table[rows] -= lr * total / seen.sqrt().unsqueeze(1)


@dataclass(frozen=True, kw_only=True)
class SkipGram:
    """How to train; calling it does.

    `embedding_dim` D; `window` contexts on each side: of a set, shuffled, or of a sequence (`ordered`), the radius then
    drawn from 1..window; `num_negatives` a pair, drawn by count^`alpha`; `shared` of them serve a whole batch (None:
    each pair has its own); `subsample` t (None: everything stays); the rate `lr` falls to 0.
    """

    embedding_dim: int = 64
    window: int = 10
    num_negatives: int = 5
    alpha: int | float = 0.75
    subsample: int | float | None = 1e-3
    ordered: bool = False
    shared: int | None = None
    epochs: int = 20
    lr: int | float = 0.3
    batch_size: int = 4096
    seed: int = 0

    @torch.no_grad()
    def __call__(
        self, place: Int[Tensor, "E"], token: Int[Tensor, "E"]
    ) -> tuple[Float[Tensor, "N D"], Float[Tensor, "N D"], list[float]]:
        """From E events ordered by place (text, user) and time: input and output vectors, the mean loss of each epoch.

        Places and tokens are numbered from 0, and each of the N tokens occurs.
        """
        counts = torch.bincount(token)
        generator = torch.Generator().manual_seed(self.seed)
        pairs = Pairs(place, token, self.window, self.subsample, self.ordered, generator)
        tables, noise = Tables(len(counts), self.embedding_dim, generator), Noise(counts, self.alpha)
        size = int(min(self.batch_size, max(32, pairs.per_epoch() / STEPS_AN_EPOCH)))
        losses = []
        for epoch in range(self.epochs):
            total, count = 0.0, 0
            for centre, context, behind in pairs.epoch():
                rate = self.lr * (1 - (epoch + behind) / self.epochs)
                for start in range(0, len(centre), size):
                    i, j = centre[start : start + size], context[start : start + size]
                    if self.shared is None:
                        own = noise.draw(len(i) * self.num_negatives, generator).view(-1, self.num_negatives)
                        loss = tables.step(i, j, own, rate)
                    else:
                        drawn = noise.draw(self.shared, generator)
                        loss = tables.shared_step(i, j, drawn, self.num_negatives / self.shared, rate)
                    total, count = total + loss * len(i), count + len(i)
            losses.append(total / max(count, 1))
        return tables.inputs, tables.outputs, losses
