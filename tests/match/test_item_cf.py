"""ItemCF against a triple loop, and the properties of its sheet."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from funnelrec.core.batch import Batch
from funnelrec.core.schema import Spec
from funnelrec.match import item_cf
from funnelrec.match.item_cf import ItemCF

ITEMS = 24
SPEC = Spec(num_users=14, num_items=ITEMS)
DAY = 86_400


def events(seed: int = 0, n: int = 90) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    users = torch.randint(2, 14, (n,), generator=generator)
    items = 2 + (torch.rand(n, generator=generator) ** 2 * 20).long()  # item 23 is never taken; some pairs repeat
    return users, items, torch.randint(0, 40 * DAY, (n,), generator=generator)


def triple_loop(
    data: tuple[Tensor, Tensor, Tensor], *, iuf: bool = False, half_life: float | None = None, max_len: int = 500
) -> Tensor:
    """sim(i, j) by the definition: [N, N]."""
    latest: dict[tuple[int, int], int] = {}
    for u, i, t in zip(*(x.tolist() for x in data), strict=True):
        latest[u, i] = max(t, latest.get((u, i), -1))
    takers = {i: {u for u, j in latest if j == i} for i in range(ITEMS)}
    sims = torch.zeros(ITEMS, ITEMS, dtype=torch.float64)
    for i, j in product(range(ITEMS), repeat=2):
        for u in (takers[i] & takers[j]) if i != j else ():
            own = sorted((t, k) for (v, k), t in latest.items() if v == u)
            if not {i, j} <= {k for _, k in own[-max_len:]}:
                continue
            term = 1 / math.log(1 + len(own)) if iuf else 1.0
            if half_life:
                term *= 2 ** (-abs(latest[u, i] - latest[u, j]) / (half_life * DAY))
            sims[i, j] += term / math.sqrt(len(takers[i]) * len(takers[j]))
    return sims


def matrix(model: ItemCF) -> Tensor:
    """The kept neighbours as [N, N]."""
    return torch.zeros(ITEMS, ITEMS).scatter_add_(1, model.neighbours.long(), model.similarities)


def query(*histories: list[int], length: int = 6) -> Batch:
    rows = torch.tensor([[0] * (length - len(h)) + h for h in histories])
    return Batch(history=rows, mask=rows != 0)


OPTIONS = [
    {"iuf": False},
    {"iuf": True},
    {"iuf": False, "half_life": 5.0},
    {"iuf": True, "half_life": 9.0, "max_len": 4},
]


@pytest.mark.parametrize("limits", ["dense", "dense, small blocks", "sparse", "sparse, small blocks"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_a_triple_loop(options: dict[str, float], limits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "sparse" in limits:
        monkeypatch.setattr(item_cf, "DENSE_BELOW", 0)
    if "small" in limits:
        monkeypatch.setattr(item_cf, "PAIRS_AT_ONCE", 7)
        monkeypatch.setattr(item_cf, "CELLS_AT_ONCE", 3 * ITEMS)
    model = ItemCF(SPEC, num_neighbours=ITEMS, **options).fit(*events())
    expected = triple_loop(events(), **options)
    torch.testing.assert_close(matrix(model), expected.float(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(matrix(model), matrix(model).T)
    assert not matrix(model).diagonal().any()


@pytest.mark.parametrize("dense_below", [0, 8])
def test_keeps_the_nearest_neighbours_of_each_item(dense_below: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(item_cf, "DENSE_BELOW", dense_below)
    model = ItemCF(SPEC, num_neighbours=3, iuf=False).fit(*events())
    expected = triple_loop(events()).float()
    values, neighbours = expected.sort(dim=1, descending=True, stable=True)  # ties to the lower row
    torch.testing.assert_close(model.similarities, values[:, :3])
    assert torch.equal(model.neighbours.long(), torch.where(values > 0, neighbours, 0)[:, :3])


def test_cosine_properties() -> None:
    users, items, times = events()
    model = ItemCF(SPEC, num_neighbours=ITEMS, iuf=False).fit(users, items, times)
    assert matrix(model).max() <= 1
    twice = ItemCF(SPEC, num_neighbours=ITEMS, iuf=False)
    twice.fit(torch.cat([users, users + 20]), torch.cat([items, items]), torch.cat([times, times]))
    torch.testing.assert_close(matrix(model), matrix(twice))  # every user twice: the same cosine
    same = ItemCF(SPEC, iuf=False).fit(
        torch.tensor([2, 2, 3, 3, 4]), torch.tensor([5, 6, 5, 6, 9]), torch.zeros(5, dtype=torch.int64)
    )
    assert matrix(same)[5, 6] == 1  # identical sets of users
    assert not matrix(same)[9].any()  # together with nothing: no neighbours


def test_scores_are_sums_over_the_history_and_popularity_stands_behind() -> None:
    model = ItemCF(SPEC, num_neighbours=ITEMS).fit(*events())
    sims = matrix(model)
    rows, scores = model.recommend(query([4, 5, 4], [3], []), ITEMS - 2)
    for row, history in enumerate([[4, 5], [3], []]):
        expected = sims[history].sum(0)
        expected = torch.where(expected > 0, expected, model.popularity - 1)
        torch.testing.assert_close(scores[row], expected[rows[row]])
        assert sorted(rows[row].tolist()) == list(range(2, ITEMS))
        assert (scores[row].diff() <= 0).all()
    assert scores[0, 0] > 0
    assert (scores[2] <= 0).all()
    assert rows[2, 0] == model.popularity.argmax()


def test_excluded_and_disallowed_items_never_come_back_and_missing_ones_are_filled() -> None:
    model = ItemCF(SPEC).fit(*events())
    allowed = torch.zeros(ITEMS, dtype=torch.bool)
    allowed[[1, 3, 4, 5]] = True
    rows, scores = model.recommend(query([4], [5]), 3, torch.tensor([[3, 0], [0, 0]]), allowed)
    assert set(rows[0].tolist()) == {4, 5, 0}
    assert scores[0, 2] == -torch.inf
    assert set(rows[1].tolist()) == {3, 4, 5}


def test_old_history_counts_less_with_a_half_life() -> None:
    model = ItemCF(SPEC, half_life=2.0, num_neighbours=ITEMS).fit(*events())
    data = query([4]).replace(time=torch.tensor([10 * DAY]))
    now = data.replace(history_times=torch.full((1, 6), 10 * DAY))
    before = data.replace(history_times=torch.full((1, 6), 6 * DAY))
    torch.testing.assert_close(model.recommend(before, 1)[1], model.recommend(now, 1)[1] / 4)


def test_many_users_are_answered_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ItemCF(SPEC).fit(*events())
    data = query(*[[2 + n % 9, 3 + n % 11] for n in range(40)])
    whole = model.recommend(data, 5)
    monkeypatch.setattr(item_cf, "CELLS_AT_ONCE", 1)
    parts = model.recommend(data, 5)
    assert torch.equal(whole[0], parts[0])
    assert model.recommend(data.select(torch.zeros(0, dtype=torch.int64)), 5)[0].shape == (0, 5)


def test_state_dict_carries_the_whole_model_and_fit_starts_afresh() -> None:
    model = ItemCF(SPEC).fit(*events())
    copy = ItemCF(SPEC)
    copy.load_state_dict(model.state_dict())
    assert torch.equal(copy.recommend(query([4, 5]), 9)[0], model.recommend(query([4, 5]), 9)[0])
    nothing = torch.zeros(0, dtype=torch.int64)
    model.fit(nothing, nothing, nothing)
    assert not matrix(model).any()
    assert model.recommend(query([4]), 2)[0].tolist() == [[2, 3]]


def test_unknown_rows_do_not_count() -> None:
    users, items, times = events()
    noise = torch.tensor([0, 1, 5, 6, 1]), torch.tensor([5, 6, 0, 1, 7]), torch.zeros(5, dtype=torch.int64)
    with_noise = ItemCF(SPEC).fit(*(torch.cat(pair) for pair in zip((users, items, times), noise, strict=True)))
    torch.testing.assert_close(matrix(with_noise), matrix(ItemCF(SPEC).fit(users, items, times)))


def test_messages_name_what_was_received() -> None:
    with pytest.raises(ValueError, match="at least 1, received 0 and 200"):
        ItemCF(SPEC, num_neighbours=0)
    with pytest.raises(ValueError, match="half_life must be above 0 days or None, received -1"):
        ItemCF(SPEC, half_life=-1.0)
    with pytest.raises(ValueError, match="need one length, received 2, 1, 1"):
        ItemCF(SPEC).fit(torch.tensor([2, 3]), torch.tensor([2]), torch.tensor([2]))
