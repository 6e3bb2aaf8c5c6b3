"""`funnelrec compare`: models side by side on one data set, each over several seeds."""

from __future__ import annotations

import dataclasses
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from funnelrec.cli import show
from funnelrec.cli.fit import MATCH_BASELINES, RANK_BASELINES, facts, parts, prepare_dataset, trained
from funnelrec.data.dataset import Dataset
from funnelrec.data.tables import Tables
from funnelrec.evaluate.report import Report
from funnelrec.workflow import (
    Choice,
    Training,
    evaluate_matchers,
    evaluate_rankers,
    train_matcher,
    train_ranker,
)

__all__ = ["compare", "named_choices"]


def named_choices(text: str, stage: str) -> dict[str, Choice]:
    """The models of `text` by what a person wrote, so that one model may stand there with several settings."""
    if text.strip().lower() in ("", "none"):
        return {}
    return {part.strip(): Choice.parse(part, stage) for part in parts(text)}


def compare(
    tables: Tables,
    out: Path,
    *,
    match: Mapping[str, Choice],
    rank: Mapping[str, Choice],
    seeds: int,
    training: Training,
    split: str = "time",
) -> Report:
    """Train every model of the plan and the baselines once for each seed, and write `out/report`.

    For each stage two tables: mean ± standard deviation over the seeds, and, with the run whose validation metric is
    the median of its model's, intervals over the test part and the paired test against the best baseline. Training goes
    on where it was: a run that is finished is read from `out/work`.
    """
    if not match and not rank:
        raise ValueError("there is nothing to compare; give --rank or --match names of `funnelrec models`")
    if seeds < 1:
        raise ValueError(f"seeds counts the runs of each model, at least 1, received {seeds}")
    if match and tables.schema.is_rows:
        raise ValueError("a plain table of rows has no users to find items for; compare rankers on it with --rank")
    show.tables(tables)
    dataset = prepare_dataset(tables, out / "work" / "dataset", split)
    show.dataset(dataset)
    report = Report(f"funnelrec compare: {tables.name}", {**facts(dataset, split), "seeds": seeds})

    def runs(choices: Mapping[str, Choice], train: Callable[..., Any], metric: str, stage: str) -> _Runs:
        return _Runs.of(choices, dataset, training, seeds, train, metric, out / "work" / stage)

    if match:
        matchers = runs({**MATCH_BASELINES, **match}, train_matcher, "ndcg@10", "match")
        each = matchers.measured(lambda models: evaluate_matchers(models, dataset))
        show.report_table(report.match_table(matchers.median(each), baselines=list(MATCH_BASELINES)))
        report.slice_table(matchers.median(each))
        metrics = ("recall@10", "ndcg@10", "recall@50", "ndcg@50")
        show.report_table(report.seed_table(_means(each), metrics=metrics, title="Match: over the seeds"))
    if rank:
        baselines = {**RANK_BASELINES, "fm": Choice("rank/fm")}
        rankers = runs({**baselines, **rank}, train_ranker, "auc", "rank")
        each = rankers.measured(lambda models: evaluate_rankers(models, dataset, max_len=training.max_len))
        show.report_table(report.rank_table(rankers.median(each), baselines=list(baselines)))
        report.rank_slice_table(rankers.median(each))
        metrics = ("auc", "log_loss", "normalised_entropy", "ece")
        show.report_table(report.seed_table(_means(each), metrics=metrics, title="Rank: over the seeds"))
    show.line(f"\ntables and pictures in {report.write(out / 'report')}")
    return report


@dataclasses.dataclass
class _Runs:
    """The trained models of one stage, a list over the seeds for each name; one run of what has nothing to learn."""

    models: dict[str, list[Any]]
    validated: dict[str, list[float]]

    @classmethod
    def of(
        cls,
        choices: Mapping[str, Choice],
        dataset: Dataset,
        training: Training,
        seeds: int,
        train: Callable[..., Any],
        metric: str,
        folder: Path,
    ) -> _Runs:
        """Train, or read what was trained."""
        runs = cls({}, {})
        for name, choice in choices.items():
            for seed in range(seeds):
                place = folder / re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-") / f"seed-{seed}"
                model, result = train(dataset, choice, dataclasses.replace(training, seed=seed), place)
                runs.models.setdefault(name, []).append(model)
                runs.validated.setdefault(name, []).append(0.0 if result is None else float(result.best_metric or 0.0))
                if result is None:  # counted, not learnt: every seed would give the same
                    break
                show.line(trained(f"{name}, seed {seed}", result, metric))
        return runs

    def measured(self, evaluate: Callable[[dict[str, Any]], Mapping[str, Any]]) -> dict[str, list[Any]]:
        """The results of every run, one model after the other so that few are held at a time."""
        return {name: [evaluate({name: model})[name] for model in models] for name, models in self.models.items()}

    def median(self, results: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """Of each model the run whose validation metric is the (lower) median."""
        return {
            name: own[self.validated[name].index(statistics.median_low(self.validated[name]))]
            for name, own in results.items()
        }


def _means(results: Mapping[str, Sequence[Any]]) -> dict[str, list[Mapping[str, float]]]:
    return {name: [result.means for result in own] for name, own in results.items()}
