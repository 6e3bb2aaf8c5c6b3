"""Numeric transforms, fitted on the training part and saved.

| transform | output, x~ = CDF(x)                                   | width |
|-----------|-------------------------------------------------------|-------|
| quantile  | x~ in [0, 1]                                          | 1     |
| powers    | x~, x~^2, sqrt(x~) (Covington, Adams, Sargin 2016)    | 3     |
| log       | sign(x) log(1 + |x|), minus its mean, by its std      | 1     |
| standard  | x minus its mean, by its std                          | 1     |

The CDF is interpolated linearly between at most 1,000 quantiles of the training values (the smallest is 0, the
largest 1); beyond them it is clamped, and a value that fills several quantiles gets the middle of their levels. So a
constant column is 0.5 everywhere; under log and standard it is 0. A missing value (null, NaN, an infinity) gives 0 in
every output column, and a column without any training value gives 0 everywhere. No output is NaN or infinite.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from funnelrec.core.schema import TRANSFORMS, Number

__all__ = ["NumericTransform", "fit_transform_for"]

MAX_KNOTS = 1000
WIDTHS: dict[str, int] = {"quantile": 1, "powers": 3, "log": 1, "standard": 1}


@dataclass(frozen=True, slots=True)
class NumericTransform:
    """A fitted transform. `knots` and `levels` (rising, equally long) serve quantile and powers; `mean` and `std` the
    others. `std` 0 or no knots: nothing was to be learnt, the output does not depend on the value."""

    kind: str  # one of TRANSFORMS
    knots: tuple[float, ...] = ()
    levels: tuple[float, ...] = ()
    mean: float = 0.0
    std: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in TRANSFORMS:
            raise ValueError(f"a transform must be one of {', '.join(TRANSFORMS)}, received {self.kind!r}")
        if len(self.knots) != len(self.levels):
            raise ValueError(f"a transform needs a level a knot, received {len(self.levels)} and {len(self.knots)}")

    @property
    def width(self) -> int:
        """Output columns."""
        return WIDTHS[self.kind]

    def apply(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
        """float64 [n] -> float32 [n, width]; missing values (NaN, infinities) give 0."""
        values = np.asarray(values, dtype=np.float64)
        known = np.isfinite(values)
        x = np.where(known, values, 0.0)
        if self.kind in ("quantile", "powers"):
            y = np.interp(x, self.knots, self.levels) if self.knots else np.zeros_like(x)
            columns = [y] if self.kind == "quantile" else [y, y * y, np.sqrt(y)]
        else:
            x = _signed_log(x) if self.kind == "log" else x
            with np.errstate(over="ignore"):
                columns = [x / self.std - self.mean / self.std if self.std > 0 else np.zeros_like(x)]
        largest = float(np.finfo(np.float32).max)
        table = np.stack([np.where(known, np.clip(c, -largest, largest), 0.0) for c in columns], axis=1)  # (n, width)
        return table.astype(np.float32)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able data; `from_dict` is the exact inverse."""
        return {
            "kind": self.kind,
            "knots": list(self.knots),
            "levels": list(self.levels),
            "mean": self.mean,
            "std": self.std,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> NumericTransform:
        """Read what `to_dict` wrote. Raises ValueError on an unknown key."""
        unknown = sorted(set(data) - {"kind", "knots", "levels", "mean", "std"})
        if unknown or "kind" not in data:
            raise ValueError(f"a transform is kind, knots, levels, mean, std; received the keys {', '.join(data)}")
        return cls(
            kind=data["kind"],
            knots=tuple(data.get("knots", ())),
            levels=tuple(data.get("levels", ())),
            mean=data.get("mean", 0.0),
            std=data.get("std", 0.0),
        )


def fit_transform_for(field: Number, values: npt.NDArray[np.float64]) -> NumericTransform:
    """Fit the transform that `field` asks for on the training values float64 [n]; missing values are left out."""
    values = np.asarray(values, dtype=np.float64)
    values = values[np.isfinite(values)]
    if not values.size:
        return NumericTransform(field.transform)
    if field.transform in ("quantile", "powers"):
        knots, levels = _quantiles(values)
        return NumericTransform(field.transform, knots=knots, levels=levels)
    mean, std = _moments(_signed_log(values) if field.transform == "log" else values)
    return NumericTransform(field.transform, mean=mean, std=std)


def _signed_log(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.sign(x) * np.log1p(np.abs(x))


def _quantiles(values: npt.NDArray[np.float64]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    values = np.sort(values)
    levels = np.linspace(0.0, 1.0, min(MAX_KNOTS, values.size))
    # The two neighbours are weighed, not subtracted: the difference of two huge values would overflow.
    position = levels * (values.size - 1)
    low = np.floor(position).astype(np.int64)
    share = position - low
    high = np.minimum(low + 1, values.size - 1)
    raw = values[low] * (1.0 - share) + values[high] * share
    knots, first, counts = np.unique(np.maximum.accumulate(raw), return_index=True, return_counts=True)
    middle = (levels[first] + levels[first + counts - 1]) / 2.0
    if knots.size == 1:
        middle = np.array([0.5])
    return tuple(knots.tolist()), tuple(middle.tolist())


def _moments(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    if values.min() == values.max():
        return float(values[0]), 0.0
    scale = float(np.abs(values).max())  # squares of huge or tiny values would overflow or vanish
    unit = values / scale
    return float(unit.mean() * scale), float(unit.std() * scale)
