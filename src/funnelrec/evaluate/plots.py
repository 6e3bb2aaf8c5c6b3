"""Pictures of a report: bars with intervals, reliability diagrams, the accuracy-diversity curve.

Each function returns a matplotlib figure and touches no global state (no pyplot, no rcParams). Colours are from the
Okabe-Ito palette, which colour-blind readers can tell apart; nothing is said by colour alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float

from funnelrec.evaluate.metrics import Reliability
from funnelrec.evaluate.significance import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Bar", "CurvePoint", "Panel", "bars", "curve", "installed", "points", "reliability_diagram", "save"]

Role = Literal["model", "baseline", "oracle"]

INK, QUIET, RULE = "#222222", "#6b6f76", "#d5d8dc"
COLOURS: dict[str, str] = {"model": "#0072B2", "baseline": "#A9AFB7", "oracle": "#009E73"}
# one colour and one shape a group, so that nothing is said by colour alone
GROUPS = (
    ("#E69F00", "o"), ("#0072B2", "s"), ("#009E73", "^"), ("#D55E00", "D"), ("#56B4E9", "v"), ("#CC79A7", "P"),
    ("#222222", "X"),
)  # fmt: skip
HINT = "pictures need matplotlib, which is not installed; run: pip install 'funnelrec[plots]'"


@dataclass(frozen=True)
class Bar:
    """One bar: what it is called, its value with interval, and what it is."""

    label: str
    value: Interval
    role: Role = "model"


@dataclass(frozen=True)
class Panel:
    """Bars of one metric: what the metric means in a few words, and the value at which the bars start.

    `start` is 0, or the value of knowing nothing where that is not 0 (an AUC of 0.5).
    """

    meaning: str
    bars: Sequence[Bar]
    start: float = 0.0


@dataclass(frozen=True)
class CurvePoint:
    """One setting of a knob: its label, where it lands, and the interval of the accuracy if known."""

    label: str
    diversity: float
    accuracy: float
    interval: Interval | None = None


def installed() -> bool:
    """Whether matplotlib can be imported."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


def bars(title: str, subtitle: str, panels: Mapping[str, Panel]) -> Figure:
    """Horizontal bars, one panel a metric, with the value and its half-interval written at each bar.

    All panels name the same things in the same order.
    """
    names = [bar.label for bar in next(iter(panels.values())).bars]
    roles = {bar.role for panel in panels.values() for bar in panel.bars}
    above, below, height = 1.2, 0.45, 0.34 * len(names) + 1.65
    beside = 0.085 * max(map(len, names)) + 0.35  # inches for the names
    width = max(beside + 3.3 * len(panels) + 0.15, 0.1 * max(len(title) * 1.25, len(subtitle) * 0.85))
    figure = _figure(width, height)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    figure.subplots_adjust(
        left=beside / width, right=1 - 0.1 / width, top=1 - above / height, bottom=below / height, wspace=0.08
    )
    for place, (axis, (metric, panel)) in enumerate(zip(axes, panels.items(), strict=True)):
        _bar_panel(axis, metric, panel)
        axis.set_yticks(range(len(names)), names if place == 0 else [""] * len(names), color=INK, fontsize=10)
    _heading(figure, title, subtitle)
    _legend(figure, [role for role in ("model", "baseline", "oracle") if role in roles and len(roles) > 1])
    return figure


def _bar_panel(axis: Axes, metric: str, panel: Panel) -> None:
    ends = [x for bar in panel.bars for x in (bar.value.low, bar.value.high) if np.isfinite(x)]
    right, left = max([*ends, panel.start]), min([*ends, panel.start])
    span = (right - left) or 1.0
    digits = 4 if right < 1.5 else 2
    for y, bar in enumerate(panel.bars):
        value = bar.value
        if not np.isfinite(value.mean):
            axis.text(panel.start + 0.02 * span, y, "not defined", va="center", fontsize=9, color=QUIET)
            continue
        axis.barh(y, value.mean - panel.start, left=panel.start, height=0.64, color=COLOURS[bar.role], linewidth=0)
        axis.plot([value.low, value.high], [y, y], color=INK, linewidth=1.6, solid_capstyle="butt")
        text = f"{value.mean:.{digits}f}"
        edge = (max(value.high, panel.start) + 0.025 * span, y)
        axis.text(*edge, text, va="center_baseline", fontsize=9.5, color=INK, fontweight="bold")
        half = f"± {value.half:.{digits}f}"
        place = (7.0 * len(text) + 3, 0)  # points to the right, past the bold number
        style: dict[str, Any] = {
            "textcoords": "offset points",
            "va": "center_baseline",
            "fontsize": 8.5,
            "color": QUIET,
        }
        axis.annotate(half, edge, xytext=place, **style)
    axis.text(0, 1.0, panel.meaning, transform=axis.transAxes, fontsize=8.5, color=QUIET, va="bottom")
    axis.annotate(
        metric, (0, 1), (0, 13), "axes fraction", "offset points", fontsize=10.5, fontweight="bold", color=INK
    )
    axis.set_xlim(left, right + 0.62 * span)
    axis.set_ylim(len(panel.bars) - 0.45, -0.6)
    axis.set_xticks([])
    axis.tick_params(length=0)
    for side in ("top", "right", "bottom"):
        axis.spines[side].set_visible(False)
    axis.spines["left"].set_position(("data", panel.start))
    axis.spines["left"].set_color(QUIET)


