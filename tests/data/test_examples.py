"""Examples against loops over all events."""

from __future__ import annotations

import inspect
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from funnelrec.core.schema import Schema
from funnelrec.data.batches import Batches, counter_generator
from funnelrec.data.dataset import Dataset
from funnelrec.data.examples import Impressions, NextItem, Queries
from funnelrec.data.sources import simulate
from funnelrec.data.split import GlobalTime, HeldOutUsers, LeaveLastOut, Ratio
from funnelrec.data.tables import Tables
from tests.data import worlds

SPLITS = {"time": GlobalTime(0.2, 0.2), "legacy": LeaveLastOut(), "ratio": Ratio(0.2, 0.2)}
L = 4


@pytest.fixture(scope="module", params=list(SPLITS))
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return Dataset.build(worlds.tables(), tmp_path_factory.mktemp("d") / "data", split=SPLITS[request.param])


class Loop:
    """The same questions, answered one event at a time."""

    def __init__(self, data: Dataset) -> None:
        facts = data.events
        columns = (facts.person, facts.item, facts.moment, facts.part, facts.label >= data.schema.positive)
        self.events = list(zip(*(c.tolist() for c in columns), strict=True))
        # Random rows can come out in the order of time, in small data: then all events are history after all.
        times = sorted((u, t, part) for u, _, t, part, _ in self.events)
        self.train_only = any(a[0] == b[0] and b[2] < a[2] for a, b in pairwise(times))

    def before(self, person: int, moment: int) -> list[tuple[int, int]]:
        mine = [
            (t, n, i)
            for n, (u, i, t, part, positive) in enumerate(self.events)
            if u == person and t < moment and positive and not (self.train_only and part)
        ]
        return [(i, t) for t, _, i in sorted(mine)]

    def padded(self, person: int, moment: int, length: int = L) -> list[int]:
        items = [i for i, _ in self.before(person, moment)][-length:]
        return [0] * (length - len(items)) + items


def _all(examples: Impressions | NextItem | Queries, seed: int = 0) -> Any:
    return examples.gather(torch.arange(len(examples)), counter_generator(seed))


@pytest.mark.parametrize("part", ["train", "valid", "test"])
def test_impressions_are_the_events_of_the_part(data: Dataset, part: Any) -> None:
    loop, rows = Loop(data), data.rows(part)
    batch = _all(Impressions(data, part, max_len=L))
    facts = data.events
    assert batch.size == len(rows)
    assert batch.item.tolist() == facts.item[rows].tolist() and batch.user.tolist() == facts.user[rows].tolist()
    assert batch.time.tolist() == facts.moment[rows].tolist()
    assert batch.label.tolist() == [float(s >= 4) for s in facts.label[rows]]
    assert batch.weight.tolist() == facts.weight[rows].tolist()
    people = facts.person[rows].tolist()
    assert batch.history.tolist() == [loop.padded(u, t) for u, t in zip(people, batch.time.tolist(), strict=True)]
    assert torch.equal(batch.mask, batch.history > 0) and (batch.history_times < batch.time[:, None]).all()
    spec = data.spec
    assert batch.ids.dtype == torch.int32 and batch.ids.shape == (len(rows), spec.num_ids)
    assert torch.equal(batch.ids[:, spec.item_ids], data.features.item_ids[batch.item])
    assert torch.equal(batch.history_ids, data.features.item_ids[batch.history])
    context = data.encode_context(worlds.tables().events[rows])
    assert np.array_equal(batch.ids[:, -1:].numpy(), context[0])
    assert np.array_equal(batch.numbers[:, -1:].numpy(), context[1])


@pytest.mark.parametrize("sampling", ["uniform", "popularity"])
@pytest.mark.parametrize("split", list(SPLITS))
def test_negatives_are_items_the_user_did_not_take(tmp_path: Path, split: str, sampling: Any) -> None:
    data = Dataset.build(worlds.tables(300, items=90), tmp_path / "d", split=SPLITS[split])
    loop = Loop(data)
    plain = _all(Impressions(data, "train", max_len=L))
    rows = data.rows("train")[data.events.label[data.rows("train")] >= 3]
    examples = Impressions(data, "train", max_len=L, negatives=3, negative_sampling=sampling)
    batch = _all(examples)
    assert len(examples) == len(rows) and batch.size == 4 * len(rows)
    kept = torch.from_numpy(np.flatnonzero(np.isin(data.rows("train"), rows)))
    positives = batch.select(torch.arange(0, batch.size, 4))
    assert all(torch.equal(positives[name], plain[name][kept]) for name in plain)
    items = batch.item.view(-1, 4)
    assert not batch.label.view(-1, 4)[:, 1:].any()
    assert torch.equal(batch.ids[:, data.spec.item_ids], data.features.item_ids[batch.item])
    assert torch.equal(batch.history[0::4], batch.history[3::4])
    counts = data.train_item_counts
    for row, person, moment in zip(items.tolist(), data.events.person[rows], data.events.moment[rows], strict=True):
        taken = {i for i, _ in loop.before(int(person), int(moment))}
        assert row[0] not in row[1:] and not taken & set(row[1:]) and (counts[row[1:]] > 0).all()
    assert torch.equal(_all(examples).item, batch.item) and not torch.equal(_all(examples, 1).item, batch.item)


