"""Neighbours: which items are like an item, and which people like a person, by the matcher of a funnel.

    items     cosine of their vectors; of a matcher that counts (item-CF), its own similarity
    people    for each interest of the one, the closest interest of the other (cosine); their mean over her interests.
              With one vector a person that is the cosine; user-CF answers by its own similarity

Item vectors are searched exactly: one question against a million items is one matrix product of milliseconds. The
interests of everybody are encoded at the first question about people and kept.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from funnelrec.core.batch import Batch
from funnelrec.core.contracts import VectorMatcher
from funnelrec.core.shapes import FIRST_KNOWN
from funnelrec.match.index.exact import ExactIndex
from funnelrec.match.index.topk import top_rows
from funnelrec.serve.request import RequestError
from funnelrec.serve.store import Store

__all__ = ["Neighbours"]

PEOPLE_AT_ONCE = 4_096


class Neighbours:
    """Asks a matcher in evaluation mode; `max_len` is the longest history that it is given."""

    def __init__(self, matcher: Any, store: Store, max_len: int) -> None:
        self.matcher = matcher
        self.store = store
        self.max_len = max_len

    # ------------------------------------------------------------------------------------------------------ items
    @torch.no_grad()
    def items(self, row: int, k: int, allowed: Bool[Tensor, "N"] | None) -> tuple[Int[Tensor, "k"], Float[Tensor, "k"]]:
        """The k items most like item `row`, best first, ties to the lower row; row 0 and -inf where there are fewer."""
        if isinstance(getattr(self.matcher, "similarities", None), Tensor):  # item-CF
            scores = torch.full((1, self.store.spec.num_items), -torch.inf)
            found = self.matcher.similarities[row] > 0
            scores[0, self.matcher.neighbours[row][found].long()] = self.matcher.similarities[row][found]
            if allowed is not None:
                scores.masked_fill_(~allowed, -torch.inf)
            rows, values = top_rows(scores, k)
        else:
            vectors, known = self._item_index.vectors, self._known_items
            if not bool(known[row]):
                raise RequestError("training never saw this item, so nothing is known to be like it; ask for another")
            allowed = known if allowed is None else known & allowed
            asked, own = vectors[row].view(1, 1, -1), torch.tensor([[row]])
            rows, values = self._item_index.search(asked, torch.ones(1, 1, dtype=torch.bool), k, own, allowed)
        return rows[0], values[0]

    def vectors(self) -> tuple[Float[Tensor, "N D"], Bool[Tensor, "N"]]:
        """The directions of all item rows and which of them mean anything (rows 0 and 1 do not). Raises RequestError
        where the matcher has no vectors."""
        known = self._known_items.clone()
        known[:FIRST_KNOWN] = False
        return self._item_index.vectors, known

    @torch.no_grad()
    def interests(self, person: int) -> tuple[Float[Tensor, "K D"], Int[Tensor, "L"]]:
        """The vectors of a person's interests and the item rows they were read from, oldest first."""
        if not isinstance(self.matcher, VectorMatcher):
            raise RequestError(f"the matcher {type(self.matcher).__name__} has no vectors of users; leave out the user")
        batch = self._histories(torch.tensor([person]))
        found, valid = self.matcher.encode_users(batch)
        return found[0][valid[0]], batch.history[0][batch.mask[0]]

    @cached_property
    def _item_index(self) -> ExactIndex:
        if not hasattr(self.matcher, "encode_items"):
            raise RequestError(
                f"the matcher {type(self.matcher).__name__} knows no similarity of items; fit the funnel with one that "
                "does, e.g. --match sasrec or --match item_cf"
            )
        with torch.no_grad():
            vectors = self.matcher.encode_items(torch.arange(self.store.spec.num_items))
        return ExactIndex(F.normalize(vectors.float(), dim=1))

    @cached_property
    def _known_items(self) -> Tensor:
        return (self._item_index.vectors != 0).any(1)  # item2vec gives zeros to what training never saw

    # ----------------------------------------------------------------------------------------------------- people
    @torch.no_grad()
    def people(self, person: int, k: int) -> tuple[Int[Tensor, "k"], Float[Tensor, "k"]]:
        """The k people (rows of `store.people`) most like `person`, as `items`. Raises RequestError without history."""
        batch = self._histories(torch.tensor([person]))
        if not bool(batch.mask.any()):
            raise RequestError("nothing is known of this user, so nobody is known to be like them; ask for another")
        if callable(getattr(self.matcher, "neighbours", None)):  # user-CF
            rows, values = self.matcher.neighbours(batch)
            scores = torch.full((1, self.store.people.size), -torch.inf)
            scores[0, rows[0][rows[0] > 0]] = values[0][rows[0] > 0]
        else:
            interests, valid = self._everybody  # (U, K, D), (U, K)
            asked = interests[person][valid[person]]  # (k, D)
            if not len(asked):
                raise RequestError("the matcher knows none of this user's items, so nobody is known to be like them")
            scores = torch.cat([_closeness(asked, *part) for part in self._parts(interests, valid)]).unsqueeze(0)
        scores[0, person] = -torch.inf
        scores[0, :FIRST_KNOWN] = -torch.inf
        rows, values = top_rows(scores, k)
        return rows[0], values[0]

    @staticmethod
    def _parts(interests: Tensor, valid: Tensor) -> Any:
        return zip(torch.split(interests, PEOPLE_AT_ONCE), torch.split(valid, PEOPLE_AT_ONCE), strict=True)

    @cached_property
    def _everybody(self) -> tuple[Float[Tensor, "U K D"], Bool[Tensor, "U K"]]:
        """The directions of everybody's interests."""
        if not isinstance(self.matcher, VectorMatcher):
            raise RequestError(
                f"the matcher {type(self.matcher).__name__} knows no similarity of users; fit the funnel with one that "
                "does, e.g. --match sasrec or --match user_cf"
            )
        parts = [
            self.matcher.encode_users(self._histories(persons))
            for persons in torch.split(torch.arange(self.store.people.size), PEOPLE_AT_ONCE)
        ]
        return F.normalize(torch.cat([p[0] for p in parts]).float(), dim=2), torch.cat([p[1] for p in parts])

    def _histories(self, persons: Int[Tensor, "B"]) -> Batch:
        store = self.store
        now = torch.full((len(persons),), store.now)
        history, times, mask = store.histories.before(persons, now, store.history_length(self.max_len))
        return Batch(user=store.user_rows(persons), time=now, history=history, mask=mask, history_times=times)


def _closeness(asked: Float[Tensor, "k D"], interests: Float[Tensor, "U K D"], valid: Bool[Tensor, "U K"]) -> Tensor:
    """Of each person: the mean over `asked` of the best cosine with one of the person's interests; -inf without any."""
    cosines = torch.einsum("ukd,jd->ujk", interests, asked).masked_fill(~valid.unsqueeze(1), -torch.inf)
    return cosines.amax(2).mean(1)  # (U,)
