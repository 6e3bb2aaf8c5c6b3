"""Maps: item vectors in two dimensions, such that what is alike lies together, and a picture of them.

    t-SNE   evaluate/tsne.py; from the first two principal components, so that the large distances mean something too
            (Kobak, Berens. Nature Communications 2019)
    UMAP    McInnes, Healy, Melville. 2018. arXiv:1802.03426; where umap-learn is installed

Vectors are compared by their cosine: the length of an item vector says how popular the item is, not what it is about.
Only neighbourhoods are to be believed: neither the distance between two groups nor the size of one is a measurement.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from funnelrec.evaluate.tsne import tsne

__all__ = ["item_map", "place"]

Method = Literal["tsne", "umap"]
LARGEST = 20_000  #: items that are laid out; of more, a sample is, and the others are placed among it
FEWEST = 8  #: items; of fewer there are no neighbourhoods, and the principal components are the map
NEIGHBOURS = 5  #: nearest items that say where another vector belongs
ROWS_AT_ONCE = 2**24  #: cosines alive at a time
HINT = "a map by UMAP needs umap-learn, which is not installed; run: pip install 'funnelrec[maps]', or take t-SNE"


def item_map(vectors: Float[np.ndarray, "N D"], *, method: Method = "tsne", seed: int = 0) -> Float[np.ndarray, "N 2"]:
    """Coordinates in [-1, 1], float32; the same ones for the same vectors, method and seed.

    Of more than `LARGEST` items a sample drawn by `seed` is laid out and each other item lies at the median of its 5
    nearest in the sample. Raises ValueError for vectors that are not finite, ModuleNotFoundError with the way to
    install what is missing.
    """
    if method not in ("tsne", "umap"):
        raise ValueError(f"a map is made by tsne or umap, received {method!r}")
    if not np.isfinite(vectors).all():
        raise ValueError("an item vector is not finite; train with a lower learning rate or clip_norm")
    units = _directions(vectors)
    count = len(units)
    if count <= LARGEST:
        return _centred(_laid_out(units, method, seed))
    chosen = np.sort(np.random.default_rng(seed).choice(count, LARGEST, replace=False))
    return _centred(place(_laid_out(units[chosen], method, seed), units[chosen], units))


def place(
    coordinates: Float[np.ndarray, "N 2"], vectors: Float[np.ndarray, "N D"], others: Float[np.ndarray, "M D"]
) -> Float[np.ndarray, "M 2"]:
    """Where other vectors (items, a user's interests) lie on a map: the median of the 5 nearest items' places; a
    vector that is on the map lies where it lies."""
    units, asked = _directions(vectors), _directions(others)
    near = min(NEIGHBOURS, len(units))
    places: Float[np.ndarray, "M 2"] = np.empty((len(asked), 2), dtype=np.float32)
    at_once = max(1, ROWS_AT_ONCE // len(units))
    for start in range(0, len(asked), at_once):
        cosines = asked[start : start + at_once] @ units.T  # (m, N)
        nearest = np.argpartition(-cosines, near - 1, axis=1)[:, :near]
        places[start : start + at_once] = np.median(coordinates[nearest], axis=1)
        best = cosines.argmax(axis=1)
        same = (units[best] == asked[start : start + at_once]).all(axis=1).nonzero()[0]
        places[start + same] = coordinates[best[same]]
    return places


def _directions(vectors: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    units: Float[np.ndarray, "N D"] = (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)
    return units


def _centred(coordinates: Float[np.ndarray, "N 2"]) -> Float[np.ndarray, "N 2"]:
    """The box around them becomes the middle of [-1, 1]², its longer side fills it."""
    if not len(coordinates):
        return coordinates
    low, high = coordinates.min(axis=0), coordinates.max(axis=0)
    reach = float((high - low).max()) / 2
    placed: Float[np.ndarray, "N 2"] = ((coordinates - (low + high) / 2) / (reach or 1.0)).clip(-1, 1)
    return placed.astype(np.float32)


def _laid_out(units: Float[np.ndarray, "n D"], method: Method, seed: int) -> Float[np.ndarray, "n 2"]:
    start = _principal(units)
    if len(units) < FEWEST or not start.any():
        return start
    return tsne(units, start) if method == "tsne" else _umap(units, start, seed)


def _principal(units: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n 2"]:
    """The first two principal components, the largest entry of each axis positive."""
    found = np.zeros((len(units), 2), dtype=np.float32)
    if len(units) < 2:
        return found
    centred = units - units.mean(axis=0)
    values, axes = np.linalg.eigh(centred.T.astype(np.float64) @ centred)
    axes = axes[:, ::-1][:, :2]
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
    real = values[::-1][:2] > 1e-6  # of identical vectors there is no component
    found[:, : axes.shape[1]] = (centred @ axes) * real
    return found


def _umap(units: Float[np.ndarray, "n D"], start: Float[np.ndarray, "n 2"], seed: int) -> Float[np.ndarray, "n 2"]:
    try:
        import umap
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(HINT) from error
    options: dict[str, Any] = {"n_neighbors": min(15, len(units) - 1), "metric": "cosine", "n_jobs": 1}
    layout = umap.UMAP(init=start / np.abs(start).max() * 10, random_state=seed, **options)
    found: Float[np.ndarray, "n 2"] = layout.fit_transform(units)
    return found
