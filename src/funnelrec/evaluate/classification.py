"""What a classifier's probabilities are worth: areas, rates with intervals, calibration, for two classes or more."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Float, Int

from funnelrec.evaluate.metrics import Reliability, auc, reliability
from funnelrec.evaluate.significance import Interval, auc_interval

__all__ = ["Verdict", "choose_threshold", "proportion", "softmax", "softmax_temperature", "verdict"]


def softmax(logits: Float[np.ndarray, "n K"], temperature: float = 1.0) -> Float[np.ndarray, "n K"]:
    """Probabilities of logits / T."""
    z = logits.astype(np.float64) / temperature
    e = np.exp(z - z.max(1, keepdims=True))
    return np.asarray(e / e.sum(1, keepdims=True))


def softmax_temperature(labels: Int[np.ndarray, "n"], logits: Float[np.ndarray, "n K"]) -> float:
    """The T in [0.01, 100] of the least log loss of softmax(logits / T) (Guo et al. 2017).

    Convex in 1 / T with the slope Σ (E_p[z] - z_label), so found by halving.
    """
    z = logits.astype(np.float64)
    own = z[np.arange(len(z)), labels].sum()
    low, high = math.log(0.01), math.log(100.0)  # of 1 / T
    for _ in range(60):
        middle = (low + high) / 2
        rising = (softmax(z, math.exp(-middle)) * z).sum() > own
        low, high = (low, middle) if rising else (middle, high)
    return math.exp(-(low + high) / 2)


def proportion(hits: int, of: int, level: float = 0.95) -> Interval:
    """A share with Wilson's interval, which holds for few rows and for shares near 0 and 1; NaN of none."""
    if of == 0:
        return Interval(math.nan, math.nan, math.nan, level)
    z, p = NormalDist().inv_cdf((1 + level) / 2), hits / of
    centre, half = p + z * z / (2 * of), z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of))
    scale = 1 + z * z / of
    return Interval(p, max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale), level)


def choose_threshold(labels: Int[np.ndarray, "n"], probability: Float[np.ndarray, "n"]) -> float:
    """Where sensitivity + specificity is largest (Youden's index), midway between two neighbouring predictions.

    To be chosen on validation rows. Raises ValueError for labels of one kind.
    """
    positives = int(labels.sum())
    if not 0 < positives < len(labels):
        raise ValueError("a threshold needs rows of both classes to validate on, received one class only")
    order = np.argsort(-probability, kind="stable")
    p, y = probability[order], labels[order]
    last = np.append(p[1:] != p[:-1], True)  # cuts fall between different predictions only
    gain = np.cumsum(y) / positives - np.cumsum(1 - y) / (len(y) - positives)
    best = int(np.argmax(np.where(last, gain, -np.inf)))
    return float(p[best] if best + 1 == len(p) else (p[best] + p[best + 1]) / 2)


@dataclass(frozen=True)
class Verdict:
    """Test figures. Two classes: the second is the positive one, `threshold` decides; more: the likeliest class.

    auc: of more than two classes the mean of one against the rest, without an interval. sensitivity, specificity:
    two classes only. balanced: the mean of the classes' own accuracies. reliability: of the positive class, or of the
    likeliest, in 15 bins of equal width; `ece` is its error.
    """

    auc: Interval
    accuracy: Interval
    balanced: float
    sensitivity: Interval | None
    specificity: Interval | None
    log_loss: float
    brier: float
    reliability: Reliability
    predicted: Int[np.ndarray, "n"]

    @property
    def ece(self) -> float:
        """Expected calibration error."""
        return self.reliability.ece

    def numbers(self) -> dict[str, float]:
        """The figures as plain numbers, intervals as NAME_low and NAME_high."""
        found = {"balanced_accuracy": self.balanced, "log_loss": self.log_loss, "brier": self.brier, "ece": self.ece}
        for name in ("auc", "accuracy", "sensitivity", "specificity"):
            value: Interval | None = getattr(self, name)
            if value is not None:
                found |= {name: value.mean, f"{name}_low": value.low, f"{name}_high": value.high}
        return found


def verdict(labels: Int[np.ndarray, "n"], probability: Float[np.ndarray, "n K"], threshold: float = 0.5) -> Verdict:
    """All figures of one test set."""
    n, classes = probability.shape
    two = classes == 2
    predicted = (probability[:, 1] > threshold).astype(np.int64) if two else probability.argmax(1)
    right = predicted == labels
    own = [float(right[labels == k].mean()) for k in range(classes) if (labels == k).any()]
    if two:
        area = auc_interval(labels.astype(np.float64), probability[:, 1])
        curve = reliability(labels.astype(np.float64), probability[:, 1], by="width")
        rates = [proportion(int(right[labels == k].sum()), int((labels == k).sum())) for k in (1, 0)]
    else:
        areas = [auc((labels == k).astype(np.float64), probability[:, k]) for k in range(classes)]
        mean = float(np.nanmean(areas))
        area = Interval(mean, math.nan, math.nan)
        hit = (probability.argmax(1) == labels).astype(np.float64)
        curve = reliability(hit, probability.max(1), by="width")
        rates = []
    chosen = np.clip(probability[np.arange(n), labels], 1e-12, 1)
    square = float(((probability - np.eye(classes)[labels]) ** 2).sum(1).mean())
    return Verdict(
        area, proportion(int(right.sum()), n), float(np.mean(own)), rates[0] if two else None,
        rates[1] if two else None, float(-np.log(chosen).mean()), square / 2 if two else square, curve, predicted,
    )  # fmt: skip
