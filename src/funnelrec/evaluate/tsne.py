"""t-SNE in time proportional to the number of points: what repels is summed on a grid by fast Fourier transforms.

Paper: van der Maaten, Hinton. Visualizing Data using t-SNE. JMLR 2008
       Linderman, Rachh, Hoskins, Steinerberger, Kluger. Fast interpolation-based t-SNE. Nature Methods 2019.
       arXiv:1712.09005

    p_ij    from the 3·perplexity nearest neighbours of each point, the width of its Gaussian such that they count as
            `perplexity` many; symmetrised and summing to 1
    q_ij    w_ij / Z with w_ij = 1 / (1 + |y_i − y_j|²), Z = Σ_{i≠j} w_ij
    dC/dy_i = 4 Σ_j p_ij w_ij (y_i − y_j) − 4/Z Σ_j w_ij² (y_i − y_j)
              first sum: over the neighbours; second, and Z: convolutions of a grid whose cells the points are spread
              over by polynomials of degree 2

No random number and no thread of its own: the same points give the same layout.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float64, Int

__all__ = ["tsne"]

EXAGGERATION, EARLY, STEPS = 12.0, 250, 750  #: at first p counts EXAGGERATION times; steps so, and steps in all
NODES = 3  #: grid points of a cell along each axis
FEW = 500  #: points up to which the plain sum over all pairs is faster than the grid
LEAST_CELLS = 20  #: along each axis; more where the layout is wider than so many units
ROWS_AT_ONCE = 2**24  #: products alive at a time

_Floats = Float64[np.ndarray, "..."]


def tsne(
    units: Float[np.ndarray, "n D"], start: Float[np.ndarray, "n 2"], *, perplexity: int | float = 30
) -> Float[np.ndarray, "n 2"]:
    """The layout [n, 2], float32, of points that are compared by Euclidean distance, from the layout `start` (its scale
    does not matter). `perplexity` neighbours count; fewer where there are not three times as many points."""
    count = len(units)
    rows, columns, p = _affinities(units, min(float(perplexity), (count - 1) / 3))
    first = np.flatnonzero(np.diff(rows, prepend=-1))  # every point has a neighbour
    y = (start / max(float(start.std(axis=0).max()), 1e-12) * 1e-4).astype(np.float64)
    step, gain = np.zeros_like(y), np.ones_like(y)
    rate = max(count / EXAGGERATION / 4, 50.0)
    for number in range(STEPS):
        early = number < EARLY
        between = y[rows] - y[columns]  # (E, 2)
        pull = p * (EXAGGERATION if early else 1.0) / (1.0 + (between * between).sum(axis=1))
        push = summed(y) if count <= FEW else repulsion(y)
        gradient = 4 * (np.add.reduceat(pull[:, None] * between, first, axis=0) - push)
        gain = np.where(np.sign(gradient) != np.sign(step), gain + 0.2, gain * 0.8).clip(min=0.01)
        step = (0.5 if early else 0.8) * step - rate * gain * gradient
        y += step
        y -= y.mean(axis=0)
    return y.astype(np.float32)


def summed(y: Float64[np.ndarray, "n 2"]) -> Float64[np.ndarray, "n 2"]:
    """Σ_j w_ij² (y_i − y_j) / Z for every point, pair by pair."""
    lengths = (y * y).sum(axis=1)
    w = 1.0 / (1.0 + np.maximum(lengths[:, None] + lengths - 2.0 * (y @ y.T), 0.0))
    total = float(w.sum()) - len(y)  # Z, without the points' w_ii = 1
    w *= w
    found: Float64[np.ndarray, "n 2"] = (y * w.sum(axis=1)[:, None] - w @ y) / max(total, 1e-12)
    return found


def repulsion(y: Float64[np.ndarray, "n 2"]) -> Float64[np.ndarray, "n 2"]:
    """The same on a grid, to within a few per cent."""
    low, width = y.min(axis=0), float((y.max(axis=0) - y.min(axis=0)).max())
    cells = max(LEAST_CELLS, int(np.ceil(width)))
    side = cells * NODES
    spacing = max(width, 1e-12) / cells / NODES
    place, weight = _spread((y - low) / spacing, cells)  # (n, 9) each
    flat = place.ravel()
    charges = [weight, weight * y[:, :1], weight * y[:, 1:]]
    grids = np.stack([np.bincount(flat, c.ravel(), side * side).reshape(side, side) for c in charges])
    shape = (2 * side, 2 * side)
    apart = np.minimum(np.arange(2 * side), 2 * side - np.arange(2 * side)) * spacing
    kernel = 1.0 / (1.0 + apart[:, None] ** 2 + apart**2)
    spectra = np.fft.rfft2(grids, shape)
    squared = np.fft.irfft2(spectra * np.fft.rfft2(kernel * kernel), shape)[:, :side, :side]
    plain = np.fft.irfft2(spectra[0] * np.fft.rfft2(kernel), shape)[:side, :side]
    total = float((plain.ravel()[place] * weight).sum()) - len(y)
    at_points = (squared.reshape(3, -1)[:, place] * weight).sum(axis=2)  # (3, n)
    found: Float64[np.ndarray, "n 2"] = (y * at_points[0][:, None] - at_points[1:].T) / max(total, 1e-12)
    return found


def _spread(
    position: Float64[np.ndarray, "n 2"], cells: int
) -> tuple[Int[np.ndarray, "n 9"], Float64[np.ndarray, "n 9"]]:
    """The grid points of each point's cell and their Lagrange weights; `position` is in spacings from the corner."""
    cell = np.minimum((position / NODES).astype(np.int64), cells - 1)
    within = position - cell * NODES - 0.5  # the nodes of a cell stand at 0, 1, 2 of this
    a, b = within - 1, within - 2
    one = np.stack([a * b / 2, -within * b, within * a / 2], axis=2)  # (n, 2, 3)
    node = cell[:, :, None] * NODES + np.arange(NODES)  # (n, 2, 3)
    place = node[:, 0, :, None] * (cells * NODES) + node[:, 1, None, :]
    return place.reshape(len(position), -1), (one[:, 0, :, None] * one[:, 1, None, :]).reshape(len(position), -1)


