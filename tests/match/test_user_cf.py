"""UserCF against a brute force, and the properties of its sheet."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from funnelrec.core.batch import Batch
from funnelrec.core.schema import Spec
from funnelrec.match import user_cf
from funnelrec.match.user_cf import UserCF

USERS, ITEMS = 16, 24
SPEC = Spec(num_users=USERS, num_items=ITEMS)
Data = tuple[Tensor, Tensor, Tensor]


def events(seed: int = 0, n: int = 90) -> Data:
    generator = torch.Generator().manual_seed(seed)
    users = torch.randint(2, 15, (n,), generator=generator)  # user 15 never acts
    items = 2 + (torch.rand(n, generator=generator) ** 2 * 20).long()  # item 23 is never taken; some pairs repeat
    return users, items, torch.randint(0, 10**6, (n,), generator=generator)


def taken(data: Data, max_len: int = 500) -> dict[int, list[int]]:
    """Each user's distinct items, the newest max_len of them, by the time they were taken last."""
    latest: dict[tuple[int, int], int] = {}
    for u, i, t in zip(*(x.tolist() for x in data), strict=True):
        latest[u, i] = max(t, latest.get((u, i), -1))
    return {
        u: [i for _, i in sorted((t, i) for (v, i), t in latest.items() if v == u)][-max_len:] for u in range(USERS)
    }


def brute_force(data: Data, history: list[int], *, iif: bool, max_len: int = 500) -> Tensor:
    """sim of a history to all users: [U]."""
    everything, sets = taken(data), taken(data, max_len)
    takers = {i: sum(i in own for own in everything.values()) for i in range(ITEMS)}
    own = set(history[-max_len:])
    sims = torch.zeros(USERS, dtype=torch.float64)
    for v, i in product(range(USERS), own):
        if i in sets[v]:
            sims[v] += (1 / math.log(1 + takers[i]) if iif else 1) / math.sqrt(len(own) * len(sets[v]))
    return sims.float()


def query(*histories: list[int], length: int = 6, users: list[int] | None = None) -> Batch:
    rows = torch.tensor([[0] * (length - len(h)) + h for h in histories])
    batch = Batch(history=rows, mask=rows != 0)
    return batch if users is None else batch.replace(user=torch.tensor(users))


def alike(model: UserCF, batch: Batch) -> Tensor:
    rows, values = model.neighbours(batch)
    return torch.zeros(len(rows), USERS).scatter_add(1, rows, values)


HISTORIES = [[4, 5, 4], [3], [2, 7, 9, 11, 3, 6], []]


@pytest.mark.parametrize("options", [{"iif": True}, {"iif": False}, {"iif": True, "max_len": 3}], ids=str)
def test_equals_a_brute_force(options: dict[str, int]) -> None:
    model = UserCF(SPEC, **options).fit(*events())
    expected = torch.stack([brute_force(events(), h, **options) for h in HISTORIES])
    torch.testing.assert_close(alike(model, query(*HISTORIES)), expected)


def test_the_nearest_neighbours_vote() -> None:
    model = UserCF(SPEC, num_neighbours=3).fit(*events())
    sims = torch.stack([brute_force(events(), h, iif=True) for h in HISTORIES[:3]])
    values, rows = sims.sort(dim=1, descending=True, stable=True)  # ties to the lower row
    assert torch.equal(model.neighbours(query(*HISTORIES[:3]))[0], rows[:, :3])
    sets = taken(events())
    found, scores = model.recommend(query(*HISTORIES), ITEMS - 2)
    for q in range(3):
        expected = torch.zeros(ITEMS)
        for v, value in zip(rows[q, :3].tolist(), values[q, :3].tolist(), strict=True):
            expected[sets[v]] += value
        expected = torch.where(expected > 0, expected, model.popularity - 1)
        torch.testing.assert_close(scores[q], expected[found[q]])
        assert sorted(found[q].tolist()) == list(range(2, ITEMS))
        assert (scores[q].diff() <= 0).all()
    assert (scores[3] <= 0).all()
    assert found[3, 0] == model.popularity.argmax()


