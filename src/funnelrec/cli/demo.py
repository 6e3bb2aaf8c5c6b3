"""`funnelrec demo`: the whole funnel on a world whose truth is known."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from funnelrec.cli import show
from funnelrec.cli.fit import MATCH_BASELINES, trained
from funnelrec.core.batch import Batch
from funnelrec.core.shapes import FIRST_KNOWN
from funnelrec.data.dataset import Dataset
from funnelrec.data.examples import Queries
from funnelrec.data.sources import simulate
from funnelrec.evaluate.protocol import RankResult, evaluate_matcher
from funnelrec.evaluate.report import Report
from funnelrec.match.index.topk import top_rows
from funnelrec.rerank.diversity import ControllableDiversity
from funnelrec.serve.funnel import Funnel
from funnelrec.workflow import (
    Choice,
    Training,
    evaluate_matchers,
    evaluate_rankers,
    evaluate_stages,
    item_places,
    stage_figures,
    train_matcher,
    train_ranker,
)

__all__ = ["run_demo"]

MAX_LEN = 30
MATCH = Choice("match/comirec_sa", {"embedding_dim": 32, "num_interests": 4})
MATCH_TRAINING = Training(epochs=40, lr=3e-3, max_len=MAX_LEN)
LR, FM = Choice("rank/logistic_regression"), Choice("rank/fm")
DIN = Choice(
    "rank/din",
    {"embedding_dim": 8, "hidden": [80, 40], "attention_hidden": [36], "softmax": True, "dropout": 0.3},
)
RANK = (  # each with what it needs: FM is a poor baseline when it is stopped early
    (LR, Training(epochs=5, lr=3e-3)),
    (FM, Training(epochs=15, lr=3e-3)),
    (DIN, Training(epochs=3, lr=2e-3, batch_size=1024, max_len=MAX_LEN)),
)
DIVERSITY = 0.02
SHOWN_USERS = 3


class _Oracle:
    """A matcher that knows the world: items in the order of the clicks to be expected of them."""

    def __init__(self, world: simulate.World, dataset: Dataset) -> None:
        self.world = world
        self.dataset = dataset

    def recommend(
        self, batch: Batch, k: int, exclude: Tensor | None = None, allowed: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Ranks every item by shown-and-clicked, which no model can do better on average."""
        users = self.dataset.user_vocabulary.decode(batch.user.numpy()).to_numpy()
        scores = torch.full((batch.size, self.dataset.spec.num_items), -torch.inf)
        items = self.dataset.item_vocabulary.decode(np.arange(FIRST_KNOWN, scores.shape[1])).to_numpy()
        expected = self.world.expected_clicks(users, batch.time.numpy())  # (B, items), by item id from 1
        scores[:, FIRST_KNOWN:] = torch.from_numpy(expected[:, items - 1]).float()
        if exclude is not None:
            scores.scatter_(1, exclude, -torch.inf)
        if allowed is not None:
            scores[:, ~allowed] = -torch.inf
        return top_rows(scores, k)


def run_demo(out: Path, *, seed: int, users: int, items: int, progress: bool) -> Funnel:
    """Build the world, train match and rank, compare them with baselines and truth, save the funnel at `out`."""
    began = time.monotonic()
    world = simulate.load(seed=seed, users=users, items=items, pictures=True)
    dataset = Dataset.build(world.tables, out / "work" / "dataset")
    show.line(
        f"a world of {users:,} people and {items:,} items: {len(dataset):,} impressions, "
        f"{dataset.counts['positives']:,} clicks"
    )
    common = {"seed": seed, "progress": progress}
    report = Report("funnelrec demo: the funnel held against the truth", {**dataset.counts, "seed": seed})
    matcher = _match(world, dataset, common, report)
    ranker = _rank(world, dataset, common, report)
    funnel = Funnel.build(
        dataset,
        matcher=matcher,
        ranker=ranker,
        reranker=ControllableDiversity(diversity=DIVERSITY),
        diversity_field="category",
        max_len=MAX_LEN,
    )
    stages = evaluate_stages(funnel, dataset)
    queries = Queries(dataset, "test", max_len=MAX_LEN)
    oracle = evaluate_matcher(
        _Oracle(world, dataset),
        queries,
        ties="as_ranked",
        item_counts=dataset.train_item_counts,
        item_attribute=dataset.item_attribute("category"),
    )
    show.report_table(report.stage_table(stages, oracle=oracle))
    report.slice_table(stages, title="The funnel: who is served how well")
    funnel.metrics = stage_figures(stages)
    funnel.item_map = item_places(funnel, dataset, seed=seed)
    funnel.save(out)
    report.write(out / "report")
    _recommendations(world, funnel)
    show.line(
        f"\n{funnel} in {out}; tables and pictures in {out / 'report'}. {time.monotonic() - began:.0f} s in all.\n"
        f"Try: funnelrec recommend {out} --history 3,14,15"
    )
    return funnel


