"""ItemCF — items are alike when the same users took them; a user gets what is alike to the history.

Paper: Sarwar, Karypis, Konstan, Riedl. Item-Based Collaborative Filtering Recommendation Algorithms. WWW 2001.
Idea:  count how often two items share a user, divide out how popular each is, keep the nearest neighbours of each.

Eq. (1)  c_ij = Σ_{u took i and j} w_u d_uij          _Pairs; w_u = 1 / log(1 + |N(u)|) with `iuf` (Breese et al. 1998),
                                                       d_uij = 2^(−|t_ui − t_uj| / half_life), both else 1
Eq. (2)  sim(i, j) = c_ij / √(|N(i)| |N(j)|), i ≠ j    _keep; the cosine when w = d = 1
Eq. (3)  s_uj = Σ_{i in history, j neighbour of i} sim(i, j)   recommend
Differs:
- Implicit feedback: cosine of sets where the paper compares ratings; a pair of user and item counts once.
- Only a user's newest `max_len` items are paired, so that one very long history cannot cost its square.
- An item that no neighbour supports scores its share of popularity minus 1: it stands behind every supported one, and
  a user without history gets the most popular items.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.core.config import keeps_config
from funnelrec.core.interactions import DAY, Events, distinct_pairs
from funnelrec.core.schema import Spec
from funnelrec.core.shapes import FIRST_KNOWN
from funnelrec.match.index.topk import top_rows

__all__ = ["ItemCF"]

PAIRS_AT_ONCE = 2**22  #: pairs of items counted in one go
CELLS_AT_ONCE = 2**23  #: numbers of a dense block, 64 MiB
DENSE_BELOW = 8  #: cells of the item-item matrix per counted pair up to which dense blocks are faster than sorting


class _Pairs:
    """The terms of Eq. (1), in blocks of items. Events come ordered by user and time, each (user, item) once."""

    def __init__(
        self, user: Tensor, item: Tensor, time: Tensor, max_len: int, iuf: bool, half_life: float | None
    ) -> None:
        _, lengths = user.unique_consecutive(return_counts=True)  # type: ignore[no-untyped-call]
        after = lengths.cumsum(0).repeat_interleave(lengths) - torch.arange(len(user))  # items from here to the newest
        newest = after <= max_len
        self.item, self.time = item[newest], time[newest]  # (n,) ordered by user
        kept = lengths.clamp(max=max_len)
        weight = 1 / torch.log1p(lengths.double()) if iuf else torch.ones(len(lengths), dtype=torch.float64)
        weight, lengths = weight.repeat_interleave(kept), kept
        length = lengths.repeat_interleave(lengths)
        start = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        # the same events ordered by item: each is paired with all events of its user
        self.event = self.item.argsort(stable=True)
        self.start, self.length, self.weight = start[self.event], length[self.event], weight[self.event]
        self.before = torch.cat([length.new_zeros(1), self.length.cumsum(0)])  # pairs before each event
        self.total = int(self.before[-1])
        self.items, self.counts = self.item[self.event].unique_consecutive(return_counts=True)  # type: ignore[no-untyped-call]
        self.first_event = torch.cat([length.new_zeros(1), self.counts.cumsum(0)])  # of each of `items`
        self.half_life = half_life

    def blocks(self, rows: int | None) -> Iterator[tuple[int, int]]:
        """Ranges of items that cover all: of at most `rows` rows, or None: of PAIRS_AT_ONCE pairs (or one item)."""
        ends = self.before[self.first_event[1:]]  # pairs up to the end of each item
        begin = 0
        while begin < len(self.items):
            first = int(self.items[begin])
            if rows is None:
                done = self.before[self.first_event[begin]]
                end = int(torch.searchsorted(ends, done + PAIRS_AT_ONCE, right=True))
            else:
                end = int(torch.searchsorted(self.items, first + rows))
            end = max(begin + 1, end)
            yield first, int(self.items[end - 1]) + 1
            begin = end

    def dense(self, first: int, last: int, num_items: int) -> Float[Tensor, "rows N"]:
        """Eq. (1) of items first..last-1 with all items."""
        sums = torch.zeros((last - first) * num_items, dtype=torch.float64)
        for row, column, value in self._terms(first, last):
            sums.scatter_add_(0, row * num_items + column, value)
        block = sums.view(last - first, num_items)
        block[torch.arange(last - first), torch.arange(first, last)] = 0.0
        return block

    def sparse(self, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        """The same as (row - first, column, sum), rows and then columns rising."""
        width = int(self.items[-1]) + 1
        keys, sums = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.float64)
        for row, column, value in self._terms(first, last):
            other = row + first != column
            found = torch.cat([keys, (row * width + column)[other]])
            values = torch.cat([sums, value[other]])
            keys, pair = found.unique(return_inverse=True)  # type: ignore[no-untyped-call]
            sums = torch.zeros(len(keys), dtype=torch.float64).scatter_add_(0, pair, values)
        return keys // width, keys % width, sums

    def _terms(self, first: int, last: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(row - first, column, w_u d_uij) of items first..last-1, PAIRS_AT_ONCE at a time or those of one event."""
        low, high = torch.searchsorted(self.items, torch.tensor([first, last])).tolist()
        event, stop = int(self.first_event[low]), int(self.first_event[high])
        while event < stop:
            until = int(torch.searchsorted(self.before, self.before[event] + PAIRS_AT_ONCE, right=True)) - 1
            part = slice(event, min(max(until, event + 1), stop))
            length = self.length[part]
            own = torch.arange(len(length)).repeat_interleave(length)
            shift = self.start[part] - (self.before[part] - self.before[event])
            other = torch.arange(len(own)) + shift[own]  # the paired event, in order of users
            mine = self.event[part]
            value = self.weight[part][own]
            if self.half_life is not None:
                apart = (self.time[mine][own] - self.time[other]).abs().double()
                value = value * torch.exp2(-apart / (self.half_life * DAY))
            yield (self.item[mine] - first)[own], self.item[other], value
            event = part.stop


