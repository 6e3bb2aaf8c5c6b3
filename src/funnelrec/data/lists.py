"""Lists: each click with some of what was shown beside it and passed over, for losses that compare (MM-Rec, NRMS)."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from funnelrec.core.batch import Batch
from funnelrec.data.dataset import Dataset
from funnelrec.data.examples import Impressions
from funnelrec.data.split import Part

__all__ = ["ImpressionLists", "impressions_of"]


def impressions_of(dataset: Dataset, part: Part) -> Int[Tensor, "n"]:
    """Which impression each event of a part belongs to, numbered from 0: the events of one person at one moment."""
    rows = dataset.rows(part)
    moments = np.stack([dataset.events.person[rows], dataset.events.moment[rows]])
    return torch.from_numpy(np.unique(moments, axis=1, return_inverse=True)[1].ravel())


class ImpressionLists:
    """An example is a click with `negatives` others of its impression that were not clicked, drawn with replacement.

    Batches have B · (1 + negatives) rows as of `Impressions`, the click first. Clicks of impressions in which
    everything was clicked teach nothing and are left out.
    """

    def __init__(self, dataset: Dataset, part: Part, *, negatives: int = 4, max_len: int = 50) -> None:
        if negatives < 1:
            raise ValueError(f"negatives is a number of items for each click, at least 1, received {negatives}")
        self.rows = Impressions(dataset, part, max_len=max_len)
        self.negatives = negatives
        clicked = torch.from_numpy(dataset.events.label[dataset.rows(part)] >= dataset.schema.positive)
        group = impressions_of(dataset, part)
        count = int(group.max()) + 1 if len(group) else 0
        passed = (~clicked).nonzero().squeeze(1)
        self._passed = passed[group[passed].argsort(stable=True)]  # positions, impression by impression
        self._many = torch.bincount(group[passed], minlength=count)
        self._start = self._many.cumsum(0) - self._many
        self._group = group
        self._clicks = (clicked & (self._many[group] > 0)).nonzero().squeeze(1)

    def __len__(self) -> int:
        return len(self._clicks)

    def gather(self, index: Int[Tensor, "B"], generator: torch.Generator | None = None) -> Batch:
        """The examples `index`; `generator` draws the negatives."""
        if generator is None:
            raise ValueError("negatives are drawn at random: give gather a torch.Generator")
        click = self._clicks[index]
        group = self._group[click].unsqueeze(1)  # (B, 1)
        u = torch.rand(len(index), self.negatives, generator=generator, dtype=torch.float64)
        drawn = self._passed[self._start[group] + (u * self._many[group]).long()]  # (B, negatives)
        return self.rows.gather(torch.cat([click.unsqueeze(1), drawn], 1).flatten())
