"""Future-blindness: 1,000 random edits of events at or after t leave everything at t as it was.

An edit changes, inserts or deletes an event whose time is t or later. The same checkers are then run on planted
leaks, which they must catch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor

from funnelrec.core.schema import Past
from funnelrec.data import _build
from funnelrec.data.batches import counter_generator
from funnelrec.data.dataset import Dataset
from funnelrec.data.examples import Impressions, NextItem, Queries
from funnelrec.data.histories import Histories
from funnelrec.data.past import PastEvents
from funnelrec.data.split import GlobalTime
from tests.data import worlds

USERS, ITEMS, TIMES, EDITS = 6, 12, 40, 1000
PAST = (
    Past("since_watch", "what"),
    Past("watches", "what", "count", transform="standard"),
    Past("since_shown", "what", shown=True, transform="log"),
    Past("times_shown", "what", "count", shown=True, transform="quantile"),
)
Log = np.ndarray  # int64 [n, 3]: user, item, time, in the order of time


# --- histories, any t ------------------------------------------------------------------------------------------------


def _edits(rng: np.random.Generator, log: Log, t: int) -> Iterator[Log]:
    """The log after one more edit at or after t, again and again."""
    while True:
        late = np.flatnonzero(log[:, 2] >= t)
        kind = rng.integers(3) if len(late) else 0
        new = np.array([[rng.integers(USERS), rng.integers(2, ITEMS), rng.integers(t, TIMES + 5)]])
        if kind:
            log = np.delete(log, rng.choice(late), axis=0)
        if kind != 1:
            log = np.concatenate([log, new])
        log = log[rng.permutation(len(log))]  # nor does the order of the rows matter, but for those of equal time
        log = log[np.lexsort((log[:, 1], log[:, 2]))]
        yield log


def _at(log: Log, t: int) -> list[Tensor]:
    """Everything that histories say about every user at moment t."""
    histories = Histories.build(log[:, 0], log[:, 1], log[:, 2], USERS)
    users, moment = torch.arange(USERS), torch.full((USERS,), t)
    pairs = torch.cartesian_prod(users, torch.arange(2, ITEMS))
    found = histories.contains(pairs[:, 0], pairs[:, 1], torch.full((len(pairs),), t))
    return [*histories.before(users, moment, 6), histories.seen(users, moment), found]


def check_histories(edits: int) -> None:
    """Every edit, each compared with what was there before it."""
    rng = np.random.default_rng(0)
    for _ in range(edits // 20):
        log = np.stack([rng.integers(0, USERS, 80), rng.integers(2, ITEMS, 80), rng.integers(0, TIMES, 80)], axis=1)
        log = log[np.lexsort((log[:, 1], log[:, 2]))]
        t = int(rng.integers(0, TIMES))
        before = _at(log, t)
        for _, edited in zip(range(20), _edits(rng, log, t), strict=False):
            assert all(torch.equal(a, b) for a, b in zip(before, _at(edited, t), strict=True))


def _see_the_moment_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    spans: Callable[..., Any] = Histories.spans
    monkeypatch.setattr(Histories, "spans", lambda self, users, times: spans(self, users, times + 1))


def _remember_the_last_time(monkeypatch: pytest.MonkeyPatch) -> None:
    contains: Callable[..., Any] = Histories.contains
    monkeypatch.setattr(
        Histories, "contains", lambda self, users, items, times: contains(self, users, items, times + TIMES)
    )


def test_histories_are_blind_to_the_future() -> None:
    check_histories(EDITS)


@pytest.mark.parametrize("leak", [_see_the_moment_itself, _remember_the_last_time])
def test_a_leak_in_the_histories_is_caught(leak: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    leak(monkeypatch)
    with pytest.raises(AssertionError):
        check_histories(EDITS)


# --- the whole dataset, t in the valid and test parts ----------------------------------------------------------------


def _edit_events(rng: np.random.Generator, events: pl.DataFrame, t: int, edits: int) -> pl.DataFrame:
    """`edits` edits of events at or after t: a third each deleted, replaced and inserted, some with ids never seen."""
    late = np.flatnonzero(events["when"].to_numpy() >= t)
    gone = rng.choice(late, size=min(len(late), 2 * edits // 3), replace=False)
    kept = events[np.setdiff1d(np.arange(events.height), gone)]
    new = worlds.events(edits, seed=int(rng.integers(2**31)), users=15, items=18).with_columns(
        when=pl.Series(rng.integers(t, int(events["when"].max()) + 20, edits)),  # type: ignore[arg-type]
        hour=pl.Series(rng.normal(0, 1e6, edits)),
        device=pl.Series(rng.choice(["phone", "watch"], edits)),
    )
    return pl.concat([kept, new.head(2 * edits // 3)])


def _snapshot(data: Dataset, t: int) -> dict[str, Tensor]:
    """Every feature and batch of a moment before or at t."""
    out: dict[str, Tensor] = {}
    for part in ("train", "valid", "test"):
        examples = Impressions(data, part, max_len=5)
        early = int((data.events.moment[data.rows(part)] < t).sum())  # rows lie in the order of time
        out |= {f"{part}.{k}": v for k, v in examples.gather(torch.arange(early)).items()}
    drawn = Impressions(data, "train", negatives=2, negative_sampling="popularity")
    sequences, last = NextItem(data, "train", max_len=5), NextItem(data, "train", max_len=5, mode="last")
    for name, one in (("drawn", drawn), ("sequences", sequences), ("last", last)):
        out |= {f"{name}.{k}": v for k, v in one.gather(torch.arange(len(one)), counter_generator(1)).items()}
    users = torch.arange(data.spec.num_users)
    items, times, mask = data.histories.before(users, torch.full_like(users, t), 5)
    out |= {"at t.items": items, "at t.times": times, "at t.mask": mask}
    out["at t.seen"] = data.histories.seen(users, torch.full_like(users, t))
    out |= {f"at t.{k}": v for k, v in data.features.gather(users, items[:, -1]).items()}
    pairs = torch.cartesian_prod(users, torch.arange(data.spec.num_items))
    moment = torch.full((len(pairs),), t)
    out["at t.past"] = data.past.numbers(pairs[:, 0], pairs[:, 1], moment, data.transforms)
    out["counts"] = torch.from_numpy(data.train_item_counts)
    return out


def _asked(data: Dataset, t: int) -> dict[tuple[str, int], tuple[int, list[int]]]:
    """What evaluation knows of each user whom it asks about before t."""
    asked = {}
    for part in ("valid", "test"):
        queries = Queries(data, part, max_len=5)
        batch = queries.gather(torch.arange(len(queries)))
        for user, time, history in zip(batch.user.tolist(), batch.time.tolist(), batch.history.tolist(), strict=True):
            if user > 1 and time < t:
                asked[part, user] = (time, history)
    return asked


def check_dataset(folder: Path, edits: int, each: int = 50) -> None:
    """Rebuild the dataset after `each` edits at a time and compare every snapshot with the first."""
    rng = np.random.default_rng(1)
    tables = worlds.tables(240)
    tables = replace(tables, schema=replace(tables.schema, past=PAST))
    split = GlobalTime().fit(tables.events["when"].to_numpy())
    assert split.boundaries is not None
    data = Dataset.build(tables, folder / "before", split=split)
    for _ in range(edits // each):
        t = int(rng.integers(split.boundaries[0], int(data.events.time.max()) + 1))
        changed = replace(tables, events=_edit_events(rng, tables.events, t, each))
        edited = Dataset.build(changed, folder / "after", split=split)
        before, after = _snapshot(data, t), _snapshot(edited, t)
        assert before.keys() == after.keys() and edited.spec == data.spec
        # Who is asked about depends on what they go on to take; what is known of them does not.
        known, still = _asked(data, t), _asked(edited, t)
        assert all(known[who] == still[who] for who in known.keys() & still.keys())
        for name in before:
            assert torch.equal(before[name], after[name]), f"{name} at {t} was changed by an event at {t} or later"


def _fit_on_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    fit: Callable[..., Any] = _build._fit
    monkeypatch.setattr(_build, "_fit", lambda tables, line: fit(tables, replace(line, part=line.part * 0)))


def _count_the_future(monkeypatch: pytest.MonkeyPatch) -> None:
    raw: Callable[..., Any] = PastEvents.raw
    monkeypatch.setattr(PastEvents, "raw", lambda self, person, item, time: raw(self, person, item, time + TIMES))


def test_the_dataset_is_blind_to_the_future(tmp_path: Path) -> None:
    check_dataset(tmp_path, EDITS)


@pytest.mark.parametrize("leak", [_see_the_moment_itself, _fit_on_everything, _count_the_future])
def test_a_leak_in_the_dataset_is_caught(
    leak: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    leak(monkeypatch)
    with pytest.raises(AssertionError):
        check_dataset(tmp_path, EDITS)
