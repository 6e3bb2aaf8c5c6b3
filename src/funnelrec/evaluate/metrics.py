"""Metrics: pure functions on NumPy arrays, no loop over users anywhere.

Ranked lists `ranked` hold item rows, best first, one line a user ([B, k]); row 0 fills a list that ran out, a miss.
What each user was looking for is a CSR: user b's relevant items are `items[offsets[b]:offsets[b + 1]]`, none twice.
A user without relevant items gets NaN, because no list can be right or wrong for that user: leave such users out.

| function            | formula (h_j = 1 if the item at place j is relevant, R = number of relevant items)         |
|---------------------|---------------------------------------------------------------------------------------------|
| `recall`            | Σ_{j≤k} h_j / R                                                                             |
| `precision`         | Σ_{j≤k} h_j / k                                                                             |
| `hit_rate`          | 1 if any h_j = 1, j ≤ k                                                                     |
| `mrr`               | 1 / (place of the first hit), 0 without a hit                                               |
| `ndcg`              | Σ_{j≤k} h_j / log2(j + 1), divided by the same sum over an ideal list with min(k, R) hits   |
| `average_precision` | Σ_{j≤k} h_j · (Σ_{i≤j} h_i / j) / R, as trec_eval's map_cut                                 |
| `auc`               | P(score of a positive > score of a negative) + ½ P(equal)                                   |
| `gauc`              | Σ_u n_u AUC_u / Σ_u n_u over users with both labels, n_u impressions (DIN, Eq. 10)          |
| `log_loss`          | mean of log(1 + e^z) − y z, in nats, z the logit                                            |
| `normalised_entropy`| log loss / entropy of the mean label (He et al. 2014, "Practical lessons …")                |
| `ece`               | Σ_bins (n_bin / n) · abs(mean predicted − mean observed)                                    |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

__all__ = [
    "LIST_METRICS",
    "Reliability",
    "attribute_diversity",
    "auc",
    "average_precision",
    "coverage",
    "ece",
    "gauc",
    "hit_rate",
    "hits",
    "list_metrics",
    "log_loss",
    "mrr",
    "ndcg",
    "normalised_entropy",
    "novelty",
    "pessimistic_hits",
    "precision",
    "recall",
    "reliability",
    "rmse",
    "sigmoid",
    "target_rank",
    "user_aucs",
    "vector_diversity",
]

LIST_METRICS = ("recall", "ndcg", "hit_rate", "mrr", "precision", "average_precision")


# -------------------------------------------------------------------------------------------------- ranked lists
def hits(
    ranked: Int[np.ndarray, "B k"], offsets: Int[np.ndarray, "B1"], items: Int[np.ndarray, "R"]
) -> Bool[np.ndarray, "B k"]:
    """Which places of each list hold a relevant item. An item listed twice counts at its first place only.

    One look-up for all users: (user, item) pairs become one integer key, and the keys of the lists are searched in the
    sorted keys of the relevant items, O((B k + R) log R).
    Raises ValueError if the CSR does not fit the lists or names an item twice for one user.
    """
    users, places = ranked.shape
    _require_csr(offsets, items, users)
    width = 1 + max(int(ranked.max(initial=0)), int(items.max(initial=0)))
    wanted = np.sort(np.repeat(np.arange(users), np.diff(offsets)) * width + items)
    twice = np.flatnonzero(wanted[1:] == wanted[:-1])
    if twice.size:
        user, item = divmod(int(wanted[twice[0]]), width)
        raise ValueError(f"relevant items of user {user} name item row {item} twice; give each item once")
    if not wanted.size or not places:
        return np.zeros(ranked.shape, dtype=bool)
    keys = np.arange(users)[:, None] * width + ranked  # (B, k)
    found = wanted[np.minimum(np.searchsorted(wanted, keys), wanted.size - 1)] == keys
    return np.asarray(found & (ranked > 0) & ~_repeated(ranked))


def pessimistic_hits(
    hit: Bool[np.ndarray, "B k"], scores: Float[np.ndarray, "B k"], k: int | None = None
) -> Bool[np.ndarray, "B j"]:
    """The first `k` places when items of equal score stand in the least favourable order: hits after misses.

    A matcher breaks ties by some rule of its own (the lower row, which is often the more popular item), so a scorer
    that cannot tell items apart could look good. Here neighbours with the same score are one group, and the hits of a
    group move to its end. Give one place more than `k` is wanted: a group that reaches the last place given may go on
    beyond it, so its hits are taken as misses. Filler (score -inf) is no group.
    """
    users, places = hit.shape
    keep = places if k is None else min(k, places)
    if not places:
        return hit
    start = np.ones((users, places), dtype=bool)
    start[:, 1:] = scores[:, 1:] != scores[:, :-1]
    start |= ~np.isfinite(scores)
    group = np.cumsum(start, axis=1)  # (B, k)
    last = group == group[:, -1:]
    open_ended = last & (last.sum(axis=1, keepdims=True) > 1)  # a group that may go on beyond what was given
    order = np.argsort(group * 2 + hit, axis=1, kind="stable")
    moved = np.take_along_axis(hit & ~open_ended, order, axis=1)
    return moved[:, :keep]


def list_metrics(
    hit: Bool[np.ndarray, "B k"], relevant: Int[np.ndarray, "B"], ks: Sequence[int]
) -> dict[str, Float[np.ndarray, "B"]]:
    """All of `LIST_METRICS` at each cut-off as {"recall@10": float64 [B], …} from one table of hits.

    `relevant` is R, the number of relevant items of each user. Places beyond the width of `hit` are misses.
    """
    result: dict[str, Float[np.ndarray, "B"]] = {}
    for k in ks:
        for name, function in _OF_HITS.items():
            result[f"{name}@{k}"] = function(hit, relevant, _require_k(k))
    return result


def recall(
    ranked: Int[np.ndarray, "B k"], offsets: Int[np.ndarray, "B1"], items: Int[np.ndarray, "R"], k: int
) -> Float[np.ndarray, "B"]:
    """Share of the relevant items among the first k: Σ h / R."""
    return _recall(hits(ranked, offsets, items), np.diff(offsets), _require_k(k))


def precision(
    ranked: Int[np.ndarray, "B k"], offsets: Int[np.ndarray, "B1"], items: Int[np.ndarray, "R"], k: int
) -> Float[np.ndarray, "B"]:
    """Share of relevant items among k places: Σ h / k, also when the list is shorter than k."""
    return _precision(hits(ranked, offsets, items), np.diff(offsets), _require_k(k))


def hit_rate(
    ranked: Int[np.ndarray, "B k"], offsets: Int[np.ndarray, "B1"], items: Int[np.ndarray, "R"], k: int
) -> Float[np.ndarray, "B"]:
    """1 where at least one of the first k items is relevant, else 0."""
    return _hit_rate(hits(ranked, offsets, items), np.diff(offsets), _require_k(k))


def mrr(
    ranked: Int[np.ndarray, "B k"], offsets: Int[np.ndarray, "B1"], items: Int[np.ndarray, "R"], k: int
) -> Float[np.ndarray, "B"]:
    """One over the place of the first relevant item, 0 if it is not among the first k."""
    return _mrr(hits(ranked, offsets, items), np.diff(offsets), _require_k(k))


def ndcg(
    ranked: Int[np.ndarray, "B k"], offsets: Int[np.ndarray, "B1"], items: Int[np.ndarray, "R"], k: int
) -> Float[np.ndarray, "B"]:
    """Discounted gain over that of an ideal list, which has min(k, R) hits (not: as many hits as were found)."""
    return _ndcg(hits(ranked, offsets, items), np.diff(offsets), _require_k(k))


def average_precision(
    ranked: Int[np.ndarray, "B k"], offsets: Int[np.ndarray, "B1"], items: Int[np.ndarray, "R"], k: int
) -> Float[np.ndarray, "B"]:
    """Precision at each hit, summed over the first k and divided by R; its mean over users is MAP@k."""
    return _average_precision(hits(ranked, offsets, items), np.diff(offsets), _require_k(k))


def target_rank(scores: Float[np.ndarray, "B N"], target_scores: Float[np.ndarray, "B"]) -> Int[np.ndarray, "B"]:
    """Rank of a target among all candidates, ties against it: 1 + number of other items that score at least as much.

    `scores` holds the target's own score too, so the rank is the number of scores that are not below it: a constant
    scorer gives rank N, never 1. A score of NaN is not below anything and so counts against the target.
    Raises ValueError if a target's score is NaN.
    """
    if np.isnan(target_scores).any():
        raise ValueError("the score of a target is NaN; a model that gives NaN cannot be ranked, mend the model")
    return np.asarray((~(scores < target_scores[:, None])).sum(axis=1), dtype=np.int64)


def _require_k(k: int) -> int:
    if k < 1:
        raise ValueError(f"k must be at least 1, received {k}")
    return k


def _require_csr(offsets: Int[np.ndarray, "B1"], items: Int[np.ndarray, "R"], users: int) -> None:
    if offsets.shape[0] != users + 1:
        raise ValueError(
            f"offsets need one entry more than there are lists, received {offsets.shape[0]} for {users} lists"
        )
    if offsets[0] != 0 or offsets[-1] != items.shape[0] or (np.diff(offsets) < 0).any():
        raise ValueError(f"offsets must rise from 0 to the number of items ({items.shape[0]}); slice both alike")


def _repeated(ranked: Int[np.ndarray, "B k"]) -> Bool[np.ndarray, "B k"]:
    """True where an item stood already further up in the same list."""
    order = np.argsort(ranked, axis=1, kind="stable")
    ordered = np.take_along_axis(ranked, order, axis=1)
    again = np.zeros(ranked.shape, dtype=bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    result = np.empty_like(again)
    np.put_along_axis(result, order, again, axis=1)
    return result


def _per_relevant(value: Float[np.ndarray, "B"], relevant: Int[np.ndarray, "B"]) -> Float[np.ndarray, "B"]:
    """value / relevant, NaN where nothing is relevant."""
    out = np.full(value.shape, np.nan)
    np.divide(value, relevant, out=out, where=relevant > 0)
    return out


def _recall(hit: Bool[np.ndarray, "B k"], relevant: Int[np.ndarray, "B"], k: int) -> Float[np.ndarray, "B"]:
    return _per_relevant(hit[:, :k].sum(axis=1).astype(np.float64), relevant)


def _precision(hit: Bool[np.ndarray, "B k"], relevant: Int[np.ndarray, "B"], k: int) -> Float[np.ndarray, "B"]:
    return np.where(relevant > 0, hit[:, :k].sum(axis=1) / k, np.nan)


def _hit_rate(hit: Bool[np.ndarray, "B k"], relevant: Int[np.ndarray, "B"], k: int) -> Float[np.ndarray, "B"]:
    return np.where(relevant > 0, hit[:, :k].any(axis=1).astype(np.float64), np.nan)


def _mrr(hit: Bool[np.ndarray, "B k"], relevant: Int[np.ndarray, "B"], k: int) -> Float[np.ndarray, "B"]:
    found = hit[:, :k] / np.arange(1, hit[:, :k].shape[1] + 1)
    return np.where(relevant > 0, found.max(axis=1, initial=0.0), np.nan)


def _ndcg(hit: Bool[np.ndarray, "B k"], relevant: Int[np.ndarray, "B"], k: int) -> Float[np.ndarray, "B"]:
    discount = 1.0 / np.log2(np.arange(2, k + 2))
    gain = (hit[:, :k] * discount[: hit.shape[1]]).sum(axis=1)
    ideal = np.concatenate([[np.nan], np.cumsum(discount)])  # entry r: the gain of r hits on top; no relevant: NaN
    return np.asarray(gain / ideal[np.minimum(relevant, k)])


def _average_precision(hit: Bool[np.ndarray, "B k"], relevant: Int[np.ndarray, "B"], k: int) -> Float[np.ndarray, "B"]:
    top = hit[:, :k]
    at_hit = top * np.cumsum(top, axis=1) / np.arange(1, top.shape[1] + 1)
    return _per_relevant(at_hit.sum(axis=1), relevant)


_OF_HITS = {
    "recall": _recall,
    "ndcg": _ndcg,
    "hit_rate": _hit_rate,
    "mrr": _mrr,
    "precision": _precision,
    "average_precision": _average_precision,
}


# ------------------------------------------------------------------------------------------- beyond accuracy
def coverage(ranked: Int[np.ndarray, "B k"], num_items: int) -> float:
    """Share of a catalogue of `num_items` real items that stands in at least one list. Row 0 is filler."""
    if num_items < 1:
        raise ValueError(f"num_items must be at least 1, received {num_items}")
    return float(np.unique(ranked[ranked > 0]).size / num_items)


def attribute_diversity(ranked: Int[np.ndarray, "B k"], attribute: Int[np.ndarray, "N G"]) -> Float[np.ndarray, "B"]:
    """Share of the pairs of a list that have no attribute value in common (ComiRec's Diversity@N when G = 1).

    `attribute[n]` holds up to G values of item row n (genres, say), 0 where there is none. NaN for fewer than 2 items.
    """
    real = ranked > 0
    values = attribute[ranked]  # (B, k, G)
    shared = np.zeros((*ranked.shape, ranked.shape[1]), dtype=bool)  # (B, k, k)
    for g in range(values.shape[2]):
        for other in range(values.shape[2]):
            left, right = values[:, :, None, g], values[:, None, :, other]
            shared |= (left == right) & (left > 0)
    pair = real[:, :, None] & real[:, None, :] & ~np.eye(ranked.shape[1], dtype=bool)
    return _per_relevant((pair & ~shared).sum(axis=(1, 2)).astype(np.float64), pair.sum(axis=(1, 2)))


def vector_diversity(ranked: Int[np.ndarray, "B k"], vectors: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "B"]:
    """1 − the mean cosine of all pairs of a list, in O(k D): Σ_{i≠j} u_i·u_j = |Σ u|² − Σ |u|². NaN below 2 items."""
    real = ranked > 0
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = np.divide(vectors, length, out=np.zeros(vectors.shape, dtype=np.float64), where=length > 0)
    listed = unit[ranked] * real[:, :, None]  # (B, k, D)
    together = (listed.sum(axis=1) ** 2).sum(axis=1) - (listed**2).sum(axis=(1, 2))
    count = real.sum(axis=1)
    return 1.0 - _per_relevant(together, count * (count - 1))


def novelty(ranked: Int[np.ndarray, "B k"], item_counts: Int[np.ndarray, "N"]) -> Float[np.ndarray, "B"]:
    """Mean surprise of a list in bits: −log2 of each item's share of the training events. NaN for an empty list.

    An item that training never saw counts as seen once, otherwise its surprise would be infinite.
    """
    share = np.maximum(item_counts, 1) / max(int(item_counts.sum()), 1)
    real = ranked > 0
    bits = -np.log2(share)[ranked] * real
    return _per_relevant(bits.sum(axis=1), real.sum(axis=1))


# ------------------------------------------------------------------------------------------- scored rows (CTR)
def sigmoid(logits: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """1 / (1 + e^−z) in float64, without overflow for any z."""
    return np.exp(-np.logaddexp(0.0, -logits.astype(np.float64)))


def _require_one_length(labels: Float[np.ndarray, "n"], scores: Float[np.ndarray, "m"]) -> None:
    if labels.shape != scores.shape:
        raise ValueError(f"labels and scores must be of one length, received {labels.shape[0]} and {scores.shape[0]}")


def _require_rows(labels: Float[np.ndarray, "n"], scores: Float[np.ndarray, "m"]) -> None:
    _require_one_length(labels, scores)
    if not labels.size:
        raise ValueError("no rows to score; received empty labels")
    if not ((labels == 0) | (labels == 1)).all():
        raise ValueError("labels must be 0 or 1; apply the click rule of the schema first")
    if np.isnan(scores).any():
        raise ValueError("a score is NaN; a model that gives NaN cannot be measured, mend the model")


def auc(labels: Float[np.ndarray, "n"], scores: Float[np.ndarray, "n"]) -> float:
    """Area under the ROC curve, exact, ties count half, O(n log n). NaN if all labels are equal."""
    _require_rows(labels, scores)
    positives = float(labels.sum())
    negatives = labels.size - positives
    if not positives or not negatives:
        return float("nan")
    rank_sum = float(_mid_ranks(scores)[labels == 1].sum())
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def user_aucs(
    labels: Float[np.ndarray, "n"], scores: Float[np.ndarray, "n"], users: Int[np.ndarray, "n"]
) -> tuple[Int[np.ndarray, "U"], Float[np.ndarray, "U"], Int[np.ndarray, "U"]]:
    """(user, AUC among the user's own rows, number of the user's rows) for every user that has both labels."""
    _require_rows(labels, scores)
    order = np.lexsort((scores, users))
    user, score, label = users[order], scores[order], labels[order].astype(np.float64)
    new_user = _starts(user)
    first = np.flatnonzero(new_user)
    size = np.diff(np.append(first, user.size))
    owner = np.cumsum(new_user) - 1
    place = np.arange(user.size) - first[owner] + 1  # 1, 2, … within the user
    tie = np.flatnonzero(new_user | _starts(score))
    tie_size = np.diff(np.append(tie, user.size))
    rank = np.repeat(place[tie] + (tie_size - 1) / 2, tie_size)  # ties share their mean rank
    positives = np.add.reduceat(label, first)
    rank_sum = np.add.reduceat(label * rank, first)
    both = (positives > 0) & (positives < size)
    p, n = positives[both], size[both] - positives[both]
    return user[first][both], (rank_sum[both] - p * (p + 1) / 2) / (p * n), size[both]


def gauc(labels: Float[np.ndarray, "n"], scores: Float[np.ndarray, "n"], users: Int[np.ndarray, "n"]) -> float:
    """Mean AUC within a user, weighted by impressions, over users with both labels. NaN if there is no such user."""
    _, value, impressions = user_aucs(labels, scores, users)
    return float(np.average(value, weights=impressions)) if value.size else float("nan")


def _starts(values: Float[np.ndarray, "n"] | Int[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
    """True where a value differs from the one before it."""
    start = np.ones(values.shape, dtype=bool)
    start[1:] = values[1:] != values[:-1]
    return start


def _mid_ranks(scores: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """Ranks 1 … n in rising order; equal scores share the mean of their ranks."""
    order = np.argsort(scores, kind="stable")
    tie = np.flatnonzero(_starts(scores[order]))
    tie_size = np.diff(np.append(tie, scores.size))
    ranks = np.empty(scores.size)
    ranks[order] = np.repeat(tie + (tie_size + 1) / 2, tie_size)
    return ranks


def log_loss(labels: Float[np.ndarray, "n"], logits: Float[np.ndarray, "n"]) -> float:
    """Mean negative log-likelihood of the labels, in nats, from logits (never infinite for a finite logit)."""
    _require_rows(labels, logits)
    z = logits.astype(np.float64)
    return float((np.logaddexp(0.0, z) - labels * z).mean())


def normalised_entropy(labels: Float[np.ndarray, "n"], logits: Float[np.ndarray, "n"]) -> float:
    """Log loss divided by that of always predicting the mean label: 1 = no better than that. NaN for one label only."""
    rate = float(labels.mean(dtype=np.float64))
    if rate in (0.0, 1.0):
        return float("nan")
    base = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    return float(log_loss(labels, logits) / base)


def rmse(labels: Float[np.ndarray, "n"], predictions: Float[np.ndarray, "n"]) -> float:
    """Root of the mean squared error, in the unit of the labels (ratings, say)."""
    _require_one_length(labels, predictions)
    return float(np.sqrt(np.mean((labels.astype(np.float64) - predictions) ** 2)))


@dataclass(frozen=True)
class Reliability:
    """One entry a non-empty bin: mean predicted probability, share of positives, number of rows."""

    predicted: Float[np.ndarray, "bins"]
    observed: Float[np.ndarray, "bins"]
    count: Int[np.ndarray, "bins"]

    @property
    def ece(self) -> float:
        """Expected calibration error: the gap between predicted and observed, weighted by rows."""
        return float((np.abs(self.predicted - self.observed) * self.count).sum() / self.count.sum())


def reliability(
    labels: Float[np.ndarray, "n"],
    probabilities: Float[np.ndarray, "n"],
    bins: int = 15,
    by: Literal["mass", "width"] = "mass",
) -> Reliability:
    """Rows gathered into bins of like prediction, for a reliability diagram and the ECE.

    "mass": bins of equally many rows, right for click rates that crowd near 0 (equal predictions stay in one bin);
    "width": `bins` equal parts of [0, 1], as in Guo et al. 2017, "On calibration of modern neural networks".
    """
    _require_rows(labels, probabilities)
    if ((probabilities < 0) | (probabilities > 1)).any():
        raise ValueError("probabilities must lie in [0, 1]; received logits? use sigmoid(logits)")
    p = probabilities.astype(np.float64)
    inner = np.arange(1, bins) / bins
    edges = np.unique(np.quantile(p, inner)) if by == "mass" else inner
    which = np.searchsorted(edges, p, side="left")  # a bin is (left edge, right edge]
    count = np.bincount(which, minlength=edges.size + 1)
    filled = count > 0
    predicted = np.bincount(which, weights=p, minlength=edges.size + 1)[filled] / count[filled]
    observed = np.bincount(which, weights=labels, minlength=edges.size + 1)[filled] / count[filled]
    return Reliability(predicted, observed, count[filled])


def ece(
    labels: Float[np.ndarray, "n"],
    probabilities: Float[np.ndarray, "n"],
    bins: int = 15,
    by: Literal["mass", "width"] = "mass",
) -> float:
    """Expected calibration error over `reliability` bins: 0 = the predicted rates are the observed rates."""
    return reliability(labels, probabilities, bins, by).ece
