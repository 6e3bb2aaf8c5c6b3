"""`funnelrec fit`: tables in, a funnel and its report out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from funnelrec.cli import show
from funnelrec.core.nn.content import content_tables
from funnelrec.core.schema import Category
from funnelrec.data.dataset import Dataset
from funnelrec.data.split import GlobalTime, LeaveLastOut, Ratio
from funnelrec.data.tables import Tables
from funnelrec.evaluate.protocol import MatchResult
from funnelrec.evaluate.report import Report
from funnelrec.serve.funnel import Funnel
from funnelrec.workflow import (
    Choice,
    Training,
    evaluate_matchers,
    evaluate_rankers,
    evaluate_stages,
    item_places,
    learn_content,
    stage_figures,
    train_matcher,
    train_ranker,
)

__all__ = ["Plan", "evaluate_folder", "facts", "fit_funnel", "parts", "prepare_dataset", "trained"]

SPLITS = {"time": GlobalTime, "legacy": LeaveLastOut, "ratio": Ratio}
MATCH_BASELINES = {
    "popularity": Choice("match/popularity"),
    "recent popularity": Choice("match/popularity", {"half_life": 7.0}),
    "item_cf": Choice("match/item_cf"),
}
RANK_BASELINES = {"logistic_regression": Choice("rank/logistic_regression")}


@dataclass(frozen=True)
class Plan:
    """Which models to train and how to join them. `item_map`: lay the items out for the page. `content`: join the
    items' vectors to what their texts, categories and vectors say, so that new items can be placed."""

    match: tuple[Choice, ...]
    rank: tuple[Choice, ...] = ()
    rerank: Choice | None = None
    diversity_field: str | None = None
    candidates: int = 500
    item_map: bool = False
    content: bool = False

    @classmethod
    def parse(
        cls,
        *,
        match: str,
        rank: str,
        rerank: str,
        diversity_field: str | None,
        candidates: int,
        item_map: bool = False,
        content: bool = False,
    ) -> Plan:
        """From the words of the command line: names with commas between, or "none"."""
        matchers = _choices(match, "match")
        if not matchers:
            raise ValueError("a funnel needs a matcher; give --match a name of `funnelrec models --stage match`")
        chosen = _choices(rerank, "rerank")
        if len(chosen) > 1:
            raise ValueError(f"a funnel has one reranker, received {rerank!r}")
        reranker = chosen[0] if chosen else None
        return cls(matchers, _choices(rank, "rank"), reranker, diversity_field, candidates, item_map, content)