def reliability_diagram(title: str, diagrams: Mapping[str, Reliability]) -> Figure:
    """One small panel a model: observed rate against predicted probability, in %; on the diagonal they agree.

    Whiskers are 95 % intervals of the observed rate of each bin.
    """
    lines = -(-len(diagrams) // 4)
    columns = -(-len(diagrams) // lines)
    width, height = 0.95 + 2.45 * columns, 1.75 + 2.7 * lines - 0.35
    figure = _figure(max(width, 6.6), height)
    width = figure.get_figwidth()
    axes = figure.subplots(lines, columns, squeeze=False)
    figure.subplots_adjust(
        left=0.75 / width,
        right=(0.75 + 2.45 * columns) / width,
        top=1 - 1.1 / height,
        bottom=0.6 / height,
        wspace=0.17,
        hspace=0.22,
    )
    highest = max(max(d.predicted.max(), d.observed.max()) for d in diagrams.values())
    limit = 100.0 if highest > 0.6 else 100 * float(highest) * 1.1 + 1e-9
    for place, axis in enumerate(axes.flat):
        if place >= len(diagrams):
            axis.set_visible(False)
            continue
        name = list(diagrams)[place]
        _reliability_panel(axis, name, diagrams[name], limit)
        if place % columns == 0:
            axis.set_ylabel("observed rate, %", fontsize=9, color=QUIET)
        else:
            axis.tick_params(labelleft=False)
        if place + columns < len(diagrams):
            axis.tick_params(labelbottom=False)
        else:
            axis.set_xlabel("predicted probability, %", fontsize=9, color=QUIET)
    _heading(figure, title, "bins of equally many rows; a point on the dashed line: as many came true as predicted")
    return figure


def _reliability_panel(axis: Axes, name: str, diagram: Reliability, limit: float) -> None:
    spread = 1.96 * np.sqrt(diagram.observed * (1 - diagram.observed) / diagram.count)
    axis.plot([0, limit], [0, limit], color=QUIET, linewidth=1, dashes=(3, 3))
    axis.errorbar(
        100 * diagram.predicted,
        100 * diagram.observed,
        yerr=100 * spread,
        color=COLOURS["model"],
        ecolor=COLOURS["model"],
        elinewidth=1,
        linewidth=1.4,
        marker="o",
        markersize=4,
    )
    axis.set_title(name, loc="left", fontsize=10.5, fontweight="bold", color=INK, pad=5)
    axis.text(0.05, 0.93, f"ECE {100 * diagram.ece:.2f} %", transform=axis.transAxes, fontsize=9, color=INK, va="top")
    _plain(axis)
    axis.set_xlim(0, limit)
    axis.set_ylim(0, limit)
    axis.locator_params(nbins=5)
    axis.set_aspect("equal", anchor="SW")


def curve(title: str, subtitle: str, points: Sequence[CurvePoint], *, diversity: str, accuracy: str) -> Figure:
    """Accuracy (up) against diversity (right), one labelled point a setting, joined in the order given."""
    figure = _figure(6.4, 4.4)
    axis = figure.subplots()
    figure.subplots_adjust(left=0.13, right=0.96, top=0.8, bottom=0.14)
    x, y = [p.diversity for p in points], [p.accuracy for p in points]
    axis.plot(x, y, color=COLOURS["model"], linewidth=1.6, marker="o", markersize=6, zorder=3)
    for place, point in enumerate(points):
        if point.interval is not None:
            axis.plot([point.diversity] * 2, [point.interval.low, point.interval.high], color=QUIET, linewidth=1)
        axis.annotate(
            point.label,
            (point.diversity, point.accuracy),
            xytext=(6, 4) if place % 2 == 0 else (-6, -4),  # on both sides of a falling line, off the bars
            textcoords="offset points",
            ha="left" if place % 2 == 0 else "right",
            va="bottom" if place % 2 == 0 else "top",
            fontsize=9.5,
            color=INK,
        )
    axis.set_xlabel(diversity, fontsize=9.5, color=QUIET)
    axis.set_ylabel(accuracy, fontsize=9.5, color=QUIET)
    axis.margins(0.12, 0.15)
    _plain(axis)
    _heading(figure, title, subtitle)
    return figure


def points(
    title: str,
    subtitle: str,
    coordinates: Float[np.ndarray, "N 2"],
    groups: Sequence[str | None],
    *,
    ringed: Float[np.ndarray, "M 2"] | None = None,
    stars: Float[np.ndarray, "K 2"] | None = None,
) -> Figure:
    """A map of items. The 7 largest of `groups` have a colour, a shape and their name where they are densest; the
    others and None are small and grey. `ringed` places get a ring, `stars` a numbered star."""
    figure = _figure(8.4, 7.6)
    axis = figure.subplots()
    figure.subplots_adjust(left=0.02, right=0.98, top=0.9, bottom=0.08)
    axis.set_axis_off()
    axis.set_aspect("equal", adjustable="datalim")
    names = np.array([g or "" for g in groups], dtype=object)
    size = float(np.clip(24000 / max(len(names), 1), 6, 40))
    counts = sorted(((int((names == n).sum()), str(n)) for n in set(names) - {""}), key=lambda c: (-c[0], c[1]))
    shown = [name for _, name in counts[: len(GROUPS)]]
    rest = ~np.isin(names, shown)
    look: dict[str, Any] = {"linewidths": 0, "rasterized": True}
    if rest.any():
        axis.scatter(coordinates[rest, 0], coordinates[rest, 1], s=size / 2, color=RULE, label="others", **look)
    for name, (colour, shape) in zip(shown, GROUPS, strict=False):
        own = coordinates[names == name]
        axis.scatter(
            own[:, 0],
            own[:, 1],
            s=size,
            color=colour,
            marker=shape,
            linewidths=0,
            alpha=0.75,
            label=name,
            rasterized=True,
        )
    if ringed is not None:
        ring: dict[str, Any] = {"facecolors": "none", "edgecolors": "black", "linewidths": 1.2}
        axis.scatter(ringed[:, 0], ringed[:, 1], s=60, zorder=4, label="taken by the user", **ring)
    for number, (x, y) in enumerate([] if stars is None else stars, 1):
        axis.scatter(x, y, s=430, marker="*", color="black", edgecolors="white", linewidths=1.2, zorder=5)
        axis.text(x, y, str(number), color="white", fontsize=8, fontweight="bold", ha="center", va="center", zorder=6)
    for name, (colour, _) in zip(shown, GROUPS, strict=False):
        x, y = _densest(coordinates[names == name])
        _halo(axis.text(x, y, name, color=colour, fontsize=11, fontweight="bold"))
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, 0.01), ncols=4, fontsize=9, frameon=False, markerscale=2)
    _heading(figure, title, subtitle)
    return figure


