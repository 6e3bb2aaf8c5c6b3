"""Numbers from a person's past, for the item that is scored: when something like it came last, how often it came.

Only what happened strictly before the moment counts; events of equal time do not see one another (data/histories.py).
The numbers are computed when a batch is made, for drawn negatives as for events, so nothing of them lies in a file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from funnelrec.core.schema import Number, Past
from funnelrec.core.shapes import FIRST_KNOWN
from funnelrec.data.histories import Histories
from funnelrec.data.numeric import NumericTransform, fit_transform_for

__all__ = ["NEVER", "PastEvents"]

NEVER = 10.0 * 365 * 86_400  #: seconds; what has not happened was ten years ago: longer than all that is known
Int64Array = npt.NDArray[np.int64]


class _Lookup:
    """The times of the events of each (person, group) pair."""

    def __init__(self, person: Int64Array, group: Int64Array, time: Int64Array, groups: int) -> None:
        kept = group >= FIRST_KNOWN  # of an unknown value nothing is known
        self.groups = groups
        keys, owner = np.unique(person[kept] * groups + group[kept], return_inverse=True)
        self._keys = torch.from_numpy(keys)
        self._events = Histories.build(owner.astype(np.int64), group[kept], time[kept], len(keys))

    def before(
        self, person: Int[Tensor, "B"], group: Int[Tensor, "B"], time: Int[Tensor, "B"]
    ) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"]]:
        """How many events of the pair lie strictly before the time, and the time from the last of them (NaN: none)."""
        if len(self._keys) == 0:
            nothing = torch.zeros(len(person), dtype=torch.float64)
            return nothing, torch.full_like(nothing, torch.nan)
        wanted = person * self.groups + group
        pair = torch.searchsorted(self._keys, wanted).clamp_(max=len(self._keys) - 1)
        start, stop = self._events.spans(pair, time)
        count = (stop - start).masked_fill(self._keys[pair] != wanted, 0)
        since = time - self._events.times[(stop - 1).clamp(min=0)]
        return count.double(), since.double().masked_fill(count == 0, torch.nan)


class PastEvents:
    """The past of everyone, by the fields of `Schema.past`.

    `person`, `item`, `time` int64 [n] are events in any order, `positive` bool [n] which of them were positive; rows of
    persons as in `Dataset.histories`. `groups(column)` gives the vocabulary row
    of each item's value in a column, int64 [N]; for the item column the item rows themselves.
    """

    def __init__(
        self,
        fields: Sequence[Past],
        person: Int64Array,
        item: Int64Array,
        time: Int64Array,
        positive: npt.NDArray[np.bool_],
        groups: Callable[[str], Int64Array],
    ) -> None:
        self.fields = tuple(fields)
        self._groups: dict[str, Tensor] = {}
        self._lookups: dict[tuple[str, bool], _Lookup] = {}
        for field in self.fields:
            if field.of not in self._groups:
                self._groups[field.of] = torch.from_numpy(groups(field.of))
            if (field.of, field.shown) not in self._lookups:
                group = self._groups[field.of].numpy()
                chosen = slice(None) if field.shown else positive
                self._lookups[field.of, field.shown] = _Lookup(
                    person[chosen], group[item[chosen]], time[chosen], int(group.max(initial=0)) + 1
                )

    def raw(self, person: Int[Tensor, "B"], item: Int[Tensor, "B"], time: Int[Tensor, "B"]) -> Float[np.ndarray, "B P"]:
        """The numbers as they are, a column a field: counts, and seconds, NaN where there was no such event."""
        found: dict[tuple[str, bool], tuple[Tensor, Tensor]] = {}
        columns = []
        for field in self.fields:
            key = (field.of, field.shown)
            if key not in found:
                found[key] = self._lookups[key].before(person, self._groups[field.of][item], time)
            count, since = found[key]
            columns.append(count if field.what == "count" else since)
        return torch.stack(columns, dim=1).numpy()

    def fit(self, person: Int64Array, item: Int64Array, time: Int64Array) -> dict[str, NumericTransform]:
        """The transform of each field, fitted on these events: give it the training events alone."""
        raw = self.raw(torch.from_numpy(person), torch.from_numpy(item), torch.from_numpy(time))
        return {
            field.name: fit_transform_for(Number(field.name, field.transform), raw[:, column])
            for column, field in enumerate(self.fields)
        }

    def numbers(
        self,
        person: Int[Tensor, "B"],
        item: Int[Tensor, "B"],
        time: Int[Tensor, "B"],
        transforms: Mapping[str, NumericTransform],
    ) -> Float[Tensor, "B M"]:
        """The transformed numbers, in the order of the fields: the last columns of a context."""
        raw = self.raw(person, item, time)
        parts = []
        for column, field in enumerate(self.fields):
            values = np.nan_to_num(raw[:, column], nan=NEVER)  # only "since" has NaN
            parts.append(transforms[field.name].apply(values))
        return torch.from_numpy(np.concatenate(parts, axis=1))
