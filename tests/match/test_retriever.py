"""VectorRetriever: model, index and fallback together."""

from __future__ import annotations

import torch

from funnelrec.core.batch import Batch
from funnelrec.core.contracts import Matcher, VectorMatcher
from funnelrec.core.schema import Spec
from funnelrec.match.comirec_sa import ComiRecSA
from funnelrec.match.index.exact import ExactIndex
from funnelrec.match.popularity import Popularity
from funnelrec.match.retriever import VectorRetriever, item_vectors
from funnelrec.match.sasrec import SASRec

SPEC = Spec(num_users=9, num_items=20)


def batch(*histories: list[int]) -> Batch:
    rows = torch.tensor([[0] * (4 - len(h)) + h for h in histories])
    return Batch(history=rows, mask=rows != 0)


def fallback() -> Popularity:
    model = Popularity(SPEC)
    model.scores = torch.arange(20).float()  # row 19 is the most popular
    return model


def test_scores_are_the_models_and_users_without_history_get_the_fallback() -> None:
    model = ComiRecSA(SPEC, embedding_dim=8)
    vectors = item_vectors(model, 20)
    retriever = VectorRetriever(model, ExactIndex(vectors), fallback())
    assert isinstance(retriever, Matcher)
    assert isinstance(model, VectorMatcher)
    data = batch([3, 4], [], [1], [5])
    exclude = torch.tensor([[3, 4], [19, 0], [0, 0], [5, 0]])
    allowed = torch.ones(20, dtype=torch.bool)
    allowed[17] = False
    rows, scores = retriever.recommend(data, 3, exclude, allowed)
    assert rows[1].tolist() == [18, 16, 15]
    assert rows[2].tolist() == [19, 18, 16]
    interests, _ = model.encode_users(data)
    for user in (0, 3):
        own = (interests[user] @ vectors.T).amax(0)
        torch.testing.assert_close(scores[user], own[rows[user]])
        assert not set(rows[user].tolist()) & {0, 1, 17, *exclude[user].tolist()}
    lonely, nothing = VectorRetriever(model, ExactIndex(vectors)).recommend(data, 3)
    assert lonely[1].tolist() == [0, 0, 0]
    assert (nothing[1] == -torch.inf).all()


def test_dropout_is_off_while_answering_and_training_goes_on_after() -> None:
    model = SASRec(SPEC, embedding_dim=8, dropout=0.5).train()
    retriever = VectorRetriever(model, ExactIndex(item_vectors(model, 20)))
    first, again = (retriever.recommend(batch([3, 4, 5]), 5)[1] for _ in range(2))
    assert torch.equal(first, again)
    assert model.training
    assert all(block.training for block in model.blocks)
