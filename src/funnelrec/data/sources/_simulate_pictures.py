"""32 x 32 pictures of the simulated world's items: a shape and a palette per topic, a pattern per sub-topic.

Everything is drawn at once for all items on arrays [n, 32, 32]: a shape is a smooth inside test in the item's own
coordinates (shifted, scaled, turned a little), laid over a background of gradient and pattern.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from jaxtyping import Float64, Int64, UInt8

__all__ = ["SIDE", "draw"]

SIDE = 32  #: pixels
_Plane = npt.NDArray[np.float64]

#: topic -> (background top, background bottom, shape), red green blue
_PALETTE = np.array(
    [
        [(255, 214, 150), (228, 140, 70), (120, 50, 30)],  # kitchen: a pot on warm orange
        [(150, 215, 235), (20, 95, 160), (250, 250, 245)],  # sea: a sail on blue
        [(215, 228, 240), (140, 165, 195), (74, 84, 104)],  # mountain: peaks on pale blue
        [(12, 14, 46), (56, 34, 98), (252, 226, 122)],  # sky: a star on night
        [(214, 240, 190), (92, 160, 84), (226, 62, 110)],  # garden: a flower on green
        [(96, 32, 92), (38, 12, 54), (255, 122, 190)],  # music: a note on purple
        [(196, 200, 206), (112, 118, 128), (196, 98, 40)],  # machine: a gear on grey
        [(246, 230, 200), (200, 164, 118), (96, 62, 36)],  # animal: a paw on sand
        [(238, 220, 176), (190, 150, 92), (116, 96, 76)],  # history: a castle on parchment
        [(240, 84, 66), (176, 26, 44), (255, 255, 255)],  # sport: a striped ball on red
    ],
    dtype=np.float64,
)


def _inside(distance: _Plane) -> _Plane:
    """1 inside (negative distance), 0 outside, smooth over about a pixel."""
    return np.clip(0.5 - distance * (SIDE / 2.0), 0.0, 1.0)


def _box(x: _Plane, y: _Plane, half_width: float, half_height: float) -> _Plane:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def _disc(x: _Plane, y: _Plane, radius: float) -> _Plane:
    return np.hypot(x, y) - radius


def _pot(x: _Plane, y: _Plane) -> _Plane:
    body = np.minimum(_box(x, y - 0.18, 0.5, 0.32), _box(x, y - 0.05, 0.72, 0.07))
    return np.minimum(body, np.minimum(_box(x, y + 0.27, 0.52, 0.06), _disc(x, y + 0.42, 0.1)))


def _boat(x: _Plane, y: _Plane) -> _Plane:
    sail = np.maximum(np.maximum(x - 0.08 - 0.55 * (y + 0.75) / 1.1, -x + 0.08), y - 0.3)
    jib = np.maximum(np.maximum(-x - 0.45 * (y + 0.5) / 0.8, x + 0.02), y - 0.3)
    hull = np.maximum(np.maximum(np.abs(x) - 0.75 + 0.7 * (y - 0.42), 0.4 - y), y - 0.66)
    return np.minimum(np.minimum(sail, jib), hull)


def _peaks(x: _Plane, y: _Plane) -> _Plane:
    big = np.maximum(np.abs(x + 0.2) * 1.15 - (y + 0.7), y - 0.62)
    small = np.maximum(np.abs(x - 0.45) * 1.1 - (y + 0.2), y - 0.62)
    snow = np.maximum(big, y + 0.3 + 0.1 * np.sin(14.0 * x))
    return np.maximum(np.minimum(big, small) * 0.7, -snow)


def _star(x: _Plane, y: _Plane) -> _Plane:
    fifth = 2.0 * np.pi / 5.0
    angle = np.abs((np.arctan2(x, -y) + fifth / 2.0) % fifth - fifth / 2.0)  # from the nearest tip, 0..36 degrees
    along, across = np.hypot(x, y) * np.cos(angle), np.hypot(x, y) * np.sin(angle)
    return 0.53 * (along - 0.8) + 0.85 * across  # the straight side from a tip to the notch beside it


def _flower(x: _Plane, y: _Plane) -> _Plane:
    petals = np.hypot(x, y) - (0.55 + 0.2 * np.cos(6.0 * np.arctan2(x, y)))
    return np.maximum(petals, 0.17 - np.hypot(x, y))


def _note(x: _Plane, y: _Plane) -> _Plane:
    heads = np.minimum(_disc(x + 0.42, (y - 0.46) * 1.25, 0.24), _disc(x - 0.4, (y - 0.36) * 1.25, 0.24))
    stems = np.minimum(_box(x + 0.22, y - 0.0, 0.05, 0.5), _box(x - 0.6, y + 0.1, 0.05, 0.5))
    return np.minimum(np.minimum(heads, stems), _box(x - 0.19, y + 0.54 + 0.12 * (x - 0.19), 0.46, 0.1))


def _gear(x: _Plane, y: _Plane) -> _Plane:
    teeth = np.tanh(4.0 * np.cos(8.0 * np.arctan2(x, y)))
    return np.maximum(np.hypot(x, y) - (0.6 + 0.11 * teeth), 0.25 - np.hypot(x, y))


def _paw(x: _Plane, y: _Plane) -> _Plane:
    toes = [
        _disc(x - dx, (y - dy) * 0.85, 0.17) for dx, dy in ((-0.54, -0.1), (-0.2, -0.48), (0.2, -0.48), (0.54, -0.1))
    ]
    pad = _disc(x * 0.9, (y - 0.3) * 1.1, 0.37)
    paw: npt.NDArray[np.float64] = np.minimum.reduce([pad, *toes])
    return paw


def _castle(x: _Plane, y: _Plane) -> _Plane:
    towers = np.minimum(_box(x + 0.5, y - 0.05, 0.2, 0.6), _box(x - 0.5, y - 0.05, 0.2, 0.6))
    wall = _box(x, y - 0.28, 0.5, 0.37)
    battlements = np.maximum(np.minimum(towers, wall), -_box(np.abs(x) - 0.5, y + 0.5, 0.07, 0.13))
    gate = np.minimum(_disc(x, y - 0.35, 0.16), _box(x, y - 0.55, 0.16, 0.2))
    return np.maximum(battlements, -gate)


def _ball(x: _Plane, y: _Plane) -> _Plane:
    seams = np.minimum(np.abs(np.hypot(x - 0.85, y) - 0.62), np.abs(np.hypot(x + 0.85, y) - 0.62)) - 0.05
    return np.maximum(_disc(x, y, 0.68), -seams)


_SHAPES: tuple[Callable[[_Plane, _Plane], _Plane], ...] = (
    _pot,
    _boat,
    _peaks,
    _star,
    _flower,
    _note,
    _gear,
    _paw,
    _castle,
    _ball,
)


def _pattern(kind: npt.NDArray[np.int64], x: _Plane, y: _Plane) -> _Plane:
    """Plain, stripes, dots or waves in [0, 1], by `kind` of the item."""
    stripes = 0.5 + 0.5 * np.tanh(3.0 * np.sin(9.0 * (x + y)))
    dots = _inside(np.hypot((x * 3.0) % 1.0 - 0.5, (y * 3.0) % 1.0 - 0.5) - 0.25)
    waves = 0.5 + 0.5 * np.tanh(3.0 * np.sin(11.0 * y + 1.6 * np.sin(5.0 * x)))
    return np.choose(kind[:, None, None], [np.zeros_like(x), stripes, dots, waves])


def draw(
    topic: Int64[np.ndarray, "n"], pattern: Int64[np.ndarray, "n"], seeds: Float64[np.ndarray, "n 8"]
) -> UInt8[np.ndarray, "n 32 32 3"]:
    """Pictures of items: `topic` [n] in 0..9, `pattern` [n] in 0..3, `seeds` [n, 8] uniform numbers of each item."""
    axis = (np.arange(SIDE) + 0.5) / SIDE * 2.0 - 1.0
    x, y = np.meshgrid(axis, axis)
    u = (seeds * 2.0 - 1.0)[:, :, None, None]
    angle, scale = 0.22 * u[:, 0], 1.0 + 0.16 * u[:, 1]
    dx, dy = x - 0.14 * u[:, 2], y - 0.14 * u[:, 3]
    sx, sy = (dx * np.cos(angle) + dy * np.sin(angle)) * scale, (dy * np.cos(angle) - dx * np.sin(angle)) * scale
    inside = np.zeros((len(topic), SIDE, SIDE))
    for number, shape in enumerate(_SHAPES):
        mine = topic == number
        inside[mine] = _inside(shape(sx[mine], sy[mine]))

    palette = _PALETTE[topic]  # (n, 3, 3)
    slope = (y[None] + 1.0) / 2.0
    ground = palette[:, None, None, 0] * (1.0 - slope[..., None]) + palette[:, None, None, 1] * slope[..., None]
    tint = np.where(ground.mean(axis=(1, 2, 3)) > 128.0, -26.0, 30.0)[:, None, None]  # darker on light, else lighter
    ground = ground + (tint * _pattern(pattern, x + 0.6 * u[:, 4], y + 0.6 * u[:, 5]))[..., None]
    picture = ground * (1.0 - inside[..., None]) + palette[:, None, None, 2] * inside[..., None]
    picture = picture * (1.0 + 0.1 * u[:, 6, :, :, None]) + 10.0 * u[:, 7, :, :, None]
    pixels: npt.NDArray[np.uint8] = np.clip(np.rint(picture), 0, 255).astype(np.uint8)
    return pixels