def _choices(text: str, stage: str) -> tuple[Choice, ...]:
    if text.strip().lower() in ("", "none"):
        return ()
    choices = tuple(Choice.parse(part, stage) for part in parts(text))
    labels = [c.label for c in choices]
    twice = next((name for name in labels if labels.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} stands twice in {text!r}; fit the other one into a folder of its own")
    return choices


def parts(text: str) -> list[str]:
    """`text` cut at the commas that stand outside brackets."""
    depth, parts = 0, [""]
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def prepare_dataset(tables: Tables, folder: Path, split: str) -> Dataset:
    """The dataset of `tables` at `folder`."""
    if split not in SPLITS:
        raise ValueError(f"--split is one of {', '.join(SPLITS)}, received {split!r}")
    if tables.part is None and split == "time" and tables.schema.time is None:
        raise ValueError("--split time needs a column of times; name it as 'time' in a --schema, or give --split ratio")
    return Dataset.build(tables, folder, split=None if tables.part is not None else SPLITS[split]())


def fit_funnel(tables: Tables, out: Path, plan: Plan, training: Training, *, split: str = "time") -> Funnel:
    """Train what the plan names, compare it with the baselines on the test part, save the best as one funnel.

    `out` becomes the artifact; `out/report` holds tables and pictures, `out/work` the dataset and the checkpoints,
    which serving does not need. A run that was killed goes on where it was.
    """
    show.tables(tables)
    if tables.schema.is_rows:
        raise ValueError("a funnel needs users and items; for a plain table of rows see recipes/rank/frappe.py")
    dataset = prepare_dataset(tables, out / "work" / "dataset", split)
    show.dataset(dataset)
    field = _diversity_field(dataset, plan)
    report = Report(f"funnelrec fit: {tables.name}", facts(dataset, split))

    content = learn_content(dataset) if plan.content else None
    matchers = {name: train_matcher(dataset, c, training)[0] for name, c in MATCH_BASELINES.items()}
    best_on_validation: dict[str, float] = {}
    for choice in plan.match:
        model, result = train_matcher(dataset, choice, training, out / "work", content)
        matchers[choice.label] = model
        if result is not None:
            show.line(trained(choice.label, result, "ndcg@10"))
        if len(plan.match) > 1:
            measured = evaluate_matchers({choice.label: model}, dataset, part="valid", ks=(10,))
            best_on_validation[choice.label] = measured[choice.label].means["ndcg@10"]
    results = evaluate_matchers(matchers, dataset, attribute=field)
    show.report_table(report.match_table(results, baselines=list(MATCH_BASELINES)))
    report.slice_table(results)
    chosen = max(best_on_validation, key=best_on_validation.__getitem__, default=plan.match[0].label)

    ranker = _fit_rankers(dataset, plan, training, out, report)
    reranker = None if plan.rerank is None or field is None else plan.rerank.build(dataset.spec, seed=training.seed)
    funnel = Funnel.build(
        dataset,
        matcher=matchers[chosen],
        ranker=ranker,
        reranker=reranker,
        candidates=plan.candidates,
        max_len=training.max_len,
        diversity_field=field,
        content=content if content_tables(matchers[chosen]) else None,
    )
    stages = evaluate_stages(funnel, dataset)
    show.report_table(report.stage_table(stages))
    report.slice_table(stages, title="The funnel: who is served how well")
    funnel.metrics = stage_figures(stages)
    if plan.item_map:
        funnel.item_map = item_places(funnel, dataset, seed=training.seed)
    funnel.save(out)
    path = report.write(out / "report")
    show.line(f"\n{funnel} in {out}; tables and pictures in {path}")
    return funnel


def _fit_rankers(dataset: Dataset, plan: Plan, training: Training, out: Path, report: Report) -> Any:
    """The ranker that is best on the validation part, with a table of all; None when the plan names none."""
    if not plan.rank:
        return None
    rankers, best = {}, {}
    for name, choice in {**RANK_BASELINES, **{c.label: c for c in plan.rank}}.items():
        rankers[name], result = train_ranker(dataset, choice, training, out / "work")
        best[name] = float(result.best_metric or 0.0)
        show.line(trained(name, result, "auc"))
    results = evaluate_rankers(rankers, dataset, max_len=training.max_len)
    show.report_table(report.rank_table(results, baselines=list(RANK_BASELINES)))
    report.rank_slice_table(results)
    return rankers[max((c.label for c in plan.rank), key=best.__getitem__)]


def trained(name: str, result: Any, metric: str) -> str:
    """One line on a training run."""
    minutes = result.seconds / 60
    return (
        f"{name}: {len(result.history)} epochs in {minutes:.1f} min, best epoch {result.best_epoch}, "
        f"validation {metric} {'not measurable' if result.best_metric is None else f'{result.best_metric:.4f}'}"
    )


def _diversity_field(dataset: Dataset, plan: Plan) -> str | None:
    """The field named in the plan, else the first many-valued or smallest categorical field of the items."""
    fields = [f for f in dataset.schema.items if isinstance(f, Category)]
    if plan.diversity_field is not None:
        dataset.item_attribute(plan.diversity_field)  # raises for a field that is not there
        return plan.diversity_field
    sizes = {c.name: c.rows for c in dataset.spec.categories}
    return min(fields, key=lambda f: (not f.many, sizes[f.name])).name if fields else None


def facts(dataset: Dataset, split: str) -> dict[str, str | int | float]:
    """The lines at the top of a report: sizes, split, fingerprint."""
    protocols = {"time": "by global time", "legacy": "leave-last-out (legacy)", "ratio": "random rows"}
    return {
        "events": dataset.counts["events"],
        "users": dataset.spec.num_users - 2,
        "items": dataset.spec.num_items - 2,
        "split": protocols[split],
        **{f"{part} events": dataset.counts[part] for part in ("train", "valid", "test")},
        "fingerprint": dataset.fingerprint[:16],
        "date": time.strftime("%Y-%m-%d"),
    }


def evaluate_folder(folder: Path) -> Mapping[str, MatchResult]:
    """The stages of a saved funnel on the test part of its dataset, printed and returned."""
    funnel = Funnel.load(folder)
    dataset = Dataset.open(folder / "work" / "dataset")
    if dataset.fingerprint != funnel.store.fingerprint:
        raise ValueError(f"the dataset in {folder / 'work'} is not the one the funnel was fitted on; fit again")
    stages = evaluate_stages(funnel, dataset)
    report = Report(f"funnelrec evaluate: {folder}")
    show.report_table(report.stage_table(stages))
    show.report_table(report.slice_table(stages, title="The funnel: who is served how well"))
    return stages
