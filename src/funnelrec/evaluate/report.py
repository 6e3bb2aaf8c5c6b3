"""A report: tables of models with intervals and tests, as Markdown, JSON and pictures.

Every table of models names its baselines, because a number alone says nothing: the last column tests each model
against the best of them on the same users, with the size of the effect. p values of one table are adjusted for the
number of tests in it (Holm). Results that answered different questions are refused.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from funnelrec.evaluate import plots
from funnelrec.evaluate.metrics import reliability
from funnelrec.evaluate.plots import Bar, CurvePoint, Panel
from funnelrec.evaluate.protocol import (
    MatchResult,
    RankResult,
    compare,
    compare_rankers,
    require_comparable,
)
from funnelrec.evaluate.significance import Interval, PairedAUC, PairedTest, auc_interval, bootstrap_interval, holm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Report", "Table"]

MEANING = {
    "recall": "share of the user's next items in the list",
    "ndcg": "the same, top places count more; 1 = ideal list",
    "hit_rate": "share of users with a hit in the list",
    "mrr": "mean of 1 / place of the first hit",
    "precision": "share of the list that the user went on to take",
    "average_precision": "mean precision at the hits",
    "auc": "pairs in the right order; bars start at chance, 0.5",
}


@dataclass(frozen=True)
class Table:
    """One table: `cells` are the Markdown texts, `rows` hold every figure in full for JSON."""

    title: str
    columns: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]
    rows: tuple[Mapping[str, Any], ...]
    note: str = ""

    def to_markdown(self) -> str:
        """Heading, table (numbers to the right), note."""
        line = "| " + " | ".join(self.columns) + " |"
        rule = "|---|" + "---:|" * (len(self.columns) - 1)
        body = ["| " + " | ".join(_escape(cell) for cell in row) + " |" for row in self.cells]
        return "\n".join([f"## {self.title}", "", line, rule, *body, *(["", self.note] if self.note else [])])


@dataclass(frozen=True)
class _Picture:
    """What to draw below a table; drawn only when the report is written."""

    name: str
    alt: str
    draw: Callable[[], Figure]


@dataclass
class Report:
    """Collects tables in the order they are added. `facts` are lines on the data: name, events, users, split, …"""

    title: str
    facts: Mapping[str, str | int | float] = field(default_factory=dict)
    _parts: list[tuple[Table, list[_Picture]]] = field(default_factory=list, repr=False)
    _used: set[str] = field(default_factory=set, repr=False)

    @property
    def tables(self) -> tuple[Table, ...]:
        """The tables so far."""
        return tuple(table for table, _ in self._parts)

    def match_table(
        self,
        results: Mapping[str, MatchResult],
        *,
        baselines: Sequence[str],
        ks: Sequence[int] | None = None,
        metrics: Sequence[str] = ("recall", "ndcg"),
        primary: str | None = None,
        oracle: str | None = None,
        title: str = "Match: finding candidates in the whole catalogue",
    ) -> Table:
        """Add a table of matchers: each metric ± half a 95 % interval over users, then coverage, novelty, diversity.

        `primary` ("ndcg@10": the first k by default) is the metric that is tested against the best of `baselines`.
        `oracle` names the row that knows the truth; it is no rival. Raises ValueError for no or unknown baselines.
        """
        require_comparable(results)
        columns, beyond, primary = _columns(results, ks, metrics, primary)
        best = _best_baseline(results, baselines, oracle, lambda r: r.means[primary])
        values = _intervals(results, columns)
        tests = {n: compare(r, results[best], primary) for n, r in results.items() if n not in (best, oracle)}
        adjusted = dict(zip(tests, holm([t.p_randomisation for t in tests.values()]), strict=True))
        top = {c: max((v[c].mean for n, v in values.items() if n != oracle), default=math.nan) for c in columns}
        cells, rows = [], []
        for name, result in results.items():
            figures = [_figure(v, bold=v.mean == top[c] and name != oracle) for c, v in values[name].items()]
            extra = [f"{result.beyond[b]:.3f}" for b in beyond]
            last = _test_text(name, best, oracle, tests.get(name), adjusted.get(name))
            cells.append((_label(name, baselines, oracle), *figures, *extra, last))
            rows.append(
                {"model": name, "role": _role(name, baselines, oracle), "users": result.user.size}
                | {"metrics": {c: _interval(v) for c, v in values[name].items()}, "means": result.means}
                | _versus(best, tests.get(name), adjusted.get(name))
                | {"seconds": result.seconds}
            )
        note = (
            f"{_population(results)} {_rules(results)} Last column: {primary} against the best baseline, "
            "randomisation test over users, p adjusted for several tests (Holm), d = difference / its deviation."
        )
        head = ("model", *columns, *beyond, f"{primary} − best baseline")
        picture = self._bars("match", title, results, values, columns[: len(metrics)], baselines, oracle)
        return self._add(Table(title, head, tuple(cells), tuple(rows), note), [picture])

    def rank_table(
        self,
        results: Mapping[str, RankResult],
        *,
        baselines: Sequence[str],
        oracle: str | None = None,
        bins: int = 15,
        title: str = "Rank: scoring what was shown",
    ) -> Table:
        """Add a table of rankers: AUC with interval, GAUC, log loss, normalised entropy, ECE, paired AUC difference."""
        require_comparable(results)
        best = _best_baseline(results, baselines, oracle, lambda r: r.means["auc"])
        areas = {name: auc_interval(r.labels, r.logits, r.user) for name, r in results.items()}
        tests = {n: compare_rankers(r, results[best]) for n, r in results.items() if n not in (best, oracle)}
        adjusted = dict(zip(tests, holm([t.p for t in tests.values()]), strict=True))
        others = [m for m in ("gauc", "log_loss", "normalised_entropy", "ece") if m in results[best].means]
        top = max(v.mean for n, v in areas.items() if n != oracle)
        cells, rows = [], []
        for name, result in results.items():
            figure = _figure(areas[name], bold=areas[name].mean == top and name != oracle)
            last = _test_text(name, best, oracle, tests.get(name), adjusted.get(name))
            cells.append((_label(name, baselines, oracle), figure, *(_number(result.means[m]) for m in others), last))
            rows.append(
                {"model": name, "role": _role(name, baselines, oracle), "rows": result.labels.size}
                | {"metrics": {"auc": _interval(areas[name])}, "means": dict(result.means)}
                | _versus(best, tests.get(name), adjusted.get(name))
                | {"seconds": result.seconds}
            )
        note = (
            f"{_population(results)} Log loss in nats; normalised entropy 1 = predicting the mean. "
            "Last column: AUC against the best baseline on the same rows, p adjusted for several tests (Holm)."
        )
        head = ("model", "auc", *others, "auc − best baseline")
        panels = {name: {"auc": area} for name, area in areas.items()}
        diagrams = {name: reliability(r.labels, r.probabilities, bins) for name, r in results.items()}
        pictures = [
            self._bars("rank", title, results, panels, ["auc"], baselines, oracle),
            _Picture(
                self._name("reliability"),
                "observed rate against predicted probability",
                lambda: plots.reliability_diagram("Are the predicted probabilities true?", diagrams),
            ),
        ]
        return self._add(Table(title, head, tuple(cells), tuple(rows), note), pictures)

    def stage_table(
        self,
        stages: Mapping[str, MatchResult],
        *,
        oracle: MatchResult | None = None,
        ks: Sequence[int] | None = None,
        metrics: Sequence[str] = ("recall", "ndcg"),
        primary: str | None = None,
        title: str = "The funnel, stage by stage",
    ) -> Table:
        """Add a table of the funnel as it grows (match, + rank, + rerank); each stage is tested against the one before.

        `oracle` is the result of a funnel that knows the truth: the row below which no stage can be expected.
        """
        results = dict(stages) | ({"oracle": oracle} if oracle is not None else {})
        require_comparable(results)
        columns, beyond, primary = _columns(results, ks, metrics, primary)
        values = _intervals(results, columns)
        tests = {b: compare(stages[b], stages[a], primary) for a, b in pairwise(stages)}
        cells, rows = [], []
        for name, result in results.items():
            test = tests.get(name)
            last = _change(test.difference, test.interval, test.p_randomisation) if test else "–"
            extra = [f"{result.beyond[b]:.3f}" for b in beyond]
            cells.append((name, *(_figure(v) for v in values[name].values()), *extra, last))
            rows.append(
                {"stage": name, "metrics": {c: _interval(v) for c, v in values[name].items()}, "means": result.means}
                | {"test_against_stage_before": _paired(test) if test else None}
                | {"share_of_oracle": None if oracle is None else result.means[primary] / oracle.means[primary]}
                | {"seconds": result.seconds}
            )
        note = f"{_population(results)} Last column: {primary} against the stage before, randomisation test over users."
        head = ("stage", *columns, *beyond, f"{primary} − stage before")
        known = "oracle" if oracle is not None else None
        picture = self._bars("stages", title, results, values, columns[: len(metrics)], (), known)
        return self._add(Table(title, head, tuple(cells), tuple(rows), note), [picture])

    def seed_table(
        self, runs: Mapping[str, Sequence[Mapping[str, float]]], *, metrics: Sequence[str], title: str
    ) -> Table:
        """Add a table of models trained over several seeds: mean ± standard deviation of each metric over its runs."""
        cells, rows = [], []
        for name, own in runs.items():
            found = {m: [run[m] for run in own] for m in metrics}
            spread = {m: statistics.stdev(v) if len(v) > 1 else None for m, v in found.items()}
            texts = [
                f"{statistics.mean(v):.4f}" + ("" if spread[m] is None else f" ± {spread[m]:.4f}")
                for m, v in found.items()
            ]
            cells.append((name, str(len(own)), *texts))
            rows.append({"model": name, "runs": found, "std": spread})
        note = "± standard deviation over the seeds, which differ in first weights and in the order of the examples."
        return self._add(Table(title, ("model", "seeds", *metrics), tuple(cells), tuple(rows), note), [])

    def slice_table(
        self, results: Mapping[str, MatchResult], *, metric: str | None = None, title: str = "Who is served how well"
    ) -> Table:
        """Add a table of one metric for all and in parts: users by history, targets seen in training or new."""
        require_comparable(results)
        first = next(iter(results.values()))
        metric = metric or f"ndcg@{first.ks[0]}"
        _require_measured([metric], first)
        parts = {name: {"overall": result.metrics, **result.slices()} for name, result in results.items()}
        cells, rows = [], []
        for part, measured in next(iter(parts.values())).items():
            users = measured[metric].size
            values = {name: bootstrap_interval(parts[name][part][metric]) for name in results}
            cells.append((part, f"{users:,}", *(_figure(v) for v in values.values())))
            rows.append({"part": part, "users": users, "metrics": {n: _interval(v) for n, v in values.items()}})
        note = f"{metric}, mean ± half of a 95 % bootstrap interval over the users of the part."
        return self._add(Table(title, ("part", "users", *results), tuple(cells), tuple(rows), note), [])

    def rank_slice_table(
        self, results: Mapping[str, RankResult], *, title: str = "Rank: known and new items"
    ) -> Table | None:
        """Add a table of AUC over all rows and over parts of them; none where the results have no parts."""
        require_comparable(results)
        first = next(iter(results.values()))
        every = {"overall": np.ones(first.labels.size, dtype=bool), **first.parts}
        # an area needs rows of both kinds
        parts = {name: part for name, part in every.items() if len(np.unique(first.labels[part])) == 2}
        if len(parts) < 2:
            return None
        cells, rows = [], []
        for name, part in parts.items():
            areas = {
                model: auc_interval(r.labels[part], r.logits[part], None if r.user is None else r.user[part])
                for model, r in results.items()
            }
            cells.append((name, f"{int(part.sum()):,}", *(_figure(v) for v in areas.values())))
            own = {model: _interval(v) for model, v in areas.items()}
            rows.append({"part": name, "rows": int(part.sum()), "metrics": own})
        note = "AUC, ± half of a 95 % interval over the rows of the part."
        return self._add(Table(title, ("part", "rows", *results), tuple(cells), tuple(rows), note), [])

    def curve(
        self,
        points: Sequence[CurvePoint],
        *,
        accuracy: str,
        diversity: str,
        title: str = "Accuracy against diversity",
        note: str = "each point is one setting of the diversity knob",
    ) -> Table:
        """Add the trade-off of a re-ranker's knob: a table and its curve. `accuracy`, `diversity`: axis names."""
        cells = tuple((p.label, f"{p.accuracy:.4f}", f"{p.diversity:.4f}") for p in points)
        rows = tuple({"setting": p.label, "accuracy": p.accuracy, "diversity": p.diversity} for p in points)
        picture = _Picture(
            self._name("curve"),
            f"{accuracy} against {diversity}",
            lambda: plots.curve(title, note, points, diversity=diversity, accuracy=accuracy),
        )
        return self._add(Table(title, ("setting", accuracy, diversity), cells, rows, note), [picture])

    # ------------------------------------------------------------------------------------------------- output
    def to_markdown(self, *, pictures: bool = False) -> str:
        """The report as GitHub Markdown, ending in a newline; with links to the pictures that `write` draws."""
        lines = [f"# {self.title}", ""]
        if self.facts:
            lines += [f"- {name}: {f'{v:,}' if isinstance(v, int) else v}" for name, v in self.facts.items()] + [""]
        for table, drawn in self._parts:
            lines += [table.to_markdown(), ""]
            if pictures:
                lines += [f"![{picture.alt}]({picture.name}.svg)\n" for picture in drawn]
        return "\n".join(lines).rstrip() + "\n"

    def to_json(self) -> str:
        """All figures as strict JSON: what is not a finite number is null."""
        tables = [
            {"title": t.title, "columns": t.columns, "rows": t.rows, "note": t.note, "cells": t.cells}
            for t in self.tables
        ]
        data = {"format": 1, "title": self.title, "facts": self.facts, "tables": tables}
        return json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def write(self, folder: Path | str, *, pictures: bool | None = None) -> Path:
        """Write report.md, report.json and each picture as PNG and SVG into `folder`; returns the path of report.md.

        `pictures`: None draws if matplotlib is installed and says so in report.md if it is not; True insists, raising
        ModuleNotFoundError with the way to install it; False draws nothing.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        draw = plots.installed() if pictures is None else pictures
        if draw:
            for _, drawn in self._parts:
                for picture in drawn:
                    plots.save(picture.draw(), folder, picture.name)
        text = self.to_markdown(pictures=draw)
        if pictures is None and not draw:
            text += f"\n(No pictures: {plots.HINT})\n"
        _replace(folder / "report.json", self.to_json())
        _replace(folder / "report.md", text)
        return folder / "report.md"

    def _add(self, table: Table, pictures: list[_Picture]) -> Table:
        self._parts.append((table, pictures))
        return table

    def _name(self, base: str) -> str:
        """A file name that this report has not used: match, match-2, …"""
        name, number = base, 1
        while name in self._used:
            number += 1
            name = f"{base}-{number}"
        self._used.add(name)
        return name

    def _bars(
        self,
        name: str,
        title: str,
        results: Mapping[str, MatchResult | RankResult],
        values: Mapping[str, Mapping[str, Interval]],
        columns: Sequence[str],
        baselines: Sequence[str],
        oracle: str | None,
    ) -> _Picture:
        panels = {}
        for c in columns:
            drawn = [Bar(n, v[c], _role(n, baselines, oracle)) for n, v in values.items()]
            panels[c] = Panel(MEANING.get(c.split("@", maxsplit=1)[0], ""), drawn, 0.5 if c == "auc" else 0.0)
        subtitle = f"{_population(results).split(';')[0]}; black lines are 95 % intervals"
        alt = f"{', '.join(columns)} of each line of the table above"
        return _Picture(self._name(name), alt, lambda: plots.bars(title, subtitle, panels))


# ------------------------------------------------------------------------------------------------------ helpers
def _columns(
    results: Mapping[str, MatchResult], ks: Sequence[int] | None, metrics: Sequence[str], primary: str | None
) -> tuple[list[str], list[str], str]:
    """(metric columns, numbers of the lists at the first k that all results have, the metric to be tested)."""
    first = next(iter(results.values()))
    ks = first.ks if ks is None else tuple(ks)
    primary = primary or f"ndcg@{ks[0]}"
    columns = [f"{metric}@{k}" for k in ks for metric in metrics]
    _require_measured([*columns, primary], first)
    shared = [b for b in first.beyond if all(b in r.beyond for r in results.values())]
    return columns, [b for b in shared if b.endswith(f"@{ks[0]}")], primary


def _intervals(results: Mapping[str, MatchResult], columns: Sequence[str]) -> dict[str, dict[str, Interval]]:
    return {name: {c: bootstrap_interval(r.metrics[c]) for c in columns} for name, r in results.items()}


def _population(results: Mapping[str, MatchResult | RankResult]) -> str:
    """One sentence on who or what was measured; the part before the semicolon goes below the picture's title."""
    first = next(iter(results.values()))
    if isinstance(first, MatchResult):
        return f"{first.user.size:,} users; mean ± half of a 95 % bootstrap interval over users."
    rate = 100 * float(first.labels.mean(dtype=np.float64))
    over = "rows" if first.user is None else f"{np.unique(first.user).size:,} users"
    return f"{first.labels.size:,} rows, {rate:.1f} % positive; AUC ± half of a 95 % interval over {over}."


