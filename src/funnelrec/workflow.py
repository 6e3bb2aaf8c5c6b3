"""Workflow: from a dataset to a funnel and its report, in the steps that `funnelrec fit` and `funnelrec demo` share.

    dataset = Dataset.build(tables, folder)
    match = train_matcher(dataset, Choice.parse("comirec_sa"), Training(), folder)
    rank = train_ranker(dataset, Choice.parse("din"), Training(), folder)
    funnel = Funnel.build(dataset, matcher=match, ranker=rank, reranker=...)
    stages = evaluate_stages(funnel, dataset)

Each step is a function of its arguments; a model that was trained before (a checkpoint in `folder`) is resumed, so a
run that was killed goes on where it was.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from funnelrec import zoo
from funnelrec.core.batch import Batch
from funnelrec.core.contracts import Reranker, VectorMatcher
from funnelrec.core.nn.content import content_tables
from funnelrec.core.nn.embedding import Table
from funnelrec.core.shapes import FIRST_KNOWN
from funnelrec.data.batches import Batches
from funnelrec.data.dataset import Dataset
from funnelrec.data.examples import Impressions, NextItem, Queries
from funnelrec.data.split import Part
from funnelrec.encode.item.content import ContentEncoder
from funnelrec.evaluate.maps import item_map
from funnelrec.evaluate.protocol import MatchResult, RankResult, evaluate_matcher, evaluate_ranker
from funnelrec.evaluate.significance import bootstrap_interval
from funnelrec.learn.fit import FitResult, fit
from funnelrec.learn.losses import BCE, FullSoftmax, Loss, SampledSoftmax
from funnelrec.learn.samplers import Popularity
from funnelrec.learn.schedules import Cosine
from funnelrec.match.popularity import Popularity as RecentlyPopular
from funnelrec.serve.funnel import FALLBACK_HALF_LIFE, Funnel, retriever_of
from funnelrec.serve.pipeline import Pipeline

__all__ = [
    "Choice",
    "Training",
    "evaluate_matchers",
    "evaluate_rankers",
    "evaluate_stages",
    "holds_impressions",
    "learn_content",
    "match_loss",
    "train_fallback",
    "train_matcher",
    "train_ranker",
]

LARGEST_FULL_SOFTMAX = 50_000  #: items; above it the catalogue is sampled
SAMPLED_NEGATIVES = 1_024
NEWEST = 200_000  #: events that a ranker learns from, and is tested on, where negatives have to be drawn for each
NEGATIVES = 4  #: sampled items for each event, where the log holds no impressions that were passed over
VALIDATION_USERS = 10_000


@dataclass(frozen=True)
class Choice:
    """A model of the zoo and the arguments that differ from its defaults, e.g. "sasrec(dropout=0.2, max_len=100)"."""

    name: str  #: "match/sasrec"
    config: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str, stage: str) -> Choice:
        """Read what a person wrote. Only numbers, words, booleans and tuples of them are accepted as arguments."""
        wrong = ValueError(f"a model is written sasrec or sasrec(dropout=0.2), received {text!r}")
        try:
            node = ast.parse(text.strip().removeprefix(f"{stage}/"), mode="eval").body
        except SyntaxError:
            raise wrong from None
        arguments: dict[str, Any] = {}
        if isinstance(node, ast.Call) and not node.args and all(k.arg is not None for k in node.keywords):
            try:
                arguments = {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
            except ValueError:
                raise wrong from None
            node = node.func
        if not isinstance(node, ast.Name):
            raise wrong
        name = f"{stage}/{node.id}"
        known = inspect.signature(zoo.load(name)).parameters
        for argument in arguments:
            if argument not in known or argument == "spec":
                names = ", ".join(p for p in known if p != "spec")
                raise ValueError(f"{node.id} has no argument '{argument}'; it has {names or 'none'}")
        return cls(name, arguments)

    @property
    def label(self) -> str:
        """The name in tables."""
        return self.name.rpartition("/")[2]

    def build(self, spec: Any, *, seed: int, **defaults: Any) -> Any:
        """The model, with weights drawn from `seed`. `defaults` are arguments that hold where it takes them and the
        choice does not say otherwise."""
        model = zoo.load(self.name)
        takes = inspect.signature(model).parameters
        config = {**{k: v for k, v in defaults.items() if k in takes}, **self.config}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return model(spec, **config) if "spec" in takes else model(**config)


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How to train. What is None is chosen by the kind of model (`train_matcher`, `train_ranker`).

    resume: go on with the run that the folder holds; False begins anew.
    schedule: of the learning rate; "cosine" warms up for two epochs (a tenth of a short run) and falls to 0.
    """

    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    patience: int | None = None
    schedule: Literal["constant", "cosine"] | None = None
    max_len: int = 50
    weight_decay: float = 0.0
    seed: int = 0
    progress: bool = True
    resume: bool = True

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "patience", "max_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, received {value}")
        if self.lr is not None and not self.lr > 0:
            raise ValueError(f"lr must be positive, received {self.lr}")

    def filled(self, **defaults: Any) -> Training:
        """The same with `defaults` where nothing was said."""
        missing = {k: v for k, v in defaults.items() if getattr(self, k) is None}
        return dataclasses.replace(self, **missing)


