"""Examples: what a model is shown. Each kind has a length and `gather(index, generator) -> Batch`, vectorised.

| kind        | one example is                                 | batch holds                                           |
|-------------|------------------------------------------------|-------------------------------------------------------|
| Impressions | an event (a row of a CTR log)                  | ids numbers label weight user person item time (+ …)  |
| NextItem    | a user's training sequence, or one of its ends | history mask history_times user target (time)         |
| Queries     | a user at the start of a part                  | history mask history_times user time                  |

A history holds positive events strictly before the moment of the example. In a dataset split by
LeaveLastOut or HeldOutUsers a moment is the ordinal of the event among its user's events.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int
from torch import Tensor

from funnelrec.core.batch import Batch
from funnelrec.core.shapes import FIRST_KNOWN, UNKNOWN
from funnelrec.data.dataset import Dataset
from funnelrec.data.split import Part

__all__ = ["Impressions", "NextItem", "Queries"]

REJECTION_ROUNDS = 10  #: a user who knows nearly everything keeps the accidental hits that are left after these


def _model_user(person: Int[Tensor, "B"], dataset: Dataset) -> Int[Tensor, "B"]:
    """Rows of the histories to user rows: everyone whom training never saw is the unknown user."""
    return person.masked_fill(person >= dataset.spec.num_users, UNKNOWN)


def _need_length(max_len: int, least: int) -> None:
    if max_len < least:
        raise ValueError(f"max_len is the length of the histories, at least {least}, received {max_len}")


class Impressions:
    """The events of a part as rows for a ranker.

    max_len > 0 adds `history mask history_times history_ids`. `label` is 1 where it reaches `schema.click`, else 0;
    without `click` it is the label as it stands.
    negatives=n is for implicit data: the examples are the positive events, and each is followed by n items drawn for
    the same user and moment with label 0, so a batch has B * (1 + n) rows. They are drawn from the items of the
    training part, "uniform" or by "popularity", and are never the item itself nor one of the user's history (but for
    a user who knows nearly all of them: at most 10 redraws).
    newest=n keeps the last n of the part's events.
    """

    def __init__(
        self,
        dataset: Dataset,
        part: Part,
        *,
        max_len: int = 0,
        negatives: int = 0,
        negative_sampling: Literal["uniform", "popularity"] = "uniform",
        newest: int | None = None,
    ) -> None:
        _need_length(max_len, 0)
        if newest is not None and newest < 1:
            raise ValueError(f"newest is a number of events, at least 1, or None, received {newest}")
        if negatives < 0:
            raise ValueError(f"negatives is a number of items for each positive event, received {negatives}")
        if negative_sampling not in ("uniform", "popularity"):
            raise ValueError(f"negative_sampling must be uniform or popularity, received {negative_sampling!r}")
        if dataset.schema.is_rows and (max_len or negatives):
            raise ValueError("a plain rows table has no users and items: max_len and negatives must be 0")
        self.dataset = dataset
        self.part = part
        self.max_len = max_len
        self.negatives = negatives
        rows = dataset.rows(part)
        if negatives:
            rows = rows[dataset.events.label[rows] >= dataset.schema.positive]
            counts = torch.from_numpy(dataset.train_item_counts)
            self._mass = (counts if negative_sampling == "popularity" else (counts > 0).long()).cumsum(0)
            if len(rows) and not int(self._mass[-1]):
                raise ValueError("no negatives can be drawn: the training part has no positive event")
        rows = rows if newest is None else rows[-newest:]
        self._size = len(rows)
        # The facts lie in the order of time, so the rows of a split by time are one range: no second look-up.
        self._first = int(rows[0]) if len(rows) else 0
        one_range = len(rows) == 0 or int(rows[-1]) - self._first == len(rows) - 1
        self._rows = None if one_range else torch.from_numpy(rows)

    def __len__(self) -> int:
        return self._size

    def gather(self, index: Int[Tensor, "B"], generator: torch.Generator | None = None) -> Batch:
        """The examples `index`; `generator` draws the negatives."""
        data, layout = self.dataset, self.dataset.events.layout
        packed = data.facts.index_select(0, index + self._first if self._rows is None else self._rows[index])
        label = layout.float_of(packed, layout.label)
        if data.schema.click is not None:
            label = (label >= data.schema.click).float()
        weight = torch.ones_like(label) if layout.weight is None else layout.float_of(packed, layout.weight)
        tensors = {"label": label, "weight": weight}
        if layout.moment is not None:
            tensors["time"] = layout.moment_of(packed)
        if layout.user is None or layout.item is None:
            return Batch(ids=layout.ids_of(packed), numbers=layout.numbers_of(packed), **tensors)
        person, item = packed[:, layout.user].long(), packed[:, layout.item].long()
        tensors |= {"user": _model_user(person, data), "person": person, "item": item}
        context = {"context_ids": layout.ids_of(packed), "context_numbers": layout.numbers_of(packed)}
        if self.max_len:
            history, when, mask = data.histories.before(person, tensors["time"], self.max_len)
            tensors |= {"history": history, "history_times": when, "mask": mask}
            tensors["history_ids"] = data.features.history_ids(history)
        if self.negatives:
            drawn = self._draw(person, item, tensors["time"], generator)  # (B, S)
            each = 1 + self.negatives
            tensors = {name: t.repeat_interleave(each, dim=0) for name, t in tensors.items()}
            context = {name: t.repeat_interleave(each, dim=0) for name, t in context.items()}
            tensors["item"] = torch.cat([item[:, None], drawn], dim=1).flatten()  # (B * (1 + S),)
            tensors["label"] = tensors["label"].view(-1, each).index_fill(1, torch.arange(1, each), 0.0).flatten()
        if data.schema.past:
            past = data.past.numbers(tensors["person"], tensors["item"], tensors["time"], data.transforms)
            context["context_numbers"] = torch.cat([context["context_numbers"], past], dim=1)
        return Batch(**data.features.gather(tensors["user"], tensors["item"], **context), **tensors)

    def _draw(
        self,
        person: Int[Tensor, "B"],
        item: Int[Tensor, "B"],
        time: Int[Tensor, "B"],
        generator: torch.Generator | None,
    ) -> Int[Tensor, "B S"]:
        """Items the user did not take before that moment, drawn again where the first draw was one of those."""
        if generator is None:
            raise ValueError("negatives are drawn at random: give gather a torch.Generator")
        total, pairs = int(self._mass[-1]), len(item) * self.negatives
        owner = torch.arange(len(item)).repeat_interleave(self.negatives)
        drawn = torch.zeros(pairs, dtype=torch.int64)
        wrong = torch.arange(pairs)
        for _ in range(1 + REJECTION_ROUNDS):
            points = torch.randint(total, (len(wrong),), generator=generator)
            fresh = torch.searchsorted(self._mass, points, right=True)
            drawn[wrong] = fresh
            mine = owner[wrong]
            hit = (fresh == item[mine]) | self.dataset.histories.contains(person[mine], fresh, time[mine])
            wrong = wrong[hit]
            if not len(wrong):
                break
        return drawn.view(len(item), self.negatives)


class NextItem:
    """Sequences and the item that comes next, for retrieval.

    mode="all" (training part only): one example a user, the last max_len + 1 positive training events; `target`
    [B, L] is the item after each position where that happens strictly later, 0 elsewhere.
    mode="last": one example a positive event with a non-empty history; `target` [B].
    mode="cut": one example a user, each time another of that user's "last" examples, chosen by the generator
    (ComiRec trains so); a user who acts a lot weighs no more than others. The target is one of the next `horizon`
    events of the part, the very next one unless more are asked for: what a user takes within a session says little
    of what she will take in a month (Pancha et al. 2022, arXiv:2205.04507, whose window is one of days).
    """

    def __init__(
        self,
        dataset: Dataset,
        part: Part,
        *,
        max_len: int,
        mode: Literal["all", "last", "cut"] = "all",
        horizon: int = 1,
    ) -> None:
        _need_length(max_len, 1)
        if horizon < 1 or (horizon > 1 and mode != "cut"):
            raise ValueError(f"horizon must be at least 1, and 1 unless mode='cut', received {horizon} and {mode!r}")
        if mode not in ("all", "last", "cut"):
            raise ValueError(f"mode must be all, last or cut, received {mode!r}")
        if mode == "all" and part != "train":
            raise ValueError(f"mode='all' is for the training part, received part={part!r}; use mode='last'")
        self.dataset = dataset
        self.part = part
        self.max_len = max_len
        self.mode = mode
        self.horizon = horizon
        if mode == "all":
            self._users = self._users_with_targets()
            return
        person, item, moment = (torch.from_numpy(a) for a in dataset.positives(part))
        start, stop = dataset.histories.spans(person, moment)
        kept = (stop > start) & (item >= FIRST_KNOWN)
        order = torch.sort(person[kept], stable=True).indices if mode == "cut" else torch.arange(int(kept.sum()))
        self._person, self._item, self._moment = person[kept][order], item[kept][order], moment[kept][order]
        self._users, counts = torch.unique_consecutive(self._person, return_counts=True)
        self._counts, self._starts = counts, counts.cumsum(0) - counts

    def _users_with_targets(self) -> Int[Tensor, "B"]:
        """Users of whom at least one of the last max_len steps goes strictly forward in time."""
        train = self.dataset.train_histories
        owner = torch.repeat_interleave(torch.arange(train.num_users), train.offsets[1:] - train.offsets[:-1])
        forward = torch.zeros(len(owner), dtype=torch.bool)
        forward[1:] = (owner[1:] == owner[:-1]) & (train.times[1:] > train.times[:-1])
        recent = torch.arange(len(owner)) >= train.offsets[owner + 1] - self.max_len
        users: Tensor = torch.unique(owner[forward & recent])
        return users

    def __len__(self) -> int:
        return len(self._person) if self.mode == "last" else len(self._users)

    def gather(self, index: Int[Tensor, "B"], generator: torch.Generator | None = None) -> Batch:
        """The examples `index`; `generator` draws the cuts."""
        if self.mode == "all":
            return self._sequences(self._users[index])
        later = index
        if self.mode == "cut":
            if generator is None:
                raise ValueError("cuts are drawn at random: give gather a torch.Generator")
            draw = torch.rand(1 + (self.horizon > 1), len(index), generator=generator, dtype=torch.float64)
            start, count = self._starts[index], self._counts[index]
            index = start + (draw[0] * count).long()
            later = index
            if self.horizon > 1:
                later = index + (draw[1] * (start + count - index).clamp(max=self.horizon)).long()
        person, moment = self._person[index], self._moment[index]
        history, when, mask = self.dataset.histories.before(person, moment, self.max_len)
        return Batch(
            history=history,
            mask=mask,
            history_times=when,
            user=_model_user(person, self.dataset),
            time=moment,
            target=self._item[later],
        )

    def _sequences(self, person: Int[Tensor, "B"]) -> Batch:
        train = self.dataset.train_histories
        start, stop = train.offsets[person], train.offsets[person + 1]
        items, times, mask = train.take(start, stop, self.max_len + 1)  # (B, L + 1)
        later = mask[:, :-1] & (times[:, 1:] > times[:, :-1])
        return Batch(
            history=items[:, :-1],
            mask=mask[:, :-1],
            history_times=times[:, :-1],
            user=_model_user(person, self.dataset),
            target=items[:, 1:].masked_fill(~later, 0),
        )


class Queries:
    """Users at the start of a part, and what they went on to take: evaluation of retrieval.

    One example for each person with a positive event in the part, at the moment of the person's first event there;
    the history lies strictly before it. `relevant` is a CSR (offsets int64 [Q + 1], items int64) of the distinct
    items of the person's positive events in the part, ascending, without those already in the history ("seen") and
    without items that have no row of their own. People who are left with none are dropped.

    dropped: how many people, and how many distinct (person, item) pairs, were dropped, and why.
    """

    def __init__(self, dataset: Dataset, part: Part, *, max_len: int) -> None:
        _need_length(max_len, 1)
        self.dataset = dataset
        self.part = part
        self.max_len = max_len
        rows = dataset.rows(part)
        beginnings = np.full(dataset.histories.num_users, np.iinfo(np.int64).max)
        np.minimum.at(beginnings, dataset.events.person[rows], dataset.events.moment[rows])
        person, item, _ = dataset.positives(part)
        pairs = np.unique(person * dataset.spec.num_items + item)
        person, item = pairs // dataset.spec.num_items, pairs % dataset.spec.num_items
        owners, items = torch.from_numpy(person), torch.from_numpy(item)
        seen = dataset.histories.contains(owners, items, torch.from_numpy(beginnings)[owners])
        unknown = ~seen & (items < FIRST_KNOWN)
        kept = ~seen & ~unknown
        self.persons, counts = torch.unique_consecutive(owners[kept], return_counts=True)
        self.relevant: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] = (
            np.concatenate([[0], counts.cumsum(0).numpy()]).astype(np.int64),
            items[kept].numpy(),
        )
        self.dropped = {
            "people": len(torch.unique(owners)) - len(self.persons),
            "seen": int(seen.sum()),
            "unknown": int(unknown.sum()),
        }
        self.times = torch.from_numpy(beginnings)[self.persons]

    def __len__(self) -> int:
        return len(self.persons)

    @property
    def users(self) -> Int[Tensor, "Q"]:
        """User rows; row 1 for everyone whom training never saw."""
        return _model_user(self.persons, self.dataset)

    def gather(self, index: Int[Tensor, "B"], generator: torch.Generator | None = None) -> Batch:
        """The queries `index`; nothing is drawn."""
        person, moment = self.persons[index], self.times[index]
        history, when, mask = self.dataset.histories.before(person, moment, self.max_len)
        return Batch(
            history=history, mask=mask, history_times=when, user=_model_user(person, self.dataset), time=moment
        )

    def seen(self, index: Int[Tensor, "B"]) -> Int[Tensor, "B X"]:
        """Every item row of each history, however long, 0 padded: what `exclude` wants."""
        return self.dataset.histories.seen(self.persons[index], self.times[index])