def _rules(results: Mapping[str, MatchResult]) -> str:
    first = next(iter(results.values()))
    ties = "against the model" if first.ties == "conservative" else "as ranked"
    return f"Full-catalogue ranking, ties {ties}, items seen before {'left out' if first.exclude_seen else 'kept'}."


def _best_baseline(
    results: Mapping[str, Any], baselines: Sequence[str], oracle: str | None, value: Callable[[Any], float]
) -> str:
    unknown = [name for name in (*baselines, *([oracle] if oracle else [])) if name not in results]
    if unknown or not baselines:
        raise ValueError(
            f"a table needs baselines (and an oracle, if named) among its models {', '.join(results)}; received "
            f"{', '.join(unknown or baselines) or 'none'}; popularity or logistic regression is the least"
        )
    return max(baselines, key=lambda name: value(results[name]))


def _versus(best: str, test: PairedTest | PairedAUC | None, adjusted: float | None) -> dict[str, Any]:
    if test is None:
        return {"versus": None, "test": None}
    return {"versus": best, "test": _paired(test) | {"p_adjusted": adjusted}}


def _require_measured(wanted: Sequence[str], result: MatchResult) -> None:
    missing = [name for name in wanted if name not in result.metrics]
    if missing:
        raise ValueError(f"no metric '{missing[0]}'; these were measured: {', '.join(result.metrics)}")