def _match(world: simulate.World, dataset: Dataset, common: Mapping[str, Any], report: Report) -> Any:
    training = dataclasses.replace(MATCH_TRAINING, **common)
    models = {name: train_matcher(dataset, choice, training)[0] for name, choice in MATCH_BASELINES.items()}
    model, result = train_matcher(dataset, MATCH, training)
    show.line(trained(MATCH.label, result, "recall@50"))
    models[MATCH.label] = model
    results = evaluate_matchers({**models, "oracle": _Oracle(world, dataset)}, dataset, attribute="category")
    table = report.match_table(results, baselines=list(MATCH_BASELINES), primary="recall@50", oracle="oracle")
    show.report_table(table)
    ratio = results[MATCH.label].means["recall@50"] / results["popularity"].means["recall@50"]
    agreement = interest_agreement(world, dataset, model)
    show.line(f"recall@50 is {ratio:.2f} × popularity's.")
    show.line(
        f"Interests found against true interests: normalised mutual information {agreement.mean():.3f} "
        f"(mean of {len(agreement):,} people with several interests; a click counts for the interest of the largest "
        "product; 0 = unrelated, 1 = the same)."
    )
    return model


def interest_agreement(world: simulate.World, dataset: Dataset, model: Any) -> np.ndarray:
    """The agreement of a multi-interest model's interests with the true ones, a value a user (see World).

    A click of the history belongs to the found interest whose vector has the largest product with the item's.
    """
    queries = Queries(dataset, "test", max_len=MAX_LEN)
    batch = queries.gather(torch.arange(len(queries)))
    with torch.inference_mode():
        interests, _ = model.encode_users(batch)  # (B, K, D)
        vectors = model.encode_items(batch.history.flatten()).view(*batch.history.shape, -1)  # (B, L, D)
        found = torch.einsum("bkd,bld->blk", interests, vectors).argmax(dim=2)  # (B, L)
    mask = batch.mask
    person = queries.persons[:, None].expand_as(mask)[mask].numpy()
    return world.interest_agreement(
        dataset.people.decode(person).to_numpy(),
        dataset.item_vocabulary.decode(batch.history[mask].numpy()).to_numpy(),
        batch.history_times[mask].numpy(),
        found[mask].numpy(),
    )


def _rank(world: simulate.World, dataset: Dataset, common: Mapping[str, Any], report: Report) -> Any:
    models = {}
    for choice, training in RANK:
        models[choice.label], result = train_ranker(dataset, choice, dataclasses.replace(training, **common))
        show.line(trained(choice.label, result, "auc"))
    results = evaluate_rankers(models, dataset, max_len=MAX_LEN)
    results["oracle"] = _rank_oracle(world, dataset, results[DIN.label])
    show.report_table(report.rank_table(results, baselines=[LR.label, FM.label], oracle="oracle"))
    report.rank_slice_table(results)
    gap = results["oracle"].means["auc"] - results[DIN.label].means["auc"]
    show.line(f"DIN's AUC is {gap:.4f} below the oracle's, which knows the true click probabilities.")
    return models[DIN.label]


def _rank_oracle(world: simulate.World, dataset: Dataset, like: RankResult) -> RankResult:
    """The true click probabilities of the test impressions, as if a ranker had given them."""
    truth = world.click_probability[dataset.rows("test")]
    return RankResult.of(
        logits=np.log(truth / (1.0 - truth)).astype(np.float32),
        labels=like.labels,
        user=like.user,
        split=like.split,
    )


def _recommendations(world: simulate.World, funnel: Funnel) -> None:
    """Lists for a few people with different numbers of interests, beside what they truly like."""
    number = (world.interests.base > 0).sum(axis=1)
    chosen = [int(np.flatnonzero(number == n)[0]) + 1 for n in np.unique(number)][-SHOWN_USERS:]
    for user in chosen:
        likes = ", ".join(f"{name} {share:.0%}" for name, share in world.true_interests(user).items())
        show.line("")
        show.recommendation(funnel.recommend(user, k=8), title=f"Person {user}, who truly likes {likes}")