def _densest(places: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "2"]:
    """The place whose tenth nearest is the closest (of many, among a thousand of them)."""
    some = places[:: max(1, len(places) // 1000)]
    apart = np.linalg.norm(some[:, None] - some[None], axis=2)
    best: Float[np.ndarray, "2"] = some[np.sort(apart, axis=1)[:, min(10, len(some) - 1)].argmin()]
    return best


def _halo(text: Any) -> None:
    """White around letters that stand on points."""
    from matplotlib.patheffects import withStroke

    text.set(ha="center", va="center", zorder=7, path_effects=[withStroke(linewidth=3, foreground="white")])


def save(figure: Figure, folder: Path, name: str, kinds: Sequence[str] = ("png", "svg")) -> tuple[Path, ...]:
    """Write `name`.png (160 dots an inch) and `name`.svg, the same bytes for the same figure; returns the paths."""
    import matplotlib

    paths = tuple(folder / f"{name}.{kind}" for kind in kinds)
    metadata = {"png": {"Software": None}, "svg": {"Date": None}}
    with matplotlib.rc_context({"svg.hashsalt": "funnelrec"}):
        for path, kind in zip(paths, kinds, strict=True):
            part = path.with_name(path.name + ".part")
            keep: dict[str, Any] = {"metadata": metadata[kind], "facecolor": "white"}
            figure.savefig(part, format=kind, dpi=160, **keep)
            os.replace(part, path)
    return paths


def _figure(width: float, height: float) -> Figure:
    """A white figure drawn by Agg; raises ModuleNotFoundError with the way to install matplotlib if it is absent."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(HINT) from error
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _heading(figure: Figure, title: str, subtitle: str) -> None:
    """Title and one quiet line below it, in inches from the upper left corner."""
    left, height = 0.2 / figure.get_figwidth(), figure.get_figheight()
    figure.text(left, 1 - 0.16 / height, title, fontsize=13, fontweight="bold", color=INK, va="top")
    figure.text(left, 1 - 0.44 / height, subtitle, fontsize=9.5, color=QUIET, va="top")


def _legend(figure: Figure, roles: Sequence[str]) -> None:
    """The roles in their own colour along the lower edge."""
    x, width, height = 0.2, figure.get_figwidth(), figure.get_figheight()
    for role in roles:
        figure.text(x / width, 0.17 / height, "■", color=COLOURS[role], fontsize=10, va="center")
        figure.text((x + 0.17) / width, 0.17 / height, role, color=QUIET, fontsize=9, va="center")
        x += 0.38 + 0.075 * len(role)


def _plain(axis: Axes) -> None:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(RULE)
    axis.tick_params(length=0, labelsize=8.5, labelcolor=QUIET)
    axis.grid(color=RULE, linewidth=0.5)
    axis.set_axisbelow(True)
