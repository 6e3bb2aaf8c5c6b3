"""Item2Vec — items that the same people take get vectors that lie close: skip-gram with negative sampling over sets.

Paper: Barkan, Koenigstein. Item2Vec: Neural Item Embedding for Collaborative Filtering. 2016. arXiv:1603.04259
       Skip-gram: Mikolov, Sutskever, Chen, Corrado, Dean. NIPS 2013. arXiv:1310.4546
Idea:  a user's items are a sentence without an order; predict an item from another one of the same user.

Eq. (1)-(2)  every item of a set is context to every other    _Pairs: a window over the set, shuffled each epoch
Eq. (3)      log σ(u_iᵀ v_j) + Σ_k log σ(−u_iᵀ v_k)           _Tables.step
             k drawn with probability ∝ count^¾               learn.samplers.Popularity, `alpha`
Eq. (4)      an item stays with probability √(t/f) + t/f      _Pairs: drawn each epoch, `subsample` is t
Sec. 3       similarity is the cosine of the u_i              recommend, encode_items
Differs:
- A window over a fresh shuffle instead of all pairs: the same pairs in expectation, each user weighing by the number of
  items and not by its square. `ordered` slides it over time with a random radius, as word2vec does over words.
- An item stays with the probability of the published word2vec code; the paper has 1 − √(t/f) of its leaving.
- Mini-batches with Adagrad (one rate a vector, falling to zero with training) instead of one pair after the other.
- The paper stops at similarities. Here a user is the mean of the directions of her items (`pooling` "last": the newest
  one), and gets the items of the largest cosine; items that training never saw, and everything for a user of whom
  nothing is known, come behind those by popularity.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.core.config import keeps_config
from funnelrec.core.interactions import Events, distinct_pairs
from funnelrec.core.nn.embedding import sum_by_row
from funnelrec.core.nn.items import any_known, newest_items
from funnelrec.core.nn.pooling import masked_last, masked_mean
from funnelrec.core.schema import Spec
from funnelrec.core.shapes import FIRST_KNOWN
from funnelrec.learn.samplers import Popularity
from funnelrec.match.index.topk import top_rows

__all__ = ["Item2Vec"]

PAIRS_AT_ONCE = 2**18  #: pairs of an item and its context that are held, shuffled, at a time
STEPS_AN_EPOCH = 100  #: at least, where the data allow batches of 32
FIRST_SQUARE = 0.1  #: where Adagrad's sums start; from 0 the first step, of any gradient, would be one of size lr
CELLS_AT_ONCE = 2**23  #: scores held at a time: users asking × items


class _Pairs:
    """The pairs (item, context) of an epoch. Events come ordered by user and time; items are numbered from 0."""

    def __init__(
        self,
        user: Tensor,
        item: Tensor,
        window: int,
        subsample: float | None,
        ordered: bool,
        generator: torch.Generator,
    ) -> None:
        self.user, self.item, self.window, self.ordered, self.generator = user, item, window, ordered, generator
        share = torch.bincount(item).double() / len(item)
        t = math.inf if subsample is None else subsample
        self.stays = ((t / share).sqrt() + t / share).clamp(max=1)  # Eq. (4)

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


class _Tables:
    """The two tables in training, rows numbered as the items of `_Pairs`."""

    def __init__(self, count: int, dim: int, generator: torch.Generator) -> None:
        self.inputs = (torch.rand(count, dim, generator=generator) - 0.5) / dim  # u
        self.outputs = torch.zeros(count, dim)  # v
        self._squares = torch.full((count,), FIRST_SQUARE), torch.full((count,), FIRST_SQUARE)

    def step(self, item: Tensor, context: Tensor, negatives: Tensor, lr: float) -> float:
        """One update by Eq. (3) of B pairs and their negatives [B, n]; the mean loss before it. A negative that is the
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

    def _update(self, which: int, rows: Tensor, gradients: Tensor, lr: float) -> None:
        table, squares = (self.inputs, self.outputs)[which], self._squares[which]
        rows, total = sum_by_row(rows, gradients)
        seen = squares[rows] + total.square().mean(1)
        squares[rows] = seen
        table[rows] -= lr * total / seen.sqrt().unsqueeze(1)