# --------------------------------------------------------------------------------------------------------- match
def learn_content(dataset: Dataset) -> ContentEncoder:
    """What makes vectors of the items' texts, categories and vectors, from the items of the training part."""
    known = torch.from_numpy(dataset.train_item_counts > 0).nonzero().squeeze(1)
    return ContentEncoder.learn(dataset.catalogue[known.numpy()], dataset.schema.items)


def train_matcher(
    dataset: Dataset,
    choice: Choice,
    training: Training,
    folder: Path | None = None,
    content: ContentEncoder | None = None,
) -> tuple[nn.Module, FitResult | None]:
    """A matcher trained on the training part; NDCG@10 on the validation part chooses the epoch.

    Models that count (popularity, item-CF) are fitted in one pass. Sequence models learn at every position, with a
    learning rate that warms up and falls along a cosine; others at one random cut of each user's
    history an epoch. The loss is the softmax over the catalogue, sampled above 50,000 items.
    With `content` the items' vectors are joined to their content, so that items which training never saw have one too.
    """
    spec = dataset.spec if content is None else dataclasses.replace(dataset.spec, content_dim=content.width)
    model: Any = choice.build(spec, seed=training.seed, max_len=training.max_len)
    if not hasattr(model, "encode_users"):
        model.fit(*dataset.taken("train"))
        return model, None
    if content is not None:
        warm = torch.from_numpy(dataset.train_item_counts > 0)
        for table in content_tables(model):
            table.set_content(content.encode(dataset.catalogue), warm)
    sequence = hasattr(model, "encode_positions")
    max_len = int(getattr(model, "max_len", training.max_len))
    training = training.filled(
        epochs=60 if sequence else 400,
        batch_size=128 if sequence else 256,
        lr=4e-3 if sequence else 5e-3,
        patience=20 if sequence else 25,
        schedule="cosine" if sequence else "constant",
    )
    examples = NextItem(dataset, "train", max_len=max_len, mode="all" if sequence else "cut")
    batches = Batches(examples, training.batch_size or 1, shuffle=True, seed=training.seed)
    result = _fit(
        model,
        batches,
        match_loss(model, dataset),
        training,
        validate=lambda: validation_metrics(model, dataset, max_len),
        metric="ndcg@10",
        folder=None if folder is None else folder / choice.label,
    )
    for table in content_tables(model):
        table.calibrate()
    return model, result


def match_loss(model: nn.Module, dataset: Dataset, largest: int = LARGEST_FULL_SOFTMAX) -> Loss:
    """The softmax over the whole catalogue up to `largest` items, above that over a sample by popularity.

    Sets the model's tables to the kind of gradient that suits the loss: where every row gets one, a dense one is
    cheaper.
    """
    full = dataset.spec.num_items <= largest
    for module in model.modules():
        if isinstance(module, Table):
            module.dense = full
    if full and content_tables(model):  # items that nobody took yet are no negatives: they are to be found one day
        return FullSoftmax(classes=torch.from_numpy(dataset.train_item_counts).nonzero().squeeze(1))
    if full:
        return FullSoftmax()
    return SampledSoftmax(
        SAMPLED_NEGATIVES, sampler=Popularity(torch.from_numpy(dataset.train_item_counts), alpha=0.75)
    )