def _role(name: str, baselines: Sequence[str], oracle: str | None) -> plots.Role:
    return "oracle" if name == oracle else "baseline" if name in baselines else "model"


def _label(name: str, baselines: Sequence[str], oracle: str | None) -> str:
    role = _role(name, baselines, oracle)
    return name if role == "model" or name == role else f"{name} ({role})"


def _figure(value: Interval, *, bold: bool = False) -> str:
    if not math.isfinite(value.mean):
        return "–"
    text = f"{value.mean:.4f}"
    return f"{f'**{text}**' if bold else text} ± {value.half:.4f}"


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "–"


def _p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _change(difference: float, interval: Interval, p: float) -> str:
    return f"{difference:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}], {_p(p)}".replace("-", "−")


def _test_text(name: str, best: str, oracle: str | None, test: PairedTest | PairedAUC | None, p: float | None) -> str:
    if name == best:
        return "best baseline"
    if test is None or p is None or name == oracle:
        return "–"
    text = _change(test.difference, test.interval, p)
    return f"{text}, d = {test.effect_size:.2f}".replace("-", "−") if isinstance(test, PairedTest) else text


def _interval(value: Interval) -> dict[str, float]:
    return {"mean": value.mean, "low": value.low, "high": value.high, "level": value.level}


def _paired(test: PairedTest | PairedAUC) -> dict[str, Any]:
    common = {"difference": test.difference, "interval": _interval(test.interval)}
    if isinstance(test, PairedAUC):
        return common | {"z": test.z, "p": test.p}
    return common | {
        "t": test.t,
        "p_t": test.p_t,
        "p_randomisation": test.p_randomisation,
        "effect_size": test.effect_size,
        "users": test.users,
    }


def _finite(value: Any) -> Any:
    """The same with plain Python numbers, and None for what is not finite."""
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, (np.integer, np.floating)):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _escape(cell: str) -> str:
    return re.sub(r"([|\n])", lambda found: "\\|" if found[1] == "|" else " ", cell)


def _replace(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
