"""Batch: named tensors that travel together from the data to a model.

Names and shapes (letters: core/shapes.py). A batch holds those that its examples define:

| name          | dtype, shape        | meaning                                                    |
|---------------|---------------------|------------------------------------------------------------|
| `ids`         | int32 [B, C]        | rows of the fused table; columns as in `Spec.categories`   |
| `numbers`     | float32 [B, M]      | transformed numbers; columns as in `Spec.numbers`          |
| `user`, `item`| int64 [B]           | user row; item row being scored                            |
| `person`      | int64 [B]           | who it is, where `user` is the unknown row for many        |
| `time`        | int64 [B]           | the moment being scored, seconds                           |
| `history`     | int64 [B, L]        | item rows strictly before `time`, newest last, 0 = padding |
| `mask`        | bool [B, L]         | True where `history` is real                               |
| `history_times`| int64 [B, L]       | when, seconds; 0 at padding                                |
| `history_ids` | int32 [B, L, Ci]    | the item columns of `ids`, for each history item           |
| `target`      | int64 [B] or [B, L] | item row(s) to predict; 0 = no target at this position     |
| `label`       | float32 [B]         | what happened                                              |
| `weight`      | float32 [B]         | importance of the example                                  |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

__all__ = ["Batch"]


class Batch(Mapping[str, Tensor]):
    """An immutable bundle of named tensors with one leading dimension B."""

    __slots__ = ("_tensors",)

    def __init__(self, **tensors: Tensor) -> None:
        self._tensors: dict[str, Tensor]
        sizes = {name: tensor.shape[0] for name, tensor in tensors.items()}
        if any(size != next(iter(sizes.values())) for size in sizes.values()):  # no set: sizes are symbols in an export
            raise ValueError(f"all tensors of a batch need the same first dimension, received {sizes}")
        object.__setattr__(self, "_tensors", tensors)

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return self._tensors[name]
        except KeyError:
            raise AttributeError(
                f"this batch has no '{name}'; it holds {', '.join(self._tensors) or 'nothing'}"
            ) from None

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a batch is immutable; use batch.replace({name}=...)")

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        """Number of named tensors (it is a mapping); the number of examples is `batch.size`."""
        return len(self._tensors)

    def __repr__(self) -> str:
        parts = (f"{k}: {str(v.dtype).removeprefix('torch.')}{list(v.shape)}" for k, v in self._tensors.items())
        return f"Batch({', '.join(parts)})"

    @property
    def size(self) -> int:
        """B, the number of examples."""
        return next(iter(self._tensors.values())).shape[0] if self._tensors else 0

    def replace(self, **tensors: Tensor) -> Batch:
        """The same batch with some tensors added or exchanged."""
        return Batch(**{**self._tensors, **tensors})

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(**{k: v.to(device, non_blocking=True) for k, v in self._tensors.items()})

    def select(self, rows: Tensor) -> Batch:
        """The examples at `rows` (int64 [b] or bool [B]), in that order."""
        return Batch(**{k: v[rows] for k, v in self._tensors.items()})