@keeps_config
class Item2Vec(nn.Module):
    """Recommends by cosine. `fit` trains it; it needs no other loop.

    `embedding_dim` D; `window` contexts on each side of an item; `num_negatives` a pair, drawn by count^`alpha`;
    `subsample`: t, above which share of all events an item is thinned out (None: never); `ordered`: sequences and not
    sets; `pooling` of the history, its newest `max_len` items.
    """

    vectors: Tensor
    contexts: Tensor
    popularity: Tensor

    def __init__(
        self,
        spec: Spec,
        *,
        embedding_dim: int = 64,
        window: int = 10,
        num_negatives: int = 5,
        alpha: int | float = 0.75,
        subsample: int | float | None = 1e-3,
        ordered: bool = False,
        pooling: str = "mean",
        max_len: int = 50,
    ) -> None:
        super().__init__()
        if window < 1 or num_negatives < 1:
            raise ValueError(f"window and num_negatives must be at least 1, received {window} and {num_negatives}")
        if subsample is not None and subsample <= 0:
            raise ValueError(f"subsample is a share above 0 or None, received {subsample}")
        if pooling not in ("last", "mean"):
            raise ValueError(f"pooling must be last or mean, received {pooling!r}")
        self.spec = spec
        self.window, self.num_negatives, self.alpha = window, num_negatives, alpha
        self.subsample, self.ordered = subsample, ordered
        self.pooling, self.max_len = pooling, max_len
        self.register_buffer("vectors", torch.zeros(spec.num_items, embedding_dim))  # (N, D) u; 0: never seen
        self.register_buffer("contexts", torch.zeros(spec.num_items, embedding_dim), persistent=False)  # (N, D) v
        self.register_buffer("popularity", torch.zeros(spec.num_items))  # (N,) share of the users of the top item
        self.losses: list[float] = []  # the mean of each epoch

    @torch.no_grad()
    def fit(
        self,
        users: Events,
        items: Events,
        times: Events,
        *,
        epochs: int = 20,
        lr: float = 0.3,
        batch_size: int = 4096,
        seed: int = 0,
    ) -> Item2Vec:
        """Train on the positive events of the training part: user rows, item rows, seconds. Starts anew each time."""
        user, item, _ = distinct_pairs(users, items, times)
        counts = torch.bincount(item, minlength=self.spec.num_items)  # (N,)
        self.popularity = counts / counts.max().clamp(min=1)
        self.vectors, self.contexts = torch.zeros_like(self.vectors), torch.zeros_like(self.contexts)
        self.losses = []
        if not len(user):
            return self
        known, item = item.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        user = user.unique_consecutive(return_inverse=True)[1]  # type: ignore[no-untyped-call]
        generator = torch.Generator().manual_seed(seed)
        pairs = _Pairs(user, item, self.window, self.subsample, self.ordered, generator)
        tables = _Tables(len(known), self.vectors.shape[1], generator)
        # the samplers know rows 0 and 1 as no items
        sampler = Popularity(torch.cat([known.new_zeros(FIRST_KNOWN), counts[known]]), self.alpha)
        size = int(min(batch_size, max(32, pairs.per_epoch() / STEPS_AN_EPOCH)))
        for epoch in range(epochs):
            total, count = 0.0, 0
            for centre, context, behind in pairs.epoch():
                rate = lr * (1 - (epoch + behind) / epochs)
                for start in range(0, len(centre), size):
                    part = slice(start, start + size)
                    drawn, _ = sampler.sample(len(centre[part]) * self.num_negatives, generator)
                    negatives = drawn.view(-1, self.num_negatives) - FIRST_KNOWN
                    total += tables.step(centre[part], context[part], negatives, rate) * len(negatives)
                    count += len(negatives)
            self.losses.append(total / max(count, 1))
        self.vectors[known], self.contexts[known] = tables.inputs, tables.outputs
        return self

    def encode_items(self, rows: Int[Tensor, "N"]) -> Float[Tensor, "N D"]:
        """The directions of the items: vectors of length 1; zero for one that training never saw."""
        return F.normalize(self.vectors[rows], dim=1)

    @torch.no_grad()
    def recommend(
        self,
        batch: Batch,
        k: int,
        exclude: Int[Tensor, "B X"] | None = None,
        allowed: Bool[Tensor, "N"] | None = None,
    ) -> tuple[Int[Tensor, "B k"], Float[Tensor, "B k"]]:
        """Items by cosine with the user; behind them, below -1, the others by popularity."""
        items = self.encode_items(torch.arange(self.spec.num_items))
        behind = self.popularity - 2
        parts = []
        for part in torch.split(torch.arange(batch.size), max(1, CELLS_AT_ONCE // self.spec.num_items)):
            user, valid = self._users(batch.select(part), items)
            scores = torch.where(valid.unsqueeze(1) & (items != 0).any(1), user @ items.T, behind)  # (b, N)
            if allowed is not None:
                scores.masked_fill_(~allowed, -torch.inf)
            if exclude is not None:
                scores.scatter_(1, exclude[part], -torch.inf)
            scores[:, :FIRST_KNOWN] = -torch.inf
            parts.append(top_rows(scores, k))
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def _users(self, batch: Batch, items: Tensor) -> tuple[Float[Tensor, "b D"], Bool[Tensor, "b"]]:
        history, mask = newest_items(batch, self.max_len)
        mask = mask & (self.popularity[history] > 0)
        pooled = (masked_mean if self.pooling == "mean" else masked_last)(items[history], mask)
        return F.normalize(pooled, dim=1), any_known(history, mask)