def validation_metrics(model: VectorMatcher, dataset: Dataset, max_len: int) -> dict[str, float]:
    """Recall and NDCG of a vector matcher on (a sample of) the users of the validation part."""
    queries = _Sample(Queries(dataset, "valid", max_len=max_len), VALIDATION_USERS)
    if len(queries) == 0:
        raise ValueError("no user has a positive event in the validation part; choose another split or more data")
    return evaluate_matcher(retriever_of(model, None, dataset.spec.num_items)[0], queries, ks=(10, 50)).means


class _Sample:
    """At most `size` queries, evenly spaced."""

    def __init__(self, queries: Queries, size: int) -> None:
        self.queries = queries
        self._chosen = torch.linspace(0, len(queries) - 1, min(size, len(queries))).round().long()
        offsets, items = queries.relevant
        chosen = self._chosen.numpy()
        own = [items[offsets[i] : offsets[i + 1]] for i in chosen] if len(chosen) < len(queries) else [items]
        counts = np.diff(offsets)[chosen]
        self.relevant = (np.concatenate([[0], counts.cumsum()]), np.concatenate(own) if own else items[:0])

    def __len__(self) -> int:
        return len(self._chosen)

    def gather(self, index: Tensor) -> Batch:
        return self.queries.gather(self._chosen[index])

    def seen(self, index: Tensor) -> Tensor:
        return self.queries.seen(self._chosen[index])


def train_fallback(dataset: Dataset) -> RecentlyPopular:
    """What was popular at the end of the training part: the answer for people of whom nothing is known.

    A saved funnel falls back on all events; an evaluation must not know those it asks about.
    """
    return RecentlyPopular(dataset.spec, half_life=FALLBACK_HALF_LIFE).fit(*dataset.taken("train"))


def evaluate_matchers(
    models: Mapping[str, Any],
    dataset: Dataset,
    *,
    part: Part = "test",
    ks: Sequence[int] = (10, 50),
    attribute: str | None = None,
) -> dict[str, MatchResult]:
    """Every matcher on the same queries: the whole catalogue, items seen before left out.

    A model with vectors answers people of whom it knows nothing with `train_fallback`.
    """
    queries = Queries(dataset, part, max_len=max(int(getattr(m, "max_len", 1)) for m in models.values()))
    fallback = train_fallback(dataset)
    return {
        name: evaluate_matcher(
            retriever_of(model, fallback, dataset.spec.num_items)[0],
            queries,
            ks=ks,
            item_counts=dataset.train_item_counts,
            item_attribute=None if attribute is None else dataset.item_attribute(attribute),
        )
        for name, model in models.items()
    }


# ---------------------------------------------------------------------------------------------------------- rank
def holds_impressions(dataset: Dataset) -> bool:
    """True where the log says what was passed over; else negatives have to be drawn."""
    return bool((dataset.events.label < dataset.schema.positive).any())


def _impressions(dataset: Dataset, part: Part, model: nn.Module, max_len: int) -> Impressions:
    negatives = 0 if dataset.schema.is_rows or holds_impressions(dataset) else NEGATIVES
    length = max_len if getattr(model, "reads_history", False) else 0
    newest = NEWEST if negatives else None
    # uniform: negatives drawn by popularity teach a ranker to demote what is popular, and it then spoils the list that
    # the matcher hands it (docs/results.md)
    return Impressions(dataset, part, max_len=length, negatives=negatives, negative_sampling="uniform", newest=newest)


