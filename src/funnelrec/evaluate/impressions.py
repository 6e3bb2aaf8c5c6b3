"""Metrics of impressions: each list that was shown, by itself, then the mean over lists (the protocol of MIND).

Lists in which everything or nothing was clicked are left out. Equal scores are conservative: a click stands behind what
was passed over with the same score, except in AUC, where a tie counts half.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

__all__ = ["impression_metrics"]


def impression_metrics(
    labels: Float[np.ndarray, "n"],
    scores: Float[np.ndarray, "n"],
    impressions: Int[np.ndarray, "n"],
    *,
    ks: tuple[int, ...] = (5, 10),
) -> dict[str, Float[np.ndarray, "m"]]:
    """ "auc", "mrr" and "ndcg@k" of each of the m lists that have both labels, in rising order of their numbers.

    mrr is Σ 1 / rank over all clicks, divided by their number, as MIND measures it. Raises ValueError where a score is
    not finite.
    """
    if not np.isfinite(scores).all():
        raise ValueError(f"{int((~np.isfinite(scores)).sum())} of {scores.size} scores are not finite")
    _, group = np.unique(impressions, return_inverse=True)
    clicks, shown = np.bincount(group, weights=labels), np.bincount(group)
    both = (clicks > 0) & (clicks < shown)
    kept = both[group]
    labels, scores = labels[kept], scores[kept]
    group = (np.cumsum(both) - 1)[group[kept]]
    clicks, shown = clicks[both], shown[both]
    order = np.lexsort((labels, -scores, group))  # among equal scores the passed-over stand first
    y, g, z = labels[order], group[order], scores[order]
    first = np.concatenate([[0], np.cumsum(shown)[:-1]]).astype(np.int64)
    rank = np.arange(len(y)) - first[g] + 1

    def total(values: Float[np.ndarray, "n"]) -> Float[np.ndarray, "m"]:
        return np.bincount(g, weights=values, minlength=len(shown))

    # ranks from below with ties in the middle, per list: U = Σ ranks of clicks − c (c + 1) / 2
    new = np.concatenate([[True], (z[1:] != z[:-1]) | (g[1:] != g[:-1])]) if len(z) else np.zeros(0, bool)
    tie = np.cumsum(new) - 1
    size = np.bincount(tie) if len(z) else np.zeros(0, np.int64)
    middle = rank[new][tie] + (size[tie] - 1) / 2 if len(z) else rank
    from_below = shown[g] + 1 - middle
    result = {
        "auc": (total(y * from_below) - clicks * (clicks + 1) / 2) / (clicks * (shown - clicks)),
        "mrr": total(y / rank) / clicks,
    }
    for k in ks:
        gain = 1 / np.log2(np.arange(2, k + 2))
        ideal = np.cumsum(gain)[np.minimum(clicks, k).astype(np.int64) - 1]
        result[f"ndcg@{k}"] = total(np.where(rank <= k, y / np.log2(rank + 1), 0.0)) / ideal
    return result
