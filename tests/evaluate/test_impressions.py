"""Impression metrics by hand and against scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import ndcg_score, roc_auc_score

from funnelrec.evaluate.impressions import impression_metrics


def test_by_hand() -> None:
    """List 7: click, pass, click in that order; list 3: a tie of a click and a pass; list 9 has no click."""
    labels = np.array([1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    scores = np.array([3.0, 2.0, 1.0, 0.5, 0.5, 1.0, 2.0])
    found = impression_metrics(labels, scores, np.array([7, 7, 7, 3, 3, 9, 9]))
    assert found["auc"].tolist() == [0.5, 0.5]
    assert found["mrr"].tolist() == pytest.approx([1 / 2, (1 + 1 / 3) / 2])
    ideal = 1 + 1 / math.log2(3)
    assert found["ndcg@5"].tolist() == pytest.approx([1 / math.log2(3), (1 + 0.5) / ideal])


def test_against_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    impressions = rng.integers(0, 40, 900)
    labels, scores = (rng.random(900) < 0.2).astype(np.float64), rng.normal(size=900)
    found = impression_metrics(labels, scores, impressions)
    lists = [impressions == i for i in range(40)]
    both = [own for own in lists if 0 < labels[own].sum() < own.sum()]
    assert found["auc"].tolist() == pytest.approx([roc_auc_score(labels[own], scores[own]) for own in both])
    for k in (5, 10):
        theirs = [ndcg_score([labels[own]], [scores[own]], k=k) for own in both]
        assert found[f"ndcg@{k}"].tolist() == pytest.approx(theirs)


def test_a_constant_scorer_does_not_look_good() -> None:
    rng = np.random.default_rng(1)
    impressions = np.arange(2000) // 20
    labels = (rng.random(2000) < 0.1).astype(np.float64)
    found = impression_metrics(labels, np.zeros(2000), impressions)
    assert np.all(found["auc"] == 0.5)
    assert found["ndcg@5"].mean() < 0.05


def test_scores_must_be_finite() -> None:
    with pytest.raises(ValueError, match="1 of 2 scores are not finite"):
        impression_metrics(np.array([0.0, 1.0]), np.array([np.nan, 1.0]), np.array([0, 0]))
