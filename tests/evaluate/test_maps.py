"""Maps keep neighbourhoods, give the same coordinates twice, and place what was not laid out."""

from __future__ import annotations

import builtins
from typing import Any

import numpy as np
import pytest

from funnelrec.evaluate import maps
from funnelrec.evaluate.maps import item_map, place


def groups(count: int = 150, dim: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Five directions with items around them whose lengths (popularity) differ widely, and each item's group."""
    rng = np.random.default_rng(0)
    group = np.arange(count) % 5
    centres = rng.standard_normal((5, dim))
    vectors = centres[group] + 0.25 * rng.standard_normal((count, dim))
    return (vectors * np.exp(rng.standard_normal((count, 1)))).astype(np.float32), group


def purity(coordinates: np.ndarray, group: np.ndarray) -> float:
    """Share of the 5 nearest points that are of the point's own group."""
    apart = np.linalg.norm(coordinates[:, None] - coordinates[None], axis=2)
    np.fill_diagonal(apart, np.inf)
    nearest = apart.argsort(axis=1)[:, :5]
    return float((group[nearest] == group[:, None]).mean())


def test_groups_stay_together_and_nothing_is_drawn_twice() -> None:
    vectors, group = groups()
    found = item_map(vectors)
    assert found.shape == (150, 2)
    assert found.dtype == np.float32
    assert np.abs(found).max() == 1.0
    assert purity(found, group) > 0.95
    assert np.array_equal(found, item_map(vectors))
    # positive control: without the structure the measure is that of chance
    shuffled = np.random.default_rng(1).permutation(group)
    assert purity(found, shuffled) < 0.4


def test_the_length_of_a_vector_says_nothing() -> None:
    vectors, _ = groups()
    np.testing.assert_allclose(item_map(vectors), item_map(4 * vectors), atol=1e-6)


def test_more_items_than_are_laid_out(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, group = groups(400)
    monkeypatch.setattr(maps, "LARGEST", 120)
    found = item_map(vectors)
    assert purity(found, group) > 0.9
    assert np.array_equal(found, item_map(vectors))
    assert not np.array_equal(found, item_map(vectors, seed=1))  # another sample


def test_placing_by_hand() -> None:
    vectors = np.eye(6, dtype=np.float32)
    coordinates = np.array([[0, 0], [1, 0], [2, 0], [3, 4], [4, 8], [9, 9]], dtype=np.float32)
    # nearest are items 0 to 4 in this order; 5 points the other way
    other = np.array([[5, 4, 3, 2, 1, -9]], dtype=np.float32)
    assert place(coordinates, vectors, other).tolist() == [[2.0, 0.0]]
    assert place(coordinates, vectors, 7 * vectors[5:]).tolist() == [[9.0, 9.0]]  # it is on the map


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_a_few_items_lie_along_their_principal_components(count: int) -> None:
    vectors, _ = groups(count)
    found = item_map(vectors)
    assert found.shape == (count, 2)
    assert np.isfinite(found).all()


def test_equal_items_and_flat_ones() -> None:
    assert np.array_equal(item_map(np.ones((20, 4), np.float32)), np.zeros((20, 2), np.float32))
    assert np.isfinite(item_map(np.linspace(-1, 1, 20, dtype=np.float32)[:, None])).all()


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="an item vector is not finite"):
        item_map(np.array([[0.0, np.nan]], np.float32))
    real = builtins.__import__

    def missing(name: str, *args: Any, **more: Any) -> Any:
        if name == "umap":
            raise ModuleNotFoundError(name)
        return real(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    vectors, _ = groups(20)
    with pytest.raises(ModuleNotFoundError, match=r"needs umap-learn, .* or take t-SNE"):
        item_map(vectors, method="umap")


@pytest.mark.slow
def test_umap_too() -> None:
    """Slow for what umap-learn compiles when it is imported."""
    pytest.importorskip("umap", reason="umap-learn is not installed; pip install 'funnelrec[maps]'")
    vectors, group = groups()
    found = item_map(vectors, method="umap")
    assert purity(found, group) > 0.95
    assert np.array_equal(found, item_map(vectors, method="umap"))