def test_a_user_is_no_neighbour_of_hers() -> None:
    model, history = UserCF(SPEC, iif=False).fit(*events()), taken(events())[5]
    data = query(history, length=len(history), users=[5])
    assert alike(model, data)[0, 5] == 0
    stranger = alike(model, query(history, length=len(history), users=[1]))[0]
    assert stranger[5] == pytest.approx(1)  # the same set: the cosine is 1
    assert stranger.max() <= 1 + 1e-6
    torch.testing.assert_close(alike(model, data)[0].index_fill(0, torch.tensor([5]), 1.0), stranger)


def test_popular_items_count_less() -> None:
    """Users 2 and 3 share a rare item, 2 and 4 one that everybody took."""
    users = torch.tensor([2, 2, 3, 3, 4, 4, 5, 6, 7, 8])
    items = torch.tensor([10, 11, 10, 12, 11, 13, 11, 11, 11, 11])
    data = users, items, torch.arange(10)
    plain, weighted = UserCF(SPEC, iif=False).fit(*data), UserCF(SPEC).fit(*data)
    assert alike(plain, query([10, 11]))[0, 3] == alike(plain, query([10, 11]))[0, 4]
    assert alike(weighted, query([10, 11]))[0, 3] > alike(weighted, query([10, 11]))[0, 4]


def test_padding_order_and_repeats_change_nothing() -> None:
    model = UserCF(SPEC).fit(*events())
    expected = model.recommend(query([4, 5, 9]), 8)
    noise = query([9, 5, 4, 4], length=9)
    noise = noise.replace(history=torch.where(noise.mask, noise.history, 3))
    for other in (query([9, 4, 5], length=12), noise):
        assert torch.equal(model.recommend(other, 8)[0], expected[0])
        torch.testing.assert_close(model.recommend(other, 8)[1], expected[1])


def test_excluded_and_disallowed_items_never_come_back_and_missing_ones_are_filled() -> None:
    model = UserCF(SPEC).fit(*events())
    allowed = torch.zeros(ITEMS, dtype=torch.bool)
    allowed[[1, 3, 4, 5]] = True
    rows, scores = model.recommend(query([4], [5]), 3, torch.tensor([[3, 0], [0, 0]]), allowed)
    assert set(rows[0].tolist()) == {4, 5, 0}
    assert scores[0, 2] == -torch.inf
    assert set(rows[1].tolist()) == {3, 4, 5}


def test_many_users_are_answered_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = UserCF(SPEC).fit(*events())
    data = query(*[[2 + n % 9, 3 + n % 11] for n in range(40)])
    whole = model.recommend(data, 5)
    monkeypatch.setattr(user_cf, "CELLS_AT_ONCE", 1)
    monkeypatch.setattr(user_cf, "PAIRS_AT_ONCE", 5)
    assert torch.equal(model.recommend(data, 5)[0], whole[0])
    assert model.recommend(data.select(torch.zeros(0, dtype=torch.int64)), 5)[0].shape == (0, 5)


def test_state_dict_carries_the_whole_model_and_fit_starts_afresh() -> None:
    model = UserCF(SPEC).fit(*events())
    copy = UserCF(SPEC)
    copy.load_state_dict(model.state_dict())
    assert torch.equal(copy.recommend(query([4, 5]), 9)[0], model.recommend(query([4, 5]), 9)[0])
    nothing = torch.zeros(0, dtype=torch.int64)
    model.fit(nothing, nothing, nothing)
    assert not model.neighbours(query([4]))[1].any()
    assert model.recommend(query([4]), 2)[0].tolist() == [[2, 3]]


def test_unknown_rows_do_not_count() -> None:
    noise = torch.tensor([0, 1, 5, 6, 1]), torch.tensor([5, 6, 0, 1, 7]), torch.zeros(5, dtype=torch.int64)
    with_noise = UserCF(SPEC).fit(*(torch.cat(pair) for pair in zip(events(), noise, strict=True)))
    plain = UserCF(SPEC).fit(*events())
    assert torch.equal(with_noise.user_items, plain.user_items)
    assert torch.equal(with_noise.recommend(query([4, 1, 5]), 9)[0], plain.recommend(query([4, 5]), 9)[0])


def test_messages_name_what_was_received() -> None:
    with pytest.raises(ValueError, match="at least 1, received 0 and 200"):
        UserCF(SPEC, num_neighbours=0)
