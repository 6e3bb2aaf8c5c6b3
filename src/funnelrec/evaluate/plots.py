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

from funnelrec.evaluate.metrics import Reliability
from funnelrec.evaluate.significance import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Bar", "CurvePoint", "bars", "curve", "installed", "reliability_diagram", "save"]

Role = Literal["model", "baseline", "oracle"]

INK, QUIET, RULE = "#222222", "#6b6f76", "#d5d8dc"
COLOURS: dict[str, str] = {"model": "#0072B2", "baseline": "#A9AFB7", "oracle": "#009E73"}
HINT = "pictures need matplotlib, which is not installed; run: pip install 'funnelrec[plots]'"


@dataclass(frozen=True)
class Bar:
    """One bar: what it is called, its value with interval, and what it is."""

    label: str
    value: Interval
    role: Role = "model"


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


def bars(title: str, subtitle: str, panels: Mapping[str, Sequence[Bar]], *, unit: str = "") -> Figure:
    """Horizontal bars from zero, one panel a metric, the value and its 95 % half-interval written at each bar.

    All panels name the same things in the same order.
    """
    labels = [bar.label for bar in next(iter(panels.values()))]
    roles = {bar.role for panel in panels.values() for bar in panel}
    top, height = 0.98, 0.36 * len(labels) + 1.5
    figure = _figure(2.0 + 3.5 * len(panels), height)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    left = min(0.12 * max(map(len, labels)) + 0.25, 2.8) / figure.get_figwidth()
    figure.subplots_adjust(left=left, right=0.985, top=1 - top / height, bottom=0.42 / height, wspace=0.1)
    for place, (axis, (name, panel)) in enumerate(zip(axes, panels.items(), strict=True)):
        _bar_panel(axis, name, panel, unit)
        axis.set_yticks(range(len(labels)), labels if place == 0 else [""] * len(labels), color=INK, fontsize=10)
    _heading(figure, title, subtitle)
    _legend(figure, [role for role in ("model", "baseline", "oracle") if role in roles and len(roles) > 1])
    return figure


def _bar_panel(axis: Axes, name: str, panel: Sequence[Bar], unit: str) -> None:
    longest = max((bar.value.high for bar in panel if np.isfinite(bar.value.high)), default=1.0) or 1.0
    for y, bar in enumerate(panel):
        value = bar.value
        if not np.isfinite(value.mean):
            axis.text(0.01 * longest, y, "not defined", va="center", fontsize=9, color=QUIET)
            continue
        axis.barh(y, value.mean, height=0.62, color=COLOURS[bar.role], linewidth=0)
        axis.plot([value.low, value.high], [y, y], color=INK, linewidth=1.3, solid_capstyle="butt")
        digits = 4 if longest < 1.5 else 2
        text = f"{value.mean:.{digits}f}{unit}"
        edge = max(value.high, value.mean) + 0.025 * longest
        axis.text(edge, y, text, va="center", fontsize=9.5, color=INK, fontweight="bold")
        axis.annotate(
            f"±{value.half:.{digits}f}",
            (edge, y),
            xytext=(6.6 * len(text) + 4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=QUIET,
        )
    axis.set_title(name, loc="left", fontsize=10.5, color=INK, pad=6)
    axis.set_xlim(0, longest * 1.62)
    axis.set_ylim(len(panel) - 0.45, -0.55)
    axis.set_xticks([])
    axis.tick_params(length=0)
    for side in ("top", "right", "bottom"):
        axis.spines[side].set_visible(False)
    axis.spines["left"].set_color(QUIET)


def reliability_diagram(title: str, diagrams: Mapping[str, Reliability]) -> Figure:
    """One small panel a model: observed rate against predicted probability, in %; on the diagonal they agree.

    Whiskers are 95 % intervals of the observed rate of each bin.
    """
    columns = min(len(diagrams), 4)
    lines = -(-len(diagrams) // columns)
    figure = _figure(0.9 + 2.6 * columns, 1.15 + 2.75 * lines)
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    figure.subplots_adjust(
        left=0.75 / figure.get_figwidth(),
        right=1 - 0.2 / figure.get_figwidth(),
        top=1 - 1.25 / figure.get_figheight(),
        bottom=0.62 / figure.get_figheight(),
        wspace=0.12,
        hspace=0.32,
    )
    highest = max(max(d.predicted.max(), d.observed.max()) for d in diagrams.values())
    limit = 100 * min(1.0, float(highest) * 1.08 + 1e-9)
    for axis in axes.flat[len(diagrams) :]:
        axis.set_visible(False)
    for axis, (name, diagram) in zip(axes.flat, diagrams.items(), strict=False):
        _reliability_panel(axis, name, diagram, limit)
    for axis in axes[:, 0]:
        axis.set_ylabel("observed rate, %", fontsize=9, color=QUIET)
    figure.supxlabel("predicted probability, %", fontsize=9, color=QUIET, y=0.12 / figure.get_figheight())
    _heading(figure, title, "bins of equally many rows; on the dashed line the predicted rate is the observed rate")
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
    axis.set_xlim(0, limit)
    axis.set_ylim(0, limit)
    axis.set_aspect("equal")
    _plain(axis)


def curve(title: str, subtitle: str, points: Sequence[CurvePoint], *, diversity: str, accuracy: str) -> Figure:
    """Accuracy (up) against diversity (right), one labelled point a setting, joined in the order given."""
    figure = _figure(6.4, 4.4)
    axis = figure.subplots()
    figure.subplots_adjust(left=0.13, right=0.96, top=0.8, bottom=0.14)
    x, y = [p.diversity for p in points], [p.accuracy for p in points]
    axis.plot(x, y, color=COLOURS["model"], linewidth=1.6, marker="o", markersize=6, zorder=3)
    for point in points:
        if point.interval is not None:
            axis.plot([point.diversity] * 2, [point.interval.low, point.interval.high], color=QUIET, linewidth=1)
        axis.annotate(
            point.label,
            (point.diversity, point.accuracy),
            xytext=(7, 7),
            textcoords="offset points",
            fontsize=9.5,
            color=INK,
        )
    axis.set_xlabel(diversity, fontsize=9.5, color=QUIET)
    axis.set_ylabel(accuracy, fontsize=9.5, color=QUIET)
    axis.margins(0.12, 0.15)
    _plain(axis)
    _heading(figure, title, subtitle)
    return figure


def save(figure: Figure, folder: Path, name: str) -> tuple[Path, Path]:
    """Write `name`.png (160 dots an inch) and `name`.svg, the same bytes for the same figure; returns both paths."""
    import matplotlib

    paths = (folder / f"{name}.png", folder / f"{name}.svg")
    with matplotlib.rc_context({"svg.hashsalt": "funnelrec"}):
        for path, kind, metadata in zip(paths, ("png", "svg"), ({"Software": None}, {"Date": None}), strict=True):
            part = path.with_name(path.name + ".part")
            keep: dict[str, Any] = {"metadata": metadata, "facecolor": "white"}
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
        x += 0.4 + 0.085 * len(role)


def _plain(axis: Axes) -> None:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(RULE)
    axis.tick_params(length=0, labelsize=8.5, labelcolor=QUIET)
    axis.grid(color=RULE, linewidth=0.5)
    axis.set_axisbelow(True)
