"""Neighbours: like items and like people, from vectors and from what counting matchers know."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from funnelrec.core.contracts import VectorMatcher
from funnelrec.data.dataset import Dataset
from funnelrec.learn.calibration import Temperature
from funnelrec.match.item2vec import Item2Vec
from funnelrec.match.item_cf import ItemCF
from funnelrec.match.popularity import Popularity
from funnelrec.match.user_cf import UserCF
from funnelrec.serve.funnel import Funnel
from funnelrec.serve.request import RequestError
from tests.serve.funnels import small_dataset, small_funnel


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return small_dataset(tmp_path_factory.mktemp("data") / "d")


@pytest.fixture(scope="module")
def funnel(dataset: Dataset) -> Funnel:
    return small_funnel(dataset)


def counting(dataset: Dataset, matcher: ItemCF | UserCF | Item2Vec | Popularity) -> Funnel:
    return Funnel.build(dataset, matcher=matcher.fit(*dataset.taken("train")))


def test_items_by_cosine(funnel: Funnel) -> None:
    answer = funnel.similar(105, k=5)
    matcher = funnel.matcher
    assert isinstance(matcher, VectorMatcher)
    vectors = matcher.encode_items(torch.arange(funnel.store.spec.num_items)).detach()
    row = int(funnel.store.item_rows([[105]])[0])
    cosines = torch.nn.functional.cosine_similarity(vectors, vectors[row].unsqueeze(0), dim=1)
    cosines[[0, 1, row]] = -2
    best = cosines.topk(5)
    assert answer.ids == funnel.store.catalogue["item"].gather(best.indices.numpy()).to_list()
    assert [r.score for r in answer.items] == pytest.approx(best.values.tolist(), abs=1e-6)
    assert [r.match_place for r in answer.items] == [0, 1, 2, 3, 4]
    assert answer.items[0].attributes["title"] == f"Item {answer.ids[0] - 100}"
    assert answer.fallback is None


def test_like_items_pass_the_filters(funnel: Funnel) -> None:
    answer = funnel.similar("105", k=40, filters={"kind": "red"})
    assert {r.attributes["kind"] for r in answer.items} == {"red"}
    # 14 of 40 are red; 105 itself is not one of them
    assert len(answer.items) == 14


def test_a_calibration_is_of_logits_and_not_of_cosines(dataset: Dataset) -> None:
    whole = small_funnel(dataset)
    calibrated = Funnel(
        whole.store,
        matcher=whole.matcher,
        fallback=whole.fallback,
        ranker=whole.ranker,
        calibration=Temperature(temperature=1.0),
        max_len=20,
    )
    assert calibrated.recommend("u03").items[0].probability is not None
    assert calibrated.similar(105).items[0].probability is None


def test_people_by_their_closest_interests(funnel: Funnel) -> None:
    found = funnel.similar_users("u03", k=4)
    store = funnel.store
    everybody = torch.arange(store.people.size)
    batch = funnel.neighbours._histories(everybody)
    matcher = funnel.matcher
    assert isinstance(matcher, VectorMatcher)
    with torch.no_grad():
        interests, valid = matcher.encode_users(batch)
    asked = int(store.persons(["u03"]))
    expected = []
    for other in range(2, store.people.size):
        if other == asked or not bool(valid[other].any()):
            continue
        best = [
            max(float(torch.cosine_similarity(mine, theirs, dim=0)) for theirs in interests[other][valid[other]])
            for mine in interests[asked][valid[asked]]
        ]
        expected.append((-sum(best) / len(best), other))
    expected.sort()
    ids = store.people.decode(torch.tensor([o for _, o in expected[:4]]).numpy()).to_list()
    assert [f.user for f in found] == ids
    assert [f.score for f in found] == pytest.approx([-s for s, _ in expected[:4]], abs=1e-5)


def test_what_item_cf_knows(dataset: Dataset) -> None:
    funnel = counting(dataset, ItemCF(dataset.spec, num_neighbours=6))
    answer = funnel.similar(105, k=10)
    matcher = funnel.matcher
    assert isinstance(matcher, ItemCF)
    row = int(funnel.store.item_rows([[105]])[0])
    assert [r.score for r in answer.items] == pytest.approx(matcher.similarities[row].tolist())
    assert len(answer.items) == 6
    assert 105 not in answer.ids
    with pytest.raises(RequestError, match=r"ItemCF knows no similarity of users; .*--match sasrec or --match user_cf"):
        funnel.similar_users("u03")


def test_what_user_cf_knows(dataset: Dataset) -> None:
    funnel = counting(dataset, UserCF(dataset.spec))
    found = funnel.similar_users("u03", k=3)
    assert len({f.user for f in found} - {"u03"}) == 3
    assert 1 >= found[0].score >= found[1].score >= found[2].score > 0
    with pytest.raises(RequestError, match="UserCF knows no similarity of items"):
        funnel.similar(105)


def test_item2vec_and_an_item_that_training_never_saw(dataset: Dataset) -> None:
    matcher = Item2Vec(dataset.spec, embedding_dim=8)
    users, items, times = dataset.taken("train")
    row = int(dataset.taken("train")[1][0])
    kept = torch.as_tensor(items) != row
    matcher.fit(torch.as_tensor(users)[kept], torch.as_tensor(items)[kept], torch.as_tensor(times)[kept], epochs=2)
    funnel = Funnel.build(dataset, matcher=matcher)
    unseen = funnel.store.catalogue["item"][row]
    with pytest.raises(RequestError, match="training never saw this item"):
        funnel.similar(unseen)
    other = funnel.store.catalogue["item"][2 if row != 2 else 3]
    assert unseen not in funnel.similar(other, k=50).ids


def test_popularity_knows_nothing_of_the_kind(dataset: Dataset) -> None:
    with pytest.raises(RequestError, match=r"Popularity knows no similarity of items; .*--match sasrec or"):
        counting(dataset, Popularity(dataset.spec)).similar(105)


def test_refusals(funnel: Funnel) -> None:
    with pytest.raises(RequestError, match="no item has the id 999"):
        funnel.similar(999)
    with pytest.raises(RequestError, match="k must be a whole number from 1 to 1000, received 0"):
        funnel.similar(105, k=0)
    with pytest.raises(RequestError, match="no user has the id 'nobody'"):
        funnel.similar_users("nobody")


def test_the_same_after_saving(funnel: Funnel, tmp_path: Path) -> None:
    loaded = Funnel.load(funnel.save(tmp_path / "shop.funnel"))
    assert [dataclasses.astuple(r) for r in loaded.similar(105).items] == [
        dataclasses.astuple(r) for r in funnel.similar(105).items
    ]
    assert loaded.similar_users("u03") == funnel.similar_users("u03")