def test_negatives_follow_their_distribution(tmp_path: Path) -> None:
    events = pl.DataFrame({"u": list(range(100)), "i": [1] * 60 + [2] * 30 + [3] * 10, "t": list(range(100))})
    data = Dataset.build(
        Tables(events, Schema(user="u", item="i", time="t")), tmp_path / "d", split=GlobalTime(0.0, 0.0)
    )
    popular = _all(Impressions(data, "train", negatives=200, negative_sampling="popularity"))
    drawn = popular.item.view(100, 201)[90:, 1:]  # the item that is excluded here is the third
    assert (drawn == 2).double().mean().item() == pytest.approx(60 / 90, abs=0.03)
    uniform = _all(Impressions(data, "train", negatives=200)).item.view(100, 201)[90:, 1:]
    assert (uniform == 2).double().mean().item() == pytest.approx(0.5, abs=0.03)


def test_a_user_who_knows_everything_ends_the_redraws(tmp_path: Path) -> None:
    events = pl.DataFrame({"u": [1] * 4, "i": [1, 2, 1, 2], "t": [0, 1, 2, 3]})
    data = Dataset.build(
        Tables(events, Schema(user="u", item="i", time="t")), tmp_path / "d", split=GlobalTime(0.0, 0.0)
    )
    assert _all(Impressions(data, "train", negatives=2)).size == 12


def test_next_item_all_is_the_end_of_the_training_sequence(data: Dataset) -> None:
    loop = Loop(data)
    batch = _all(NextItem(data, "train", max_len=L))
    wanted = {}
    for person in {e[0] for e in loop.events}:
        sequence = sorted(
            (t, n, i) for n, (u, i, t, p, good) in enumerate(loop.events) if u == person and good and p == 0
        )
        window = [(i, t) for t, _, i in sequence][-(L + 1) :]
        targets = [b[0] if b[1] > a[1] else 0 for a, b in pairwise(window)]
        if any(targets):
            pad = [0] * (L - len(targets))
            wanted[person] = (pad + [i for i, _ in window[:-1]], pad + targets)
    found = zip(batch.user.tolist(), batch.history.tolist(), batch.target.tolist(), strict=True)
    assert {u: (h, t) for u, h, t in found} == wanted
    assert torch.equal(batch.mask, batch.history > 0)


