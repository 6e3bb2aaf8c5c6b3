"""A tiny world for the tests of evaluation: questions, a matcher that is a table of scores, a ranker."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from funnelrec.core.batch import Batch


class FakeQueries:
    """Questions with as many users as there are lists in `wanted`."""

    def __init__(
        self, wanted: list[list[int]], *, seen: list[list[int]] | None = None, fingerprint: str = "split-1"
    ) -> None:
        self.wanted, self.past = wanted, seen or [[] for _ in wanted]
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self.wanted)

    @property
    def relevant(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        sizes = np.cumsum([0, *map(len, self.wanted)])
        return sizes, np.array([item for row in self.wanted for item in row], dtype=np.int64)

    def seen(self, index: Tensor) -> Tensor:
        rows = [self.past[i] for i in index.tolist()]
        width = max(map(len, rows), default=0)
        return torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.int64).reshape(
            len(rows), width
        )

    def gather(self, index: Tensor) -> Batch:
        seen = self.seen(index)
        history = torch.cat([seen, torch.zeros(len(index), 1, dtype=torch.int64)], dim=1)  # never of width 0
        return Batch(user=index + 100, time=index, history=history, mask=history > 0)


class TableMatcher:
    """Scores of every item for every user; ties go to the lower row, as the contract says."""

    def __init__(self, scores: npt.NDArray[np.float64] | Tensor) -> None:
        self.scores = torch.as_tensor(scores, dtype=torch.float32)

    def recommend(self, batch: Batch, k: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
        scores = self.scores[batch.user - 100].clone()
        scores[:, :2] = -torch.inf
        if exclude is not None:
            scores.scatter_(1, exclude, -torch.inf)
        values, rows = scores.sort(dim=1, descending=True, stable=True)
        values, rows = values[:, :k], rows[:, :k]
        if k > rows.shape[1]:
            more = k - rows.shape[1]
            values = nn.functional.pad(values, (0, more), value=-torch.inf)
            rows = nn.functional.pad(rows, (0, more))
        return torch.where(values.isneginf(), 0, rows), values


class VectorModel(nn.Module):
    """Interests and items as fixed vectors; small whole numbers, so that scores tie often and exactly."""

    def __init__(self, interests: Tensor, valid: Tensor, items: Tensor) -> None:
        super().__init__()
        self.interests, self.valid = nn.Parameter(interests), valid
        self.items = nn.Parameter(items)

    def encode_users(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.interests[batch.user - 100], self.valid[batch.user - 100]

    def encode_items(self, rows: Tensor) -> Tensor:
        return self.items[rows]

    def user_for_target(self, interests: Tensor, valid: Tensor, target: Tensor) -> Tensor:
        return interests[:, 0]


class FirstNumber(nn.Module):
    """A ranker whose logit is `scale` times the first number of the row; dropout shows which mode it is in."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale, self.dropout = nn.Parameter(torch.tensor(scale)), nn.Dropout(0.5)

    def forward(self, batch: Batch) -> Tensor:
        return self.dropout(self.scale * batch.numbers[:, 0])


def rows_world(n: int = 3000, seed: int = 0) -> tuple[list[Batch], npt.NDArray[np.float64]]:
    """Batches of rows whose label has the logit `numbers[:, 0]`, and the labels."""
    rng = np.random.default_rng(seed)
    z = rng.normal(-1, 1.5, n)
    labels = (rng.random(n) < 1 / (1 + np.exp(-z))).astype(np.float64)
    whole = Batch(
        numbers=torch.tensor(z, dtype=torch.float32)[:, None],
        label=torch.tensor(labels, dtype=torch.float32),
        user=torch.from_numpy(rng.integers(0, 200, n)),
    )
    return [whole.select(part) for part in torch.arange(n).split(700)], labels
