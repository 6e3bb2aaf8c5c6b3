"""UserCF — people are alike when they took the same items; a user gets what people alike to her took.

Paper: Breese, Heckerman, Kadie. Empirical Analysis of Predictive Algorithms for Collaborative Filtering. UAI 1998.
       arXiv:1301.7363
Idea:  the users who share most with the history, popular items counting less, vote for what they took besides.

Eq. (1)  c_uv = Σ_{i of both} w_i                           _spread over the takers of the history's items;
                                                             w_i = 1 / log(1 + |N(i)|) with `iif`, else 1
Eq. (2)  sim(u, v) = c_uv / √(|N(u)| |N(v)|), v ≠ u          neighbours; the cosine when w = 1
Eq. (3)  s_uj = Σ_{v neighbour of u, v took j} sim(u, v)     recommend
Differs:
- Implicit feedback: cosine of sets where the paper correlates votes; a pair of user and item counts once.
- A user is her history and not her row: strangers are served, and what came after training counts. Her own row is no
  neighbour of hers.
- Only the newest `max_len` items of a user count, here and there.
- An item that no neighbour took scores its share of popularity minus 1: it stands behind every other one, and a user
  without history gets the most popular items.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.core.config import keeps_config
from funnelrec.core.interactions import Events, distinct_pairs
from funnelrec.core.schema import Spec
from funnelrec.core.shapes import FIRST_KNOWN
from funnelrec.match.index.topk import top_rows

__all__ = ["UserCF"]

CELLS_AT_ONCE = 2**22  #: scores held at a time: users asking × (users or items there are)
PAIRS_AT_ONCE = 2**22  #: of an item and its taker, or of a neighbour and her item, looked at in one go
DATA = ("user_items", "item_users")  #: buffers whose length is the number of events


def _make_room(module: nn.Module, state: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    """Before load_state_dict, which wants equal shapes: the events to come are as many as they are."""
    for name in DATA:
        if prefix + name in state:
            module.register_buffer(name, torch.empty_like(state[prefix + name]))


@keeps_config
class UserCF(nn.Module):
    """`num_neighbours` users who vote; `iif`: popular items count less; `max_len` newest items of a user that count.

    Holds the training part's pairs of user and item, twice (by user and by item), 8 bytes a pair.
    """

    user_offsets: Tensor
    user_items: Tensor
    item_offsets: Tensor
    item_users: Tensor
    weights: Tensor
    popularity: Tensor

    def __init__(self, spec: Spec, *, num_neighbours: int = 100, iif: bool = True, max_len: int = 200) -> None:
        super().__init__()
        if num_neighbours < 1 or max_len < 1:
            raise ValueError(f"num_neighbours and max_len must be at least 1, received {num_neighbours} and {max_len}")
        self.spec = spec
        self.num_neighbours = num_neighbours
        self.iif = iif
        self.max_len = max_len
        self.register_buffer("user_offsets", torch.zeros(spec.num_users + 1, dtype=torch.int64))
        self.register_buffer("user_items", torch.zeros(0, dtype=torch.int32))  # CSR: whose items
        self.register_buffer("item_offsets", torch.zeros(spec.num_items + 1, dtype=torch.int64))
        self.register_buffer("item_users", torch.zeros(0, dtype=torch.int32))  # CSR: who took it
        self.register_buffer("weights", torch.zeros(spec.num_items))  # (N,) w_i
        self.register_buffer("popularity", torch.zeros(spec.num_items))  # (N,) share of the users of the top item
        self.register_load_state_dict_pre_hook(_make_room)  # type: ignore[no-untyped-call]

    def fit(self, users: Events, items: Events, times: Events) -> UserCF:
        """Keep the positive events of the training part: user rows, item rows, seconds."""
        user, item, _ = distinct_pairs(users, items, times)  # by user, oldest first
        counts = torch.bincount(item, minlength=self.spec.num_items)  # (N,)
        self.popularity = counts / counts.max().clamp(min=1)
        self.weights = 1 / torch.log1p(counts.clamp(min=1)) if self.iif else torch.ones(self.spec.num_items)
        lengths = torch.bincount(user, minlength=self.spec.num_users)
        after = lengths.cumsum(0)[user] - torch.arange(len(user))  # items from here to the user's newest
        user, item = user[after <= self.max_len], item[after <= self.max_len]
        by_item = item.argsort(stable=True)
        self.user_offsets, self.user_items = _offsets(user, self.spec.num_users), item.to(torch.int32)
        self.item_offsets, self.item_users = _offsets(item, self.spec.num_items), user[by_item].to(torch.int32)
        return self

    @torch.no_grad()
    def neighbours(self, batch: Batch) -> tuple[Int[Tensor, "B V"], Float[Tensor, "B V"]]:
        """The most alike users with Eq. (2), best first, ties to the lower row; row 0 and 0.0 where there are fewer."""
        history = batch.history[:, -self.max_len :].masked_fill(~batch.mask[:, -self.max_len :], 0).sort(dim=1).values
        first = history >= FIRST_KNOWN
        first[:, 1:] &= history[:, 1:] != history[:, :-1]  # each item once
        owner, _ = first.nonzero(as_tuple=True)
        item = history[first]
        sums = torch.zeros(len(history) * self.spec.num_users)
        for pair, taker in _spread(self.item_offsets, self.item_users, item):
            sums.scatter_add_(0, owner[pair] * self.spec.num_users + taker, self.weights[item[pair]])  # Eq. (1)
        own, theirs = first.sum(1).clamp(min=1).rsqrt(), self.user_offsets.diff().clamp(min=1).rsqrt()
        alike = sums.view(-1, self.spec.num_users) * own.unsqueeze(1) * theirs  # (B, U) Eq. (2)
        if "user" in batch:
            alike.scatter_(1, batch.user.unsqueeze(1), 0.0)
        rows, values = top_rows(alike.masked_fill(alike <= 0, -torch.inf), self.num_neighbours)
        return rows, values.masked_fill(values == -torch.inf, 0.0)

    @torch.no_grad()
    def recommend(
        self,
        batch: Batch,
        k: int,
        exclude: Int[Tensor, "B X"] | None = None,
        allowed: Bool[Tensor, "N"] | None = None,
    ) -> tuple[Int[Tensor, "B k"], Float[Tensor, "B k"]]:
        """Items by Eq. (3); behind them, below 0, the others by popularity."""
        at_once = max(1, CELLS_AT_ONCE // max(self.spec.num_items, self.spec.num_users))
        parts = []
        for part in torch.split(torch.arange(batch.size), at_once):
            scores = self._scores(batch.select(part))  # (b, N)
            if allowed is not None:
                scores.masked_fill_(~allowed, -torch.inf)
            if exclude is not None:
                scores.scatter_(1, exclude[part], -torch.inf)
            scores[:, :FIRST_KNOWN] = -torch.inf
            parts.append(top_rows(scores, k))
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def _scores(self, batch: Batch) -> Float[Tensor, "b N"]:
        neighbours, alike = self.neighbours(batch)
        owner, place = (alike > 0).nonzero(as_tuple=True)
        neighbour, value = neighbours[owner, place], alike[owner, place]
        scores = torch.zeros(batch.size * self.spec.num_items)
        for pair, item in _spread(self.user_offsets, self.user_items, neighbour):
            scores.scatter_add_(0, owner[pair] * self.spec.num_items + item, value[pair])  # Eq. (3)
        scores = scores.view(-1, self.spec.num_items)
        return torch.where(scores > 0, scores, self.popularity - 1)  # (b, N)


def _offsets(rows: Int[Tensor, "n"], size: int) -> Int[Tensor, "m"]:
    """Where each row's values begin once they are ordered by row."""
    return torch.cat([rows.new_zeros(1), torch.bincount(rows, minlength=size).cumsum(0)])


def _spread(
    offsets: Int[Tensor, "m"], values: Int[Tensor, "n"], rows: Int[Tensor, "P"]
) -> Iterator[tuple[Int[Tensor, "T"], Int[Tensor, "T"]]]:
    """All values of each of `rows`: which of `rows` it is of, and the value; PAIRS_AT_ONCE or one row's at a time."""
    count = offsets[rows + 1] - offsets[rows]
    ends = count.cumsum(0)
    shift = offsets[rows] - (ends - count)  # from a place among all values spread to one in `values`
    first, done = 0, 0
    while first < len(rows):
        last = max(first + 1, int(torch.searchsorted(ends, done + PAIRS_AT_ONCE, right=True)))
        pair = torch.arange(first, last).repeat_interleave(count[first:last])
        yield pair, values[torch.arange(done, done + len(pair)) + shift[pair]].long()
        first, done = last, int(ends[last - 1])
