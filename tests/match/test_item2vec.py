"""Item2Vec: the pairs, the step and the optimum of skip-gram with negative sampling; and what it recommends."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from funnelrec.core.batch import Batch
from funnelrec.core.schema import Spec
from funnelrec.match import item2vec
from funnelrec.match.item2vec import Item2Vec, _Pairs, _Tables

ITEMS = 24
SPEC = Spec(num_users=60, num_items=ITEMS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def counted(pairs: _Pairs) -> Counter[tuple[int, int]]:
    found: Counter[tuple[int, int]] = Counter()
    for item, context, _ in pairs.epoch():
        found.update(zip(item.tolist(), context.tolist(), strict=True))
    return found


USERS, OWN = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0, 1, 2, 3, 4, 5])


@pytest.mark.parametrize("block", [2**18, 1])
def test_all_pairs_of_a_set_and_none_across_users(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(item2vec, "PAIRS_AT_ONCE", block)
    pairs = _Pairs(USERS, OWN, 2, None, False, generator())
    expected = {(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1), (3, 4), (4, 3)}
    assert counted(pairs) == Counter(expected)
    assert pairs.per_epoch() == len(expected)


def test_a_window_over_a_sequence() -> None:
    pairs = _Pairs(torch.zeros(4, dtype=torch.int64), torch.arange(4), 1, None, True, generator())
    assert counted(pairs) == Counter({(0, 1), (1, 0), (1, 2), (2, 1), (2, 3), (3, 2)})
    long = _Pairs(torch.zeros(3000, dtype=torch.int64), torch.arange(3000), 3, None, True, generator())
    apart = Counter(abs(i - j) for i, j in counted(long))
    # the radius is 1, 2 or 3: a neighbour d away is reached with probability 1, 2/3, 1/3
    assert [apart[d] / 6000 for d in (1, 2, 3)] == pytest.approx([1, 2 / 3, 1 / 3], abs=0.03)
    assert long.per_epoch() == pytest.approx(apart.total(), rel=0.03)


def test_a_window_over_a_set_meets_every_pair_in_time() -> None:
    pairs = _Pairs(torch.zeros(6, dtype=torch.int64), torch.arange(6), 1, None, False, generator())
    found = sum((counted(pairs) for _ in range(3000)), Counter())
    # 10 of the 30 pairs an epoch
    assert len(found) == 30
    assert all(n / 3000 == pytest.approx(1 / 3, abs=0.05) for n in found.values())


def test_frequent_items_are_thinned_out_before_the_window_is_laid() -> None:
    """One item is half of the events, a thousand others the rest. With t = .01: √.02 + .02 stay."""
    item = torch.stack([torch.zeros(1000, dtype=torch.int64), torch.arange(1, 1001)], 1).flatten()
    pairs = _Pairs(torch.zeros(2000, dtype=torch.int64), item, 1, 0.01, True, generator())
    assert float(pairs.stays[0]) == pytest.approx(math.sqrt(0.02) + 0.02)
    assert float(pairs.stays[1]) == 1
    found = counted(pairs)
    assert sum(n for (i, j), n in found.items() if i and j) > 1400, "the window reaches over what was left out"
    assert pairs.per_epoch() == pytest.approx(found.total(), rel=0.05)


def test_the_first_step_by_hand() -> None:
    """Outputs are zero: every score is 0, the loss is (n + 1) log 2, the inputs stay and the outputs move along u."""
    tables = _Tables(9, 4, generator())
    assert float(tables.inputs.abs().max()) <= 0.5 / 4
    before = tables.inputs.clone()
    loss = tables.step(torch.tensor([2, 3]), torch.tensor([4, 5]), torch.tensor([[6, 7, 8], [6, 7, 8]]), 0.1)
    assert loss == pytest.approx(4 * math.log(2))
    assert torch.equal(tables.inputs, before)
    u = before[2]
    torch.testing.assert_close(tables.outputs[4], 0.1 * 0.5 * u / (0.1 + 0.25 * u.square().mean()).sqrt())
    both = 0.5 * (before[2] + before[3])
    torch.testing.assert_close(tables.outputs[6], -0.1 * both / (0.1 + both.square().mean()).sqrt())
    assert not tables.outputs[:4].any()


def test_a_step_is_adagrad_on_the_gradient_of_the_loss() -> None:
    tables, size = _Tables(9, 4, generator()), 32
    tables.inputs, tables.outputs = (torch.randn(9, 4, generator=generator(s)) for s in (1, 2))
    item, context = (torch.randint(9, (size,), generator=generator(s)) for s in (3, 4))
    negatives = torch.randint(9, (size, 5), generator=generator(5))  # some are the context itself
    u, v = tables.inputs.clone().requires_grad_(), tables.outputs.clone().requires_grad_()
    positive = (u[item] * v[context]).sum(1)
    against = torch.einsum("bd,bnd->bn", u[item], v[negatives])
    real = negatives != context.unsqueeze(1)
    loss = -(F.logsigmoid(positive).sum() + (F.logsigmoid(-against) * real).sum())
    loss.backward()
    assert tables.step(item, context, negatives, 0.1) == pytest.approx(loss.item() / size, rel=1e-5)
    for table, leaf in ((tables.inputs, u), (tables.outputs, v)):
        scale = (0.1 + leaf.grad.square().mean(1, keepdim=True)).sqrt()
        torch.testing.assert_close(table, leaf.detach() - 0.1 * leaf.grad / scale)


def test_the_optimum_is_the_shifted_mutual_information() -> None:
    """⟨u, v⟩ → log #(i, j) / (n q_j (#i - #(i, j))) where negatives equal to the context do not count."""
    g = generator()
    user = torch.arange(3000).repeat_interleave(3)
    topic = torch.rand(3000, 1, generator=g)
    item = (6 * (0.6 * torch.rand(3000, 3, generator=g) + 0.4 * topic)).long().flatten()
    pairs = _Pairs(user, item, 2, None, False, g)
    together = torch.zeros(6, 6)
    for (i, j), n in counted(pairs).items():
        together[i, j] += n
    q = torch.bincount(item).double() / len(item)
    tables, epochs = _Tables(6, 12, g), 40
    for epoch in range(epochs):
        for centre, context, _ in pairs.epoch():
            for start in range(0, len(centre), 512):
                c, o = centre[start : start + 512], context[start : start + 512]
                negatives = torch.multinomial(q, 2 * len(c), replacement=True, generator=g).view(-1, 2)
                tables.step(c, o, negatives, 0.3 * (1 - epoch / epochs))
    expected = (together / (2 * q * (together.sum(1, keepdim=True) - together))).log()
    often = together > 200
    assert often.sum() > 12
    got = tables.inputs @ tables.outputs.T
    torch.testing.assert_close(got[often], expected[often].float(), atol=0.15, rtol=0)


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
