"""How sure a number is: intervals over users, intervals of an AUC, and paired tests of two models.

What is drawn again is the *user* (a user's rows are not independent). With many users almost every difference is
"significant", so each test also gives the size of the effect and an interval of the difference. The tests are the
paired t-test and the randomisation test, which keep their nominal error rate on per-user metrics; Wilcoxon's does not
(Ihemelandu and Ekstrand, SIGIR 2023).

Sources: percentile bootstrap (Efron and Tibshirani 1993, ch. 13); AUC variance from placements (DeLong et al. 1988),
summed within users (Obuchowski 1997); Holm 1979 for several comparisons.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Float, Int

from funnelrec.evaluate.metrics import auc, normalised_entropy

__all__ = [
    "Interval",
    "PairedAUC",
    "PairedTest",
    "auc_interval",
    "bootstrap_interval",
    "entropy_interval",
    "holm",
    "paired_auc_difference",
    "paired_entropy_difference",
    "paired_test",
]

_CHUNK = 8_000_000  # numbers drawn at once; bounds the memory of every resampling loop to about 64 MB
_DRAW_LIMIT = 100_000  # above this many different values the mean is normal to more digits than could be drawn
_FLIP_LIMIT = 20_000  # above this many users the sign-flip sum is normal to more digits than could be drawn


@dataclass(frozen=True)
class Interval:
    """An estimate with the interval that holds the truth with probability `level`."""

    mean: float
    low: float
    high: float
    level: float = 0.95

    @property
    def half(self) -> float:
        """Half the width, for "mean ± half"."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class PairedTest:
    """Two models on the same users: mean difference a − b.

    `interval`: Student's t interval of the difference; `p_t`: two-sided paired t-test; `p_randomisation`: two-sided
    sign-flip test; `effect_size`: mean difference / standard deviation of the differences (Cohen's d_z, 0 when all
    differences are 0, so below .2 is small whatever p says); `users`: number of pairs.
    """

    difference: float
    interval: Interval
    t: float
    p_t: float
    p_randomisation: float
    effect_size: float
    users: int


@dataclass(frozen=True)
class PairedAUC:
    """Two scorers on the same rows: AUC difference a − b, its interval, two-sided p, and z = difference / std error."""

    difference: float
    interval: Interval
    z: float
    p: float