def test_held_out_users_are_asked_about_after_what_they_did_first(tmp_path: Path) -> None:
    # person u takes 10 u, 10 u + 1, …, two a day: equal times follow one another in the order of the rows
    rows = [(u, 10 * u + n, n // 2) for u in range(10) for n in range(5)]
    events = pl.DataFrame(rows, schema=["u", "i", "t"], orient="row")
    catalogue = events.select(pl.col("i").unique())
    tables = Tables(events, Schema(user="u", item="i", time="t"), items=catalogue)
    data = Dataset.build(tables, tmp_path / "d", split=HeldOutUsers())
    assert data.counts["train"] == 40 and data.counts["valid"] == data.counts["test"] == 1
    assert len(NextItem(data, "train", max_len=L)) == 8 and int(data.train_item_counts.sum()) == 40
    for part in ("valid", "test"):
        queries = Queries(data, part, max_len=L)  # type: ignore[arg-type]
        batch = _all(queries)
        assert batch.user.tolist() == [1]  # no model knows her
        items = data.item_vocabulary.decode(np.append(batch.history[0].numpy(), queries.relevant[1])).to_list()
        assert [i % 10 for i in items] == [0, 1, 2, 3, 4] and len({i // 10 for i in items}) == 1
        assert data.train_item_counts[batch.history[0].numpy()].sum() == 0


def test_ties_are_no_targets(tmp_path: Path) -> None:
    events = pl.DataFrame({"u": [1] * 4 + [2, 2], "i": [1, 2, 3, 4, 1, 2], "t": [0, 5, 5, 6, 7, 7]})
    tables = Tables(events, Schema(user="u", item="i", time="t"))
    data = Dataset.build(tables, tmp_path / "d", split=GlobalTime(0.0, 0.0))
    batch = _all(NextItem(data, "train", max_len=5))
    code = {int(v): row for row, v in enumerate(data.item_vocabulary.values.to_list(), start=2)}
    assert batch.target.tolist() == [[0, 0, code[2], 0, code[4]]]  # user 2 has no step forward in time
    legacy = Dataset.build(tables, tmp_path / "e", split=LeaveLastOut())
    assert (
        _all(NextItem(legacy, "train", max_len=5)).target.ne(0).sum().item() == 2
    )  # 1 -> 2 of user 1, 1 -> 2 of user 2


@pytest.mark.parametrize("part", ["train", "valid", "test"])
def test_next_item_last_is_each_positive_event_with_a_history(data: Dataset, part: Any) -> None:
    loop = Loop(data)
    number = ("train", "valid", "test").index(part)
    batch = _all(NextItem(data, part, max_len=L, mode="last"))
    wanted = [
        (loop.padded(u, t), i, t)
        for u, i, t, p, positive in loop.events
        if p == number and positive and i >= 2 and loop.before(u, t)
    ]
    assert list(zip(batch.history.tolist(), batch.target.tolist(), batch.time.tolist(), strict=True)) == wanted


def test_a_cut_is_one_of_the_users_own_and_every_cut_comes(data: Dataset) -> None:
    last = _all(NextItem(data, "train", max_len=L, mode="last"))
    mine = Counter(last.user.tolist())
    cut = NextItem(data, "train", max_len=L, mode="cut")
    assert len(cut) == len(mine)
    possible = set(zip(last.user.tolist(), last.time.tolist(), last.target.tolist(), strict=True))
    drawn: Counter[tuple[int, int, int]] = Counter()
    for seed in range(300):
        batch = _all(cut, seed)
        assert sorted(batch.user.tolist()) == sorted(mine)
        drawn.update(zip(batch.user.tolist(), batch.time.tolist(), batch.target.tolist(), strict=True))
    assert set(drawn) == possible


def test_a_target_lies_within_the_horizon(data: Dataset) -> None:
    """Every one of the user's own next three events comes as a target of a cut, and no other."""
    loop = Loop(data)
    own: dict[int, list[tuple[int, int]]] = {}
    for u, i, t, part, positive in loop.events:  # in order of time
        if part == 0 and positive and i >= 2 and loop.before(u, t):
            own.setdefault(u, []).append((t, i))
    possible = {(u, e[n][0], i) for u, e in own.items() for n in range(len(e)) for _, i in e[n : n + 3]}
    near = NextItem(data, "train", max_len=L, mode="cut", horizon=3)
    drawn, histories = set(), {}
    for seed in range(600):
        batch = _all(near, seed)
        users, times = batch.user.tolist(), batch.time.tolist()
        drawn |= set(zip(users, times, batch.target.tolist(), strict=True))
        histories |= {(u, t): h for u, t, h in zip(users, times, batch.history.tolist(), strict=True)}
    assert drawn == possible
    assert all(history == loop.padded(user, time) for (user, time), history in histories.items())
    with pytest.raises(ValueError, match=r"1 unless mode='cut', received 3 and 'last'"):
        NextItem(data, "train", max_len=L, mode="last", horizon=3)


@pytest.mark.parametrize("part", ["valid", "test"])
def test_queries_ask_at_the_first_moment_of_the_part(data: Dataset, part: Any) -> None:
    loop, number = Loop(data), ("train", "valid", "test").index(part)
    queries = Queries(data, part, max_len=L)
    batch, offsets, items = _all(queries), *queries.relevant
    wanted, people = {}, 0
    for person in sorted({e[0] for e in loop.events}):
        mine = [e for e in loop.events if e[0] == person and e[3] == number]
        if not any(e[4] for e in mine):
            continue
        people += 1
        moment = min(e[2] for e in mine)
        seen = {i for i, _ in loop.before(person, moment)}
        relevant = sorted({e[1] for e in mine if e[4] and e[1] >= 2} - seen)
        if relevant:
            wanted[person] = (moment, loop.padded(person, moment), relevant, sorted(seen))
    assert queries.persons.tolist() == list(wanted) and queries.dropped["people"] == people - len(wanted)
    assert len(queries) == len(wanted) and offsets[-1] == len(items)
    seen_rows = queries.seen(torch.arange(len(queries)))
    for n, (moment, history, relevant, seen) in enumerate(wanted.values()):
        assert batch.time[n] == moment and batch.history[n].tolist() == history
        assert items[offsets[n] : offsets[n + 1]].tolist() == relevant
        assert [i for i in seen_rows[n].tolist() if i] == seen


def test_queries_say_what_they_dropped(tmp_path: Path) -> None:
    events = pl.DataFrame({"u": [1, 1, 2, 1, 2, 2], "i": [1, 2, 1, 1, 9, 2], "t": [0, 1, 2, 5, 6, 7]})
    data = Dataset.build(
        Tables(events, Schema(user="u", item="i", time="t")), tmp_path / "d", split=GlobalTime(boundaries=(5, 5))
    )
    queries = Queries(data, "test", max_len=3)
    assert queries.dropped == {"people": 1, "seen": 1, "unknown": 1}  # user 1 took item 1 again; 9 has no row
    assert data.item_vocabulary.decode(queries.relevant[1]).to_list() == [2] and len(queries) == 1
    assert len(Queries(data, "valid", max_len=3)) == 0


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 9)), min_size=4, max_size=25),
    st.sampled_from(list(SPLITS)),
)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_history_ever_holds_its_own_moment(tmp_path: Path, rows: list[tuple[int, int, int]], split: str) -> None:
    events = pl.DataFrame(rows, schema=["u", "i", "t"], orient="row")
    try:
        data = Dataset.build(Tables(events, Schema(user="u", item="i", time="t")), tmp_path / "d", split=SPLITS[split])
    except ValueError as error:
        assert "no event is left for training" in str(error)
        return
    loop = Loop(data)
    for part in ("train", "valid", "test"):
        batch = _all(Impressions(data, part, max_len=3))  # type: ignore[arg-type]
        people = data.events.person[data.rows(part)].tolist()  # type: ignore[arg-type]
        assert batch.history.tolist() == [
            loop.padded(u, t, 3) for u, t in zip(people, batch.time.tolist(), strict=True)
        ]


