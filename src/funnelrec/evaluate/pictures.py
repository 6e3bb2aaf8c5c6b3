"""Pictures about pictures: rows of small images, heat laid over them, the confusion matrix.

Figures as those of plots.py: no global state, the same bytes for the same input, saved by `plots.save`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int, UInt8

from funnelrec.evaluate.plots import INK, QUIET, _figure, _heading

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STOPS = ((0.27, 0.0, 0.33), (0.23, 0.32, 0.55), (0.13, 0.57, 0.55), (0.37, 0.79, 0.38), (0.99, 0.91, 0.14))
__all__ = ["confusion_matrix", "confusion_picture", "overlay", "tiles"]


def tiles(
    title: str,
    subtitle: str,
    rows: Sequence[tuple[str, UInt8[np.ndarray, "..."]]],
    columns: Sequence[str] = (),
    inch: float = 0.5,
) -> Figure:
    """One line of small pictures a row, its name on the left; `columns` stand above. Grey [n, H, W] or [n, H, W, 3]."""
    most = max(len(pictures) for _, pictures in rows)
    beside = 0.085 * max(len(name) for name, _ in rows) + 0.35
    above = 0.8 + (0.25 if columns else 0)
    width = max(beside + most * inch + 0.2, 0.1 * max(len(title) * 1.25, len(subtitle) * 0.85))
    height = above + len(rows) * inch + 0.15
    figure = _figure(width, height)
    for line, (name, pictures) in enumerate(rows):
        bottom = height - above - (line + 1) * inch
        figure.text((beside - 0.1) / width, (bottom + inch / 2) / height, name, ha="right", va="center", fontsize=9)
        for place, picture in enumerate(pictures):
            edge = (beside + place * inch, bottom, inch * 0.94, inch * 0.94)
            axis = figure.add_axes((edge[0] / width, edge[1] / height, edge[2] / width, edge[3] / height))
            axis.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axis.set_axis_off()
    for place, name in enumerate(columns):
        x = (beside + (place + 0.47) * inch) / width
        figure.text(x, 1 - (above - 0.06) / height, name, ha="center", va="bottom", fontsize=8, color=QUIET)
    _heading(figure, title, subtitle)
    return figure


def overlay(pictures: UInt8[np.ndarray, "n C H W"], heat: Float[np.ndarray, "n H W"]) -> UInt8[np.ndarray, "n H W 3"]:
    """Pictures in grey with `heat` (0..1) laid over them, dark blue where it is 0 to yellow where it is 1."""
    grey = pictures.mean(1, keepdims=False)[..., None]  # (n, H, W, 1)
    stops = np.array(STOPS)
    place = np.clip(heat, 0, 1) * (len(stops) - 1)
    low = np.minimum(place.astype(np.int64), len(stops) - 2)
    share = (place - low)[..., None]
    colour = 255 * ((1 - share) * stops[low] + share * stops[low + 1])  # (n, H, W, 3)
    mixed: np.ndarray = np.round(0.55 * grey + 0.45 * colour).astype(np.uint8)
    return mixed


def confusion_matrix(
    labels: Int[np.ndarray, "n"], predicted: Int[np.ndarray, "n"], classes: int
) -> Int[np.ndarray, "K K"]:
    """How many rows of each true class (down) were taken for each class (across)."""
    return np.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def confusion_picture(title: str, subtitle: str, matrix: Int[np.ndarray, "K K"], classes: Sequence[str]) -> Figure:
    """The matrix with counts; a cell is darker the larger its share of the true class."""
    side = max(0.42 * len(classes), 1.6)
    beside = 0.085 * max(map(len, classes)) + 0.75
    width = max(beside + side + 0.4, 0.1 * max(len(title) * 1.25, len(subtitle) * 0.85))
    height = side + 0.85 + beside
    figure = _figure(width, height)
    axis = figure.add_axes((beside / width, beside / height, side / width, side / height))
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(*matrix.shape):
        ink = "white" if share[row, column] > 0.5 else INK
        axis.text(column, row, str(matrix[row, column]), ha="center", va="center", fontsize=8, color=ink)
    axis.set_xticks(range(len(classes)), classes, rotation=90 if max(map(len, classes)) > 2 else 0, fontsize=9)
    axis.set_yticks(range(len(classes)), classes, fontsize=9)
    axis.set_xlabel("taken for", fontsize=9, color=QUIET)
    axis.set_ylabel("is", fontsize=9, color=QUIET)
    axis.tick_params(length=0)
    _heading(figure, title, subtitle)
    return figure
