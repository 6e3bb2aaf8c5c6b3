"""Calibration: from a ranker's logits to probabilities that come true as often as they say.

    calibration = Temperature.fit(labels, logits)          # of the validation rows, never of the training rows
    Funnel.build(dataset, matcher=..., ranker=..., calibration=calibration)

| class         | probability of a logit z                         | what it mends                                    |
|---------------|--------------------------------------------------|--------------------------------------------------|
| `Temperature` | σ(z / T)                                         | too sure, too timid; keeps the order and 1/2     |
| `Isotonic`    | a curve through points that never falls (PAVA)   | any shape that rises; needs more rows            |
| `Subsampling` | p / (p + (1 − p) / w), p the probability before  | training on a share w of the negatives           |

Temperature: Guo et al. On calibration of modern neural networks. ICML 2017. Isotonic: Zadrozny and Elkan. Transforming
classifier scores into accurate multiclass probability estimates. KDD 2002. Subsampling: He et al. Practical lessons
from predicting clicks on ads at Facebook. ADKDD 2014, Section 6.3. None changes which of two rows is thought likelier,
though Isotonic makes some equal. All are plain numbers: `to_dict` gives JSON, `calibration_from_dict` reads it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from funnelrec.evaluate.metrics import sigmoid

__all__ = ["Calibration", "Isotonic", "Subsampling", "Temperature", "calibration_from_dict"]

COLDEST, HOTTEST = 0.01, 100.0  #: temperatures that a fit can come to; labels that logits separate ask for 0
HALVINGS = 60


@runtime_checkable
class Calibration(Protocol):
    """Logits to probabilities, and to JSON."""

    def probabilities(self, logits: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]: ...

    def to_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Temperature:
    """σ(z / T). T > 1 makes a model less sure of itself."""

    temperature: float

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"a temperature is a positive number, received {self.temperature}")

    @classmethod
    def fit(cls, labels: Float[np.ndarray, "n"], logits: Float[np.ndarray, "n"]) -> Temperature:
        """The T of the least log loss, between 0.01 and 100.

        The loss is convex in 1 / T, with slope Σ z (σ(z / T) − y), so its one minimum is found by halving.
        Raises ValueError for labels of one kind, and for logits that are no finite numbers.
        """
        z, y = _checked(labels, logits)
        low, high = math.log(1 / HOTTEST), math.log(1 / COLDEST)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            rising = float((z * (sigmoid(z * math.exp(middle)) - y)).sum()) > 0
            low, high = (low, middle) if rising else (middle, high)
        return cls(math.exp(-(low + high) / 2))

    def probabilities(self, logits: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
        """float64 [n], in [0, 1]."""
        return sigmoid(logits.astype(np.float64) / self.temperature)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"kind": "temperature", "temperature": self.temperature}


@dataclass(frozen=True)
class Isotonic:
    """A curve that never falls through the points (logits[i], values[i]): straight between them, level outside."""

    logits: tuple[float, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        x, p = np.asarray(self.logits, dtype=np.float64), np.asarray(self.values, dtype=np.float64)
        if not len(x) or len(x) != len(p) or not (np.isfinite(x).all() and np.isfinite(p).all()):
            raise ValueError(
                f"a curve needs as many logits as values, at least one, received {len(x)} and {len(p)}, all finite"
            )
        if (np.diff(x) <= 0).any() or (np.diff(p) < 0).any() or p[0] < 0 or p[-1] > 1:
            raise ValueError("the logits of a curve must rise and its values never fall, within [0, 1]")

    @classmethod
    def fit(cls, labels: Float[np.ndarray, "n"], logits: Float[np.ndarray, "n"]) -> Isotonic:
        """The least squares among all curves that never fall.

        Values stay 1 / (n + 2) away from 0 and 1: n rows do not prove that something never happens.
        Raises ValueError as `Temperature.fit` does.
        """
        z, y = _checked(labels, logits)
        x, place, rows = np.unique(z, return_inverse=True, return_counts=True)
        value, size = _pool(np.bincount(place, weights=y) / rows, rows)
        margin = 1 / (len(y) + 2)
        fitted = np.clip(np.repeat(value, size), margin, 1 - margin)  # one value a distinct logit
        edge = np.ones(len(x), dtype=bool)  # of a level stretch the ends say everything
        edge[1:-1] = (fitted[1:-1] != fitted[:-2]) | (fitted[1:-1] != fitted[2:])
        return cls(tuple(x[edge].tolist()), tuple(fitted[edge].tolist()))

    def probabilities(self, logits: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
        """float64 [n], in [0, 1]."""
        return np.interp(logits.astype(np.float64), self.logits, self.values)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"kind": "isotonic", "logits": list(self.logits), "values": list(self.values)}


@dataclass(frozen=True)
class Subsampling:
    """p / (p + (1 − p) / w): what p becomes among all rows when training kept a share w of the negatives.

    `rate`: w in (0, 1]. `calibration`: where p comes from, fitted on rows that were sampled alike; σ(z) without. Rows
    that were not sampled need no correction: fit a Temperature or an Isotonic on them instead.
    """

    rate: float
    calibration: Temperature | Isotonic | None = None

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate is the share of negatives that was kept, above 0 up to 1, received {self.rate}")

    def probabilities(self, logits: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
        """float64 [n], in [0, 1]."""
        p = sigmoid(logits) if self.calibration is None else self.calibration.probabilities(logits)
        # w p / (w p + 1 − p) is the same without dividing by a small rate
        return np.asarray(self.rate * p / (self.rate * p + (1 - p)))

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        inner = None if self.calibration is None else self.calibration.to_dict()
        return {"kind": "subsampling", "rate": self.rate, "calibration": inner}


def calibration_from_dict(data: Mapping[str, Any]) -> Temperature | Isotonic | Subsampling:
    """Read what a `to_dict` wrote. Raises ValueError for an unknown kind or key, or values that cannot be."""
    known: dict[str, set[str]] = {
        "temperature": {"temperature"},
        "isotonic": {"logits", "values"},
        "subsampling": {"rate", "calibration"},
    }
    kind, keys = data.get("kind"), set(data) - {"kind"}
    if kind not in known:
        raise ValueError(f"a calibration's kind must be one of {', '.join(known)}, received {kind!r}")
    if keys != known[kind]:
        raise ValueError(f"a {kind} calibration has {sorted(known[kind])}, received {sorted(keys)}")
    if kind == "temperature":
        return Temperature(float(data["temperature"]))
    if kind == "isotonic":
        return Isotonic(tuple(map(float, data["logits"])), tuple(map(float, data["values"])))
    inner = None if data["calibration"] is None else calibration_from_dict(data["calibration"])
    if isinstance(inner, Subsampling):
        raise ValueError("negatives are sampled once: a subsampling calibration cannot hold another one")
    return Subsampling(float(data["rate"]), inner)


def _checked(
    labels: Float[np.ndarray, "n"], logits: Float[np.ndarray, "n"]
) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    z, y = logits.astype(np.float64), labels.astype(np.float64)
    if not np.isfinite(z).all():
        raise ValueError("a logit is not finite; a model that gives such logits cannot be calibrated, mend the model")
    if not ((y == 0) | (y == 1)).all():
        raise ValueError("labels must be 0 or 1; apply the click rule of the schema first")
    if len(np.unique(y)) < 2:
        raise ValueError(f"calibration needs rows of both labels, received {len(y)} rows of one or none")
    return z, y


def _pool(value: Float[np.ndarray, "k"], weight: Any) -> tuple[Float[np.ndarray, "blocks"], Any]:
    """Pool adjacent violators: the mean of each block and how many entries it took in, O(k)."""
    means: list[float] = []
    weights: list[float] = []
    sizes: list[int] = []
    for mean, mass in zip(value.tolist(), weight.tolist(), strict=True):
        size = 1
        while means and means[-1] >= mean:  # the block before is not below: they are one
            before = weights.pop()
            mean = (means.pop() * before + mean * mass) / (before + mass)
            mass += before
            size += sizes.pop()
        means.append(mean)
        weights.append(mass)
        sizes.append(size)
    return np.array(means), np.array(sizes)