def test_batches_of_a_dataset_resume_exactly(data: Dataset) -> None:
    batches = Batches(Impressions(data, "train", max_len=3, negatives=2), 16, shuffle=True, seed=5)
    whole = list(batches.epoch(3))
    for left, right in zip(batches.epoch(3, start=4), whole[4:], strict=True):
        assert all(torch.equal(left[name], right[name]) for name in left)


def test_faults_are_named(data: Dataset) -> None:
    with pytest.raises(ValueError, match=r"max_len is the length of the histories, at least 1, received 0"):
        NextItem(data, "train", max_len=0)
    with pytest.raises(ValueError, match=r"mode='all' is for the training part, received part='test'"):
        NextItem(data, "test", max_len=3)
    with pytest.raises(ValueError, match=r"negatives is a number of items .* received -1"):
        Impressions(data, "train", negatives=-1)
    for examples in (Impressions(data, "train", negatives=1), NextItem(data, "train", max_len=2, mode="cut")):
        with pytest.raises(ValueError, match=r"at random: give gather a torch\.Generator"):
            examples.gather(torch.arange(2))
    with pytest.raises(ValueError, match=r"mode must be all, last or cut, received 'first'"):
        inspect.unwrap(NextItem.__init__)(object.__new__(NextItem), data, "train", max_len=2, mode="first")
    with pytest.raises(ValueError, match=r"negative_sampling must be uniform or popularity, received 'hard'"):
        inspect.unwrap(Impressions.__init__)(object.__new__(Impressions), data, "train", negative_sampling="hard")


def test_newest_keeps_the_last_events_of_the_part(tmp_path: Path) -> None:
    dataset = Dataset.build(simulate.load(users=20, items=80, events=800).tables, tmp_path / "d")
    whole, last = Impressions(dataset, "train"), Impressions(dataset, "train", newest=7)
    assert len(last) == 7
    expected = whole.gather(torch.arange(len(whole) - 7, len(whole)))
    assert torch.equal(last.gather(torch.arange(7)).ids, expected.ids)
    with pytest.raises(ValueError, match="newest is a number of events"):
        Impressions(dataset, "train", newest=0)