def train_ranker(
    dataset: Dataset, choice: Choice, training: Training, folder: Path | None = None
) -> tuple[nn.Module, FitResult]:
    """A ranker trained on the impressions by cross-entropy; AUC on the validation part chooses the epoch.

    Where the log holds only what was taken, each of the `NEWEST` events is set against `NEGATIVES` items drawn
    uniformly.
    """
    training = training.filled(epochs=20, batch_size=2048, lr=1e-3, patience=2, schedule="constant")
    model: Any = choice.build(dataset.spec, seed=training.seed)
    train = _impressions(dataset, "train", model, training.max_len)
    valid = Batches(_impressions(dataset, "valid", model, training.max_len), 8192, seed=training.seed)
    size = max(1, (training.batch_size or 1) // (1 + train.negatives))
    result = _fit(
        model,
        Batches(train, size, shuffle=True, seed=training.seed),
        BCE(),
        training,
        validate=lambda: evaluate_ranker(model, valid).means,
        metric="auc",
        folder=None if folder is None else folder / choice.label,
    )
    return model, result


def evaluate_rankers(
    models: Mapping[str, Any], dataset: Dataset, *, part: Part = "test", max_len: int = 50
) -> dict[str, RankResult]:
    """Every ranker on the same rows; drawn negatives are the same for all."""
    counts = None if dataset.schema.is_rows else dataset.train_item_counts
    return {
        name: evaluate_ranker(model, Batches(_impressions(dataset, part, model, max_len), 8192), item_counts=counts)
        for name, model in models.items()
    }


def _fit(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    training: Training,
    *,
    validate: Any,
    metric: str,
    folder: Path | None,
) -> FitResult:
    steps = len(batches) * (training.epochs or 1)
    wave = training.schedule == "cosine" and steps > 0  # without a batch `fit` says what is wrong
    return fit(
        model,
        batches,
        loss,
        epochs=training.epochs or 1,
        lr=training.lr or 1e-3,
        patience=training.patience,
        weight_decay=training.weight_decay,
        validate=validate,
        metric=metric,
        folder=folder,
        schedule=Cosine(steps, warmup=min(2 * len(batches), steps // 10)) if wave else None,
        seed=training.seed,
        progress=training.progress,
        resume=training.resume,
    )


# -------------------------------------------------------------------------------------------------------- stages
class _Stage:
    """A pipeline, or the first stages of one, as a matcher that `evaluate_matcher` can ask."""

    def __init__(self, pipeline: Pipeline, reranker: Reranker | None) -> None:
        self.pipeline = pipeline
        self.reranker = reranker

    def recommend(
        self, batch: Batch, k: int, exclude: Tensor | None = None, allowed: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The pipeline's rows and the scores they were ordered by."""
        ranked = self.pipeline.run(batch, k, exclude=exclude, allowed=allowed, reranker=self.reranker)
        return ranked.rows, ranked.scores


def evaluate_stages(
    funnel: Funnel, dataset: Dataset, *, part: Part = "test", ks: Sequence[int] = (10, 50)
) -> dict[str, MatchResult]:
    """The funnel as it grows: match, then + rank, then + rerank, on the same queries."""
    whole = funnel.pipeline_with(train_fallback(dataset))
    pipelines: dict[str, tuple[Pipeline, Reranker | None]] = {"match": (whole.without_ranker(), None)}
    if funnel.ranker is not None:
        pipelines["match → rank"] = (whole, None)
    if funnel.reranker is not None:
        pipelines[" → ".join([*list(pipelines)[-1:], "rerank"])] = (whole, funnel.reranker)
    queries = Queries(dataset, part, max_len=funnel.store.history_length(funnel.pipeline.max_len))
    attribute = None if funnel.diversity_field is None else dataset.item_attribute(funnel.diversity_field)
    return {
        name: evaluate_matcher(
            _Stage(*pipeline),
            queries,
            ks=ks,
            batch_size=256,
            ties="as_ranked",
            item_counts=dataset.train_item_counts,
            item_attribute=attribute,
        )
        for name, pipeline in pipelines.items()
    }


def stage_figures(stages: Mapping[str, MatchResult]) -> dict[str, dict[str, Any]]:
    """What the artifact tells of each stage: its means, `users`, and the 95 % `intervals` of recall and NDCG."""
    return {
        name: {
            **result.means,
            "users": int(result.user.size),
            "intervals": {
                metric: [interval.low, interval.high]
                for metric, values in result.metrics.items()
                if metric.startswith(("recall@", "ndcg@"))
                for interval in [bootstrap_interval(values)]
            },
        }
        for name, result in stages.items()
    }


def item_places(funnel: Funnel, dataset: Dataset, *, seed: int = 0) -> Float[Tensor, "N 2"] | None:
    """Where the items lie on a map by t-SNE of the matcher's vectors, for `Funnel.item_map`.

    NaN for the rows without an item and for items that training never saw: their vectors mean nothing yet. None for a
    matcher without vectors.
    """
    vectors = funnel.pipeline.vectors
    known = torch.from_numpy(dataset.train_item_counts > 0) & vectors.any(dim=1)
    known[:FIRST_KNOWN] = False
    if not known.any():
        return None
    places = torch.full((len(vectors), 2), torch.nan)
    places[known] = torch.from_numpy(item_map(vectors[known].numpy(), seed=seed))
    return places