@keeps_config
class ItemCF(nn.Module):
    """`num_neighbours` kept of each item; `iuf`: active users count less; `half_life` (days) of two events' distance
    in time, and of a history item's age when the batch has `time` and `history_times`; `max_len` of a user's items."""

    neighbours: Tensor
    similarities: Tensor
    popularity: Tensor

    def __init__(
        self,
        spec: Spec,
        *,
        num_neighbours: int = 100,
        iuf: bool = True,
        half_life: int | float | None = None,
        max_len: int = 200,
    ) -> None:
        super().__init__()
        if num_neighbours < 1 or max_len < 1:
            raise ValueError(f"num_neighbours and max_len must be at least 1, received {num_neighbours} and {max_len}")
        if half_life is not None and half_life <= 0:
            raise ValueError(f"half_life must be above 0 days or None, received {half_life}")
        self.spec = spec
        self.num_neighbours = num_neighbours
        self.iuf = iuf
        self.half_life = half_life
        self.max_len = max_len
        self.register_buffer("neighbours", torch.zeros(spec.num_items, num_neighbours, dtype=torch.int32))  # (N, K)
        self.register_buffer("similarities", torch.zeros(spec.num_items, num_neighbours))  # (N, K), 0 = no neighbour
        self.register_buffer("popularity", torch.zeros(spec.num_items))  # (N,) share of the users of the top item

    def fit(self, users: Events, items: Events, times: Events) -> ItemCF:
        """Count the positive events of the training part: user rows, item rows, seconds."""
        user, item, time = distinct_pairs(users, items, times)
        counts = torch.bincount(item, minlength=self.spec.num_items).float()  # (N,)
        self.popularity = counts / counts.max().clamp(min=1)
        self.neighbours, self.similarities = torch.zeros_like(self.neighbours), torch.zeros_like(self.similarities)
        if not len(user):
            return self
        pairs = _Pairs(user, item, time, self.max_len, self.iuf, self.half_life)
        scale = counts.double().clamp(min=1).rsqrt()  # (N,)
        dense = self.spec.num_items**2 <= DENSE_BELOW * pairs.total
        for first, last in pairs.blocks(max(1, CELLS_AT_ONCE // self.spec.num_items) if dense else None):
            sums = pairs.dense(first, last, self.spec.num_items) if dense else pairs.sparse(first, last)
            self._keep(sums, first, scale)
        return self

    @torch.no_grad()
    def recommend(
        self,
        batch: Batch,
        k: int,
        exclude: Int[Tensor, "B X"] | None = None,
        allowed: Bool[Tensor, "N"] | None = None,
    ) -> tuple[Int[Tensor, "B k"], Float[Tensor, "B k"]]:
        """Items by Eq. (3); behind them, below 0, the others by popularity."""
        at_once = max(1, CELLS_AT_ONCE // max(self.spec.num_items, batch.history.shape[1] * self.num_neighbours))
        parts = []
        for start in range(0, batch.size, at_once):
            part = slice(start, start + at_once)
            scores = self._scores(batch.select(torch.arange(batch.size)[part]))  # (b, N)
            if allowed is not None:
                scores.masked_fill_(~allowed, -torch.inf)
            if exclude is not None:
                scores.scatter_(1, exclude[part], -torch.inf)
            scores[:, :FIRST_KNOWN] = -torch.inf
            parts.append(top_rows(scores, k))
        if not parts:
            return torch.zeros(0, k, dtype=torch.int64), torch.zeros(0, k)
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def _scores(self, batch: Batch) -> Float[Tensor, "b N"]:
        history = batch.history.masked_fill(~batch.mask, 0)
        ordered, order = history.sort(dim=1, stable=True)
        last = torch.ones_like(ordered, dtype=torch.bool)  # of equal items the newest counts
        last[:, :-1] = ordered[:, 1:] != ordered[:, :-1]
        weight = torch.zeros_like(history, dtype=torch.float32).scatter(1, order, last.float())  # (b, L)
        if self.half_life is not None and "time" in batch and "history_times" in batch:
            age = (batch.time.unsqueeze(1) - batch.history_times).clamp(min=0)
            weight = weight * torch.exp2(-age.double() / (self.half_life * DAY)).float()
        parts = self.similarities[history] * weight.unsqueeze(2)  # (b, L, K)
        scores = parts.new_zeros(len(history), self.spec.num_items)
        scores.scatter_add_(1, self.neighbours[history].long().flatten(1), parts.flatten(1))  # Eq. (3)
        return torch.where(scores > 0, scores, self.popularity - 1)  # (b, N)

    def _keep(self, sums: Tensor | tuple[Tensor, Tensor, Tensor], first: int, scale: Tensor) -> None:
        """The `num_neighbours` best of each item, ties to the lower row. `sums`: a dense block of Eq. (1), [rows, N],
        or its (row, column, sum) with rows and then columns rising; row 0 of it is item `first`."""
        if isinstance(sums, Tensor):
            sims = (sums * scale[first : first + len(sums)].unsqueeze(1) * scale).float()  # (rows, N) Eq. (2)
            neighbours, values = top_rows(sims.masked_fill(sims == 0, -torch.inf), self.num_neighbours)
            self.neighbours[first : first + len(sums)] = neighbours.to(torch.int32)
            self.similarities[first : first + len(sums)] = values.masked_fill(values == -torch.inf, 0.0)
            return
        rows, columns, totals = sums
        similarity = (totals * scale[rows + first] * scale[columns]).float()  # Eq. (2)
        order = similarity.argsort(descending=True, stable=True)
        order = order[rows[order].argsort(stable=True)]
        rows = rows[order]
        place = torch.arange(len(rows)) - torch.searchsorted(rows, rows)  # among the neighbours of its item
        kept = place < self.num_neighbours
        self.neighbours[rows[kept] + first, place[kept]] = columns[order][kept].to(torch.int32)
        self.similarities[rows[kept] + first, place[kept]] = similarity[order][kept]