def bootstrap_interval(
    values: Float[np.ndarray, "U"], *, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of the mean of one value a user.

    Resampling users with replacement means drawing how often each *distinct value* occurs, a multinomial over the
    distinct values: exact, and independent of the number of users for metrics that take few values (hit rate takes 2).
    Above 100,000 users with mostly different values the normal interval, which it converges to, replaces the drawing.
    Raises ValueError for no value, NaN (leave users without relevant items out), or a level outside (0, 1).
    """
    _require_level(level)
    _require_values(values)
    rng = np.random.default_rng(seed)
    distinct, count = np.unique(values.astype(np.float64), return_counts=True)
    mean = float(values.mean(dtype=np.float64))
    if distinct.size == 1:
        return Interval(mean, mean, mean, level)
    few = distinct.size * 4 < values.size
    if not few and distinct.size > _DRAW_LIMIT:
        half = NormalDist().inv_cdf((1 + level) / 2) * float(values.std(dtype=np.float64)) / math.sqrt(values.size)
        return Interval(mean, mean - half, mean + half, level)
    chunk = max(1, _CHUNK // (distinct.size if few else values.size))
    means = []
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        if few:
            drawn = rng.multinomial(values.size, count / values.size, size=rows) @ distinct / values.size
        else:
            drawn = values[rng.integers(0, values.size, size=(rows, values.size))].mean(axis=1, dtype=np.float64)
        means.append(drawn)
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high), level)


def paired_test(
    a: Float[np.ndarray, "U"],
    b: Float[np.ndarray, "U"],
    *,
    level: float = 0.95,
    permutations: int = 10_000,
    seed: int = 0,
) -> PairedTest:
    """Test whether two models differ in the mean over the same users, in the same order. Two-sided.

    Randomisation: if the models were alike, each user's difference could as well have the other sign; p is the share
    of sign patterns, the observed one included, whose sum is at least as far from 0. Above 20,000 users with a
    difference the sum is normal with variance Σ d², which replaces the drawing.
    Raises ValueError for fewer than 2 users, NaN, or a level outside (0, 1).
    """
    _require_level(level)
    if a.shape[0] < 2:
        raise ValueError(f"a paired test needs at least 2 users, received {a.shape[0]}")
    _require_values(a)
    _require_values(b)
    d = a.astype(np.float64) - b
    mean, deviation = float(d.mean()), float(d.std(ddof=1))
    error = deviation / math.sqrt(d.size)
    p_flip = _sign_flip_p(d, permutations, seed)
    if deviation <= 1e-12 * max(abs(mean), 1e-300):  # all differences are one number
        t = math.copysign(math.inf, mean) if mean else 0.0
        effect = t
        return PairedTest(mean, Interval(mean, mean, mean, level), t, 0.0 if mean else 1.0, p_flip, effect, d.size)
    half = _student_quantile((1 + level) / 2, d.size - 1) * error
    t = mean / error
    p_t = 2 * _student_tail(abs(t), d.size - 1)
    return PairedTest(mean, Interval(mean, mean - half, mean + half, level), t, p_t, p_flip, mean / deviation, d.size)


def auc_interval(
    labels: Float[np.ndarray, "n"],
    scores: Float[np.ndarray, "n"],
    users: Int[np.ndarray, "n"] | None = None,
    *,
    level: float = 0.95,
) -> Interval:
    """AUC with a normal interval cut to [0, 1], O(n log n) and without drawing.

    A row's influence on the AUC is its placement among the rows of the other label (DeLong). With `users` the
    influences of a user's rows are summed before they are squared, so that many rows of one user are not taken for
    independent evidence; without, each row stands alone. All NaN if only one label occurs.
    """
    _require_level(level)
    value = auc(labels, scores)
    if math.isnan(value):
        return Interval(value, value, value, level)
    half = NormalDist().inv_cdf((1 + level) / 2) * _cluster_error(_influence(labels, scores, value), users)
    return Interval(value, max(value - half, 0.0), min(value + half, 1.0), level)


def paired_auc_difference(
    labels: Float[np.ndarray, "n"],
    scores_a: Float[np.ndarray, "n"],
    scores_b: Float[np.ndarray, "n"],
    users: Int[np.ndarray, "n"] | None = None,
    *,
    level: float = 0.95,
) -> PairedAUC:
    """AUC of a minus AUC of b on the same rows, with interval and test; far sharper than two separate intervals.

    Raises ValueError if only one label occurs.
    """
    _require_level(level)
    value_a, value_b = auc(labels, scores_a), auc(labels, scores_b)
    if math.isnan(value_a):
        raise ValueError("an AUC needs rows of both labels; received one label only")
    difference = value_a - value_b
    influence = _influence(labels, scores_a, value_a) - _influence(labels, scores_b, value_b)
    error = _cluster_error(influence, users)
    half = NormalDist().inv_cdf((1 + level) / 2) * error
    z = difference / error if error else math.copysign(math.inf, difference) if difference else 0.0
    p = math.erfc(abs(z) / math.sqrt(2))
    return PairedAUC(difference, Interval(difference, difference - half, difference + half, level), z, p)


def entropy_interval(
    labels: Float[np.ndarray, "n"],
    logits: Float[np.ndarray, "n"],
    users: Int[np.ndarray, "n"] | None = None,
    *,
    level: float = 0.95,
) -> Interval:
    """Normalised entropy with a normal interval that allows for the base rate being an estimate too; no drawing.

    With `users` a user's rows are not taken for independent evidence. All NaN if only one label occurs.
    """
    _require_level(level)
    value = normalised_entropy(labels, logits)
    if math.isnan(value):
        return Interval(value, value, value, level)
    half = NormalDist().inv_cdf((1 + level) / 2) * _cluster_error(_entropy_influence(labels, logits, value), users)
    return Interval(value, value - half, value + half, level)


def paired_entropy_difference(
    labels: Float[np.ndarray, "n"],
    logits_a: Float[np.ndarray, "n"],
    logits_b: Float[np.ndarray, "n"],
    users: Int[np.ndarray, "n"] | None = None,
    *,
    level: float = 0.95,
) -> Interval:
    """Normalised entropy of a minus that of b on the same rows (below 0: a is better) with its interval.

    Raises ValueError if only one label occurs.
    """
    _require_level(level)
    value_a, value_b = normalised_entropy(labels, logits_a), normalised_entropy(labels, logits_b)
    if math.isnan(value_a):
        raise ValueError("a normalised entropy needs rows of both labels; received one label only")
    influence = _entropy_influence(labels, logits_a, value_a) - _entropy_influence(labels, logits_b, value_b)
    half = NormalDist().inv_cdf((1 + level) / 2) * _cluster_error(influence, users)
    difference = value_a - value_b
    return Interval(difference, difference - half, difference + half, level)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for having made all these comparisons at once (Holm's step-down), in the order given."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return [float(x) for x in adjusted]


def _require_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, received {level}; 0.95 is usual")


def _require_values(values: Float[np.ndarray, "U"]) -> None:
    if not values.size:
        raise ValueError("no users; received an empty array of values")
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise ValueError(f"{bad} of {values.size} values are NaN or infinite; leave out users without relevant items")


def _sign_flip_p(d: Float[np.ndarray, "U"], permutations: int, seed: int) -> float:
    """Two-sided p of Σ d when every sign is a fair coin."""
    size = np.abs(d[d != 0])
    if not size.size:
        return 1.0
    observed = abs(float(d.sum()))
    if size.size > _FLIP_LIMIT:
        return math.erfc(observed / math.sqrt(2 * float((size**2).sum())))
    rng = np.random.default_rng(seed)
    near = observed - 1e-9 * float(size.sum())  # sums that are equal but for the order of adding count as equal
    extreme = 0
    chunk = max(1, _CHUNK // size.size)
    for start in range(0, permutations, chunk):
        rows = min(chunk, permutations - start)
        coins = np.unpackbits(rng.integers(0, 256, size=(rows, -(-size.size // 8)), dtype=np.uint8), axis=1)
        total = 2 * (coins[:, : size.size].astype(np.float32) @ size.astype(np.float32)) - float(size.sum())
        extreme += int((np.abs(total) >= near - 1e-6 * float(size.sum())).sum())
    return (1 + extreme) / (1 + permutations)


def _influence(labels: Float[np.ndarray, "n"], scores: Float[np.ndarray, "n"], value: float) -> Float[np.ndarray, "n"]:
    """How each row moves the AUC: (placement − AUC) / number of rows with its label; sums to 0.

    The placement of a positive is the share of negatives below it (ties half); of a negative, of positives above it.
    """
    positive = labels == 1
    up, down = np.sort(scores[positive]), np.sort(scores[~positive])
    result = np.empty(labels.shape)
    below = np.searchsorted(down, scores[positive], "left") + np.searchsorted(down, scores[positive], "right")
    above = 2 * up.size - np.searchsorted(up, scores[~positive], "left")
    above = above - np.searchsorted(up, scores[~positive], "right")
    result[positive] = (below / (2 * down.size) - value) / up.size
    result[~positive] = (above / (2 * up.size) - value) / down.size
    return result


def _entropy_influence(
    labels: Float[np.ndarray, "n"], logits: Float[np.ndarray, "n"], value: float
) -> Float[np.ndarray, "n"]:
    """How each row moves L / H(r), with L the log loss and H the entropy of the base rate r; sums to 0.

    d(L / H) = dL / H − (L / H) dH / H, where dH = ln((1 − r) / r) dr.
    """
    y, z = labels.astype(np.float64), logits.astype(np.float64)
    rate = float(y.mean())
    entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
    loss = np.logaddexp(0.0, z) - y * z
    moved = (loss - loss.mean()) - value * math.log((1 - rate) / rate) * (y - rate)
    return np.asarray(moved / entropy / y.size)


def _cluster_error(influence: Float[np.ndarray, "n"], users: Int[np.ndarray, "n"] | None) -> float:
    """Standard error from influences: sqrt(C / (C − 1) Σ_c (Σ_{rows of c} influence)²)."""
    if users is None:
        sums = influence
    else:
        _, owner = np.unique(users, return_inverse=True)
        sums = np.bincount(owner, weights=influence)
    clusters = sums.size
    if clusters < 2:
        raise ValueError("an interval over users needs at least 2 users, received 1; leave `users` out to use rows")
    return math.sqrt(clusters / (clusters - 1) * float((sums**2).sum()))


def _student_tail(t: float, freedom: int) -> float:
    """P(T > t) for t ≥ 0: half the regularised incomplete beta I_x(ν/2, 1/2) at x = ν / (ν + t²)."""
    x = freedom / (freedom + t * t)
    return 0.5 * _incomplete_beta(x, freedom / 2, 0.5)


def _student_quantile(probability: float, freedom: int) -> float:
    """t with P(T ≤ t) = probability > 1/2, by Newton's method from the normal quantile.

    The tail is convex there and the normal quantile lies left of t, so the steps only ever go right and never too far.
    """
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
    t = NormalDist().inv_cdf(probability)
    for _ in range(100):
        density = math.exp(log_scale - (freedom + 1) / 2 * math.log1p(t * t / freedom))
        step = (_student_tail(t, freedom) - (1 - probability)) / density
        t += step
        if abs(step) <= 1e-12 * t:
            break
    return t


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """Regularised I_x(a, b) by its continued fraction (Lentz), on the side where that converges fast."""
    if x <= 0.0 or x >= 1.0:
        return 0.0 if x <= 0.0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1.0 - _incomplete_beta(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    tiny = 1e-300  # stands for 0 in a denominator
    c, d = 1.0, 1.0 / ((1 - (a + b) * x / (a + 1)) or tiny)
    fraction = d
    for m in range(1, 1000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for step in (even, odd):
            d = 1.0 / ((1 + step * d) or tiny)
            c = (1 + step / c) or tiny
            fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * fraction / a