def _affinities(
    units: Float[np.ndarray, "n D"], perplexity: float
) -> tuple[Int[np.ndarray, "E"], Int[np.ndarray, "E"], Float64[np.ndarray, "E"]]:
    """p as (row, column, value), rows rising."""
    count = len(units)
    near = max(1, min(int(3 * perplexity), count - 1))
    columns = np.empty((count, near), dtype=np.int64)
    squares = np.empty((count, near))
    lengths = (units.astype(np.float64) ** 2).sum(axis=1)
    at_once = max(1, ROWS_AT_ONCE // count)
    for begin in range(0, count, at_once):
        part = slice(begin, min(begin + at_once, count))
        apart = lengths[part, None] + lengths - 2.0 * (units[part] @ units.T)
        apart[np.arange(part.stop - begin), np.arange(begin, part.stop)] = np.inf
        columns[part] = np.argpartition(apart, near - 1, axis=1)[:, :near]
        squares[part] = np.take_along_axis(apart, columns[part], axis=1).clip(min=0)
    conditional = _gaussians(squares, np.log(max(perplexity, 1.0)))
    rows = np.repeat(np.arange(count), near)
    # p_j|i and p_i|j share one place of the symmetric matrix
    keys = np.concatenate([rows * count + columns.ravel(), columns.ravel() * count + rows])
    keys, pair = np.unique(keys, return_inverse=True)
    p = np.bincount(pair, np.tile(conditional.ravel(), 2)) / (2 * count)
    return keys // count, keys % count, p


def _gaussians(squares: Float64[np.ndarray, "n m"], entropy: float) -> Float64[np.ndarray, "n m"]:
    """exp(−β_i d²) / Σ with β_i, found by bisection of its logarithm, such that each row has the entropy (in nats)."""
    squares = squares - squares.min(axis=1, keepdims=True)
    low, high = np.full((len(squares), 1), -30.0), np.full((len(squares), 1), 30.0)
    for _ in range(50):
        middle = (low + high) / 2
        weight = np.exp(-np.exp(middle) * squares)
        p: Float64[np.ndarray, "n m"] = weight / weight.sum(axis=1, keepdims=True)
        flat = -(p * np.log(p.clip(min=1e-300))).sum(axis=1, keepdims=True) > entropy
        low, high = np.where(flat, middle, low), np.where(flat, high, middle)
    return p
