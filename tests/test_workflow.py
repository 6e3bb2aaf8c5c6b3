"""The steps that fit and demo share: what people write is read strictly, training choices fit the kind of model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from funnelrec.core.schema import Schema, Spec
from funnelrec.data.dataset import Dataset
from funnelrec.data.sources import simulate
from funnelrec.data.split import LeaveLastOut
from funnelrec.data.tables import Tables
from funnelrec.learn.losses import FullSoftmax, SampledSoftmax
from funnelrec.match.sasrec import SASRec
from funnelrec.serve.funnel import Funnel
from funnelrec.workflow import (
    Choice,
    Training,
    evaluate_matchers,
    evaluate_rankers,
    holds_impressions,
    item_places,
    match_loss,
    train_matcher,
    train_ranker,
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return Dataset.build(simulate.load(users=300, items=120, events=24_000).tables, tmp_path_factory.mktemp("w") / "d")


@pytest.fixture(scope="module")
def taken_only(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The same log without what was passed over."""
    from dataclasses import replace

    import polars as pl

    tables = simulate.load(users=300, items=120, events=24_000).tables
    clicks = replace(tables, events=tables.events.filter(pl.col("click") == 1))
    return Dataset.build(clicks, tmp_path_factory.mktemp("w") / "d")


@pytest.mark.parametrize(
    ("text", "name", "config"),
    [
        ("sasrec", "match/sasrec", {}),
        (" sasrec(dropout=0.5, max_len=20) ", "match/sasrec", {"dropout": 0.5, "max_len": 20}),
        ("popularity(half_life=None)", "match/popularity", {"half_life": None}),
        ("match/sasrec(max_len=20)", "match/sasrec", {"max_len": 20}),  # as `funnelrec models` writes it
    ],
)
def test_a_choice_is_read_as_written(text: str, name: str, config: dict[str, object]) -> None:
    choice = Choice.parse(text, "match")
    assert (choice.name, dict(choice.config), choice.label) == (name, config, name.removeprefix("match/"))


@pytest.mark.parametrize(
    "text", ["", "sasrec(", "sasrec(0.5)", "__import__('os')", "sasrec(dropout=__import__('os'))", "a.b", "sasrec(**x)"]
)
def test_anything_but_names_and_plain_values_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"a model is written sasrec or sasrec\(dropout=0\.2\), received|no model"):
        Choice.parse(text, "match")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, received 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, received 0"),
        ({"patience": 0}, "patience must be at least 1, received 0"),
        ({"max_len": 0}, "max_len must be at least 1, received 0"),
        ({"lr": 0.0}, r"lr must be positive, received 0\.0"),
    ],
)
def test_a_setting_that_trains_nothing_is_refused_and_not_replaced(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Training(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["sasrec", "comirec_sa"])
def test_a_log_without_a_single_sequence_is_named(name: str, tmp_path: Path) -> None:
    import polars as pl

    events = pl.DataFrame({"user": range(50), "item": [i % 7 for i in range(50)], "time": range(50)})
    dataset = Dataset.build(Tables(events, Schema(user="user", item="item", time="time")), tmp_path / "d")
    with pytest.raises(ValueError, match="there is no batch to train on"):
        train_matcher(dataset, Choice(f"match/{name}"), Training(epochs=1, progress=False))


def test_recent_popularity_is_recent_also_in_the_legacy_split(tmp_path: Path) -> None:
    """There moments are ordinals, but a half-life is in days."""
    tables = simulate.load(users=100, items=80, events=6000).tables
    dataset = Dataset.build(tables, tmp_path / "d", split=LeaveLastOut())
    counts = [
        train_matcher(dataset, Choice("match/popularity", {"half_life": days}), Training())[0].scores  # type: ignore[attr-defined]
        for days in (None, 1.0, 1e9)
    ]
    assert torch.allclose(counts[0], counts[2])
    assert counts[1].sum() < 0.5 * counts[0].sum()


def test_a_choice_builds_the_same_weights_again_and_leaves_other_randomness_alone() -> None:
    spec = Spec(num_items=10)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    a, b = (Choice("match/sasrec", {"embedding_dim": 8}).build(spec, seed=3, max_len=5) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert a.max_len == 5
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    other = Choice("match/sasrec", {"embedding_dim": 8}).build(spec, seed=4, max_len=5)
    assert not torch.equal(other.items.weight, a.items.weight)


def test_a_large_catalogue_is_sampled(dataset: Dataset) -> None:
    model = SASRec(dataset.spec, embedding_dim=8)
    assert isinstance(match_loss(model, dataset, largest=10**6), FullSoftmax)
    assert model.items.dense
    assert isinstance(match_loss(model, dataset, largest=10), SampledSoftmax)
    assert not model.items.dense


def test_training_beats_popularity_and_chance(dataset: Dataset) -> None:
    training = Training(epochs=15, batch_size=32, lr=5e-3, max_len=20, progress=False)
    models = {
        name: train_matcher(dataset, Choice.parse(name, "match"), training)[0]
        for name in ("popularity", "item_cf", "sasrec(embedding_dim=16)")
    }
    recall = {name: r.means["recall@10"] for name, r in evaluate_matchers(models, dataset).items()}
    assert recall["sasrec(embedding_dim=16)"] > recall["popularity"]
    choice = Choice.parse("logistic_regression", "rank")
    ranker, result = train_ranker(dataset, choice, Training(epochs=8, lr=0.02, progress=False))
    assert result.best_metric is not None
    assert evaluate_rankers({"lr": ranker}, dataset)["lr"].means["auc"] > 0.55


def test_negatives_are_drawn_only_where_the_log_has_none(dataset: Dataset, taken_only: Dataset) -> None:
    assert holds_impressions(dataset)
    assert not holds_impressions(taken_only)
    training = Training(epochs=2, max_len=10, progress=False)
    ranker, _ = train_ranker(taken_only, Choice.parse("din(embedding_dim=4)", "rank"), training)
    result = evaluate_rankers({"din": ranker}, taken_only, max_len=10)["din"]
    assert result.labels.mean() == pytest.approx(0.2)  # one taken, four drawn
    known, new = result.parts["items seen in training"], result.parts["items new since training"]
    assert known.any()
    assert (known != new).all()


def test_a_run_goes_on_where_it_was(dataset: Dataset, tmp_path: Path) -> None:
    choice = Choice("match/sasrec", {"embedding_dim": 8})
    training = Training(epochs=2, max_len=10, progress=False)
    first, _ = train_matcher(dataset, choice, training, tmp_path)
    again, result = train_matcher(dataset, choice, training, tmp_path)
    assert result is not None
    assert all(torch.equal(x, y) for x, y in zip(first.parameters(), again.parameters(), strict=True))


def test_a_map_has_a_place_for_what_training_saw(dataset: Dataset) -> None:
    matcher, _ = train_matcher(dataset, Choice("match/sasrec"), Training(epochs=1, max_len=10, progress=False))
    funnel = Funnel.build(dataset, matcher=matcher, max_len=10)
    places = item_places(funnel, dataset)
    assert places is not None
    assert places.shape == (dataset.spec.num_items, 2)
    seen = torch.from_numpy(dataset.train_item_counts > 0)
    assert not seen[:2].any()
    assert torch.equal(places.isfinite().all(1), seen)
    assert float(places[seen].abs().max()) <= 1.0


def test_a_matcher_without_vectors_has_no_map(dataset: Dataset) -> None:
    matcher, _ = train_matcher(dataset, Choice("match/popularity"), Training())
    assert item_places(Funnel.build(dataset, matcher=matcher), dataset) is None
