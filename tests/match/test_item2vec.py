"""Item2Vec: what it recommends; how it is trained is tests/core/nn/test_skipgram.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from funnelrec.core.batch import Batch
from funnelrec.core.schema import Spec
from funnelrec.match import item2vec
from funnelrec.match.item2vec import Item2Vec

ITEMS = 24
SPEC = Spec(num_users=60, num_items=ITEMS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cliques(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """50 users who took 7 of the items 2..11 or of 12..21."""
    own = torch.rand(50, 10, generator=generator(seed)).argsort(1)[:, :7] + 2 + 10 * (torch.arange(50) % 2).view(-1, 1)
    return torch.arange(2, 52).repeat_interleave(7), own.flatten(), torch.arange(350)


def query(*histories: list[int], length: int = 6) -> Batch:
    rows = torch.tensor([[0] * (length - len(h)) + h for h in histories])
    return Batch(history=rows, mask=rows != 0)


@pytest.mark.parametrize("ordered", [False, True])
def test_items_of_a_clique_lie_together(ordered: bool) -> None:
    model = Item2Vec(SPEC, embedding_dim=8, ordered=ordered).fit(*cliques())
    cosine = model.encode_items(torch.arange(2, 22))
    cosine = cosine @ cosine.T
    same = torch.arange(20).view(-1, 1) // 10 == torch.arange(20) // 10
    assert cosine[same].min() > 0.7 > 0.5 > cosine[~same].max()
    assert model.losses[-1] < 0.7 * model.losses[0]
    rows, _ = model.recommend(query([3, 4], [13]), 5, torch.tensor([[3, 4], [13, 0]]))
    assert all(2 <= r <= 11 for r in rows[0].tolist())
    assert all(12 <= r <= 21 for r in rows[1].tolist())


def test_a_user_is_the_mean_of_directions_or_the_newest_one() -> None:
    model = Item2Vec(SPEC, embedding_dim=8).fit(*cliques())
    v = model.encode_items(torch.tensor([3, 4, 13]))
    torch.testing.assert_close(v.norm(dim=1), torch.ones(3))
    items = model.encode_items(torch.arange(ITEMS))
    for pooling, user in (("mean", F.normalize(v.mean(0), dim=0)), ("last", v[2])):
        model.pooling = pooling
        rows, scores = model.recommend(query([3, 4, 13]), 20)
        torch.testing.assert_close(scores[0], items[rows[0]] @ user)


def test_what_nobody_took_and_unknown_users_come_by_popularity() -> None:
    model = Item2Vec(SPEC, embedding_dim=8).fit(*cliques())
    assert not model.encode_items(torch.tensor([0, 1, 22, 23])).any()
    rows, scores = model.recommend(query([3, 22], [], [1, 23]), ITEMS - 2)
    assert rows[0, -2:].tolist() == [22, 23]
    assert (scores[0, -2:] == -2).all()
    assert torch.equal(rows[0], model.recommend(query([3]), ITEMS - 2)[0][0])
    for row in (1, 2):
        torch.testing.assert_close(scores[row], model.popularity[rows[row]] - 2)
        assert rows[row, 0] == model.popularity.argmax()


def test_the_same_seed_gives_the_same_bits() -> None:
    first = Item2Vec(SPEC, embedding_dim=8).fit(*cliques(), epochs=2)
    assert torch.equal(first.vectors, Item2Vec(SPEC, embedding_dim=8).fit(*cliques(), epochs=2).vectors)
    assert torch.equal(first.vectors, first.fit(*cliques(), epochs=2).vectors), "fit starts anew"
    assert not torch.equal(first.vectors, Item2Vec(SPEC, embedding_dim=8).fit(*cliques(), epochs=2, seed=1).vectors)
    nothing = torch.zeros(0, dtype=torch.int64)
    assert not first.fit(nothing, nothing, nothing).vectors.any()


def test_state_dict_carries_what_serving_needs() -> None:
    model = Item2Vec(SPEC, embedding_dim=8).fit(*cliques(), epochs=2)
    copy = Item2Vec(SPEC, embedding_dim=8)
    copy.load_state_dict(model.state_dict())
    assert torch.equal(copy.recommend(query([4, 5]), 9)[0], model.recommend(query([4, 5]), 9)[0])


def test_many_users_are_answered_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Item2Vec(SPEC, embedding_dim=8).fit(*cliques(), epochs=2)
    data = query(*[[2 + n % 9, 3 + n % 11] for n in range(40)])
    whole = model.recommend(data, 5)
    monkeypatch.setattr(item2vec, "CELLS_AT_ONCE", 1)
    parts = model.recommend(data, 5)
    torch.testing.assert_close(parts[1], whole[1])  # the two items of a history tie but for rounding
    assert model.recommend(data.select(torch.zeros(0, dtype=torch.int64)), 5)[0].shape == (0, 5)


def test_messages_name_what_was_received() -> None:
    with pytest.raises(ValueError, match="at least 1, received 0 and 5"):
        Item2Vec(SPEC, window=0)
    with pytest.raises(ValueError, match="subsample is a share above 0 or None, received 0"):
        Item2Vec(SPEC, subsample=0)
    with pytest.raises(ValueError, match="pooling must be last or mean, received 'max'"):
        Item2Vec(SPEC, pooling="max")
