"""t-SNE: the sums on the grid are the sums over all pairs, the affinities have the perplexity asked for."""

from __future__ import annotations

import numpy as np
import pytest

from funnelrec.evaluate import tsne as module
from funnelrec.evaluate.tsne import _affinities, _gaussians, repulsion, summed, tsne


def by_hand(y: np.ndarray) -> np.ndarray:
    """The sum as it is written."""
    w = np.array(
        [[0.0 if i == j else 1 / (1 + ((a - b) ** 2).sum()) for j, b in enumerate(y)] for i, a in enumerate(y)]
    )
    return np.array([sum(w[i, j] ** 2 * (y[i] - y[j]) for j in range(len(y))) for i in range(len(y))]) / w.sum()


def test_two_points() -> None:
    # w = 1/2 both ways, so Z = 1 and each sum is (1/2)² (±1, 0)
    y = np.array([[0.0, 0.0], [1.0, 0.0]])
    assert summed(y).tolist() == [[-0.25, 0.0], [0.25, 0.0]]
    np.testing.assert_allclose(repulsion(y), summed(y), atol=1e-4)


def test_the_sum_over_pairs_as_it_is_written() -> None:
    y = np.random.default_rng(0).standard_normal((40, 2))
    np.testing.assert_allclose(summed(y), by_hand(y), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("width", [1e-4, 1.0, 60.0])
def test_the_grid_sums_what_the_pairs_sum(width: float) -> None:
    y = np.random.default_rng(0).standard_normal((2000, 2)) * width / 6
    expected = summed(y)
    assert np.linalg.norm(repulsion(y) - expected) < 0.05 * np.linalg.norm(expected)


def test_a_grid_too_coarse_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positive control of the band above: cells of a dozen units for kernels of one."""
    y = np.random.default_rng(0).standard_normal((2000, 2)) * 10
    monkeypatch.setattr(module, "LEAST_CELLS", 1)
    monkeypatch.setattr(np, "ceil", lambda value: value / 12)
    expected = summed(y)
    assert np.linalg.norm(repulsion(y) - expected) > 0.1 * np.linalg.norm(expected)


def test_affinities() -> None:
    units = np.random.default_rng(0).standard_normal((60, 4)).astype(np.float32)
    rows, columns, p = _affinities(units, 6.0)
    full = np.zeros((60, 60))
    full[rows, columns] = p
    assert p.sum() == pytest.approx(1)
    np.testing.assert_allclose(full, full.T)
    assert full.diagonal().tolist() == [0.0] * 60
    assert (np.diff(rows) >= 0).all()
    squares = np.random.default_rng(1).random((5, 40)) * 7
    q = _gaussians(squares, float(np.log(6.0)))
    assert np.exp(-(q * np.log(q.clip(min=1e-300))).sum(axis=1)) == pytest.approx(6.0)
    assert (q.argmax(axis=1) == squares.argmin(axis=1)).all()


def test_both_sums_lay_out_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three far groups come apart, by the plain sum and by the grid."""
    rng = np.random.default_rng(0)
    group = np.arange(60) % 3
    units = (4 * np.eye(3)[group] + 0.3 * rng.standard_normal((60, 3))).astype(np.float32)
    monkeypatch.setattr(module, "STEPS", 350)
    for few in (500, 10):
        monkeypatch.setattr(module, "FEW", few)
        y = tsne(units, units[:, :2], perplexity=8)
        distance = np.linalg.norm(y[:, None] - y[None], axis=2)
        nearest = distance.argsort(axis=1)[:, 1:6]
        assert (group[nearest] == group[:, None]).mean() > 0.9  # a third by chance
