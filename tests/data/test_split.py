"""Splits: against brute force, and the rules that make them honest."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from funnelrec.data.split import (
    HISTORY,
    TEST,
    TRAIN,
    VALID,
    Given,
    GlobalTime,
    HeldOutUsers,
    LeaveLastOut,
    Ratio,
    split_from_dict,
)

EVENTS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 12)), min_size=1, max_size=40)


def _arrays(events: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([e[0] for e in events], dtype=np.int64), np.array([e[1] for e in events], dtype=np.int64)


def test_global_time_takes_the_youngest_tenths() -> None:
    time = np.random.default_rng(0).permutation(100).astype(np.int64)
    part = GlobalTime().assign(np.zeros(100, np.int64), time)
    assert np.bincount(part).tolist() == [80, 10, 10]
    assert time[part == TRAIN].max() == 79 and time[part == TEST].min() == 90


def test_global_time_shows_its_boundaries() -> None:
    assert GlobalTime().boundaries is None
    assert GlobalTime().fit(np.arange(100)).boundaries == (80, 90)
    fixed = GlobalTime(boundaries=(3, 5))
    assert fixed.fit(np.arange(100)) is fixed
    assert fixed.assign(np.zeros(6, np.int64), np.arange(6)).tolist() == [0, 0, 0, 1, 1, 2]


@given(EVENTS, st.sampled_from([0.0, 0.1, 0.3]), st.sampled_from([0.0, 0.2, 0.4]))
@settings(max_examples=100, deadline=None)
def test_global_time_never_lets_training_be_younger(events: list[tuple[int, int]], valid: float, test: float) -> None:
    user, time = _arrays(events)
    part = GlobalTime(valid, test).assign(user, time)
    for older, younger in ((TRAIN, VALID), (VALID, TEST), (TRAIN, TEST)):
        if (part == older).any() and (part == younger).any():
            assert time[part == older].max() < time[part == younger].min()  # equal times stay on one side
    assert (part == TEST).sum() >= round(len(events) * test)  # ties only ever add to the younger part
    if test == 0:
        assert not (part == TEST).any()


@given(EVENTS)
@settings(max_examples=100, deadline=None)
def test_leave_last_out_is_brute_force(events: list[tuple[int, int]]) -> None:
    user, time = _arrays(events)
    expected = np.zeros(len(events), np.uint8)
    for u in set(user.tolist()):
        mine = sorted((int(time[i]), i) for i in range(len(user)) if user[i] == u)
        if len(mine) >= 3:
            expected[mine[-1][1]], expected[mine[-2][1]] = TEST, VALID
    assert LeaveLastOut().assign(user, time).tolist() == expected.tolist()


def test_leave_last_out_of_no_events() -> None:
    assert LeaveLastOut().assign(np.empty(0, np.int64), np.empty(0, np.int64)).shape == (0,)


def test_held_out_users_give_their_first_four_fifths() -> None:
    user = np.repeat(np.arange(10) * 7, 5)  # codes need not be dense
    time = np.tile([30, 10, 20, 50, 40], 10)
    part = HeldOutUsers(seed=1).assign(user, time).reshape(10, 5)
    kinds = [tuple(row) for row in part.tolist()]
    assert sorted(kinds) == sorted([(TRAIN,) * 5] * 8 + [(3, 3, 3, VALID, 3), (3, 3, 3, TEST, 3)])  # place of time 50
    assert (part == HeldOutUsers(seed=1).assign(user, time).reshape(10, 5)).all()
    assert {HeldOutUsers(seed=s).assign(user, time).reshape(10, 5).max(1).tobytes() for s in range(5)} != {
        part.max(1).tobytes()
    }


def test_held_out_users_order_equal_times_by_their_rows() -> None:
    part = HeldOutUsers(valid=0.0, test=0.5, given=0.5).assign(np.array([0, 1, 0, 1]), np.array([5, 5, 5, 5]))
    assert sorted(part[:2].tolist()) == [TRAIN, HISTORY] and sorted(part[2:].tolist()) == [TRAIN, TEST]


def test_held_out_users_with_one_event_have_nothing_to_find() -> None:
    part = HeldOutUsers(valid=0.0, test=0.5).assign(np.array([0, 1, 2, 3]), np.zeros(4, np.int64))
    assert sorted(part.tolist()) == [TRAIN, TRAIN, HISTORY, HISTORY]


@given(EVENTS, st.sampled_from([0.2, 0.5, 0.8]))
@settings(max_examples=100, deadline=None)
def test_held_out_users_are_never_trained_on(events: list[tuple[int, int]], share: float) -> None:
    user, time = _arrays(events)
    part = HeldOutUsers(0.25, 0.25, share).assign(user, time)
    for u in set(user.tolist()):
        mine = part[user == u][np.argsort(time[user == u], kind="stable")]
        if TRAIN in mine:
            assert (mine == TRAIN).all()
        else:
            given = max(1, int(share * len(mine) + 1e-9))
            assert (mine[:given] == HISTORY).all() and (mine[given:] != HISTORY).all() and len(set(mine[given:])) <= 1


def test_ratio_has_exact_shares_and_follows_its_seed() -> None:
    zeros = np.zeros(1000, np.int64)
    part = Ratio(0.2, 0.1, seed=3).assign(zeros, zeros)
    assert np.bincount(part).tolist() == [700, 200, 100]
    assert (part == Ratio(0.2, 0.1, seed=3).assign(zeros, zeros)).all()
    assert (part != Ratio(0.2, 0.1, seed=4).assign(zeros, zeros)).any()


def test_given_hands_out_the_published_parts() -> None:
    part = np.array([0, 2, 1], np.uint8)
    zeros = np.zeros(3, np.int64)
    assert Given(part).assign(zeros, zeros) is part
    with pytest.raises(ValueError, match=r"one entry an event, received 3 for 2"):
        Given(part).assign(zeros[:2], zeros[:2])
    with pytest.raises(ValueError, match=r"no published part; choose"):
        Given().assign(zeros, zeros)
    with pytest.raises(ValueError, match=r"received 4"):
        Given(np.array([4], np.uint8))


@pytest.mark.parametrize(
    "split", [GlobalTime(0.1, 0.2, (5, 9)), GlobalTime(), LeaveLastOut(), HeldOutUsers(seed=2), Ratio(seed=4), Given()]
)
def test_json_round_trip(split: GlobalTime | LeaveLastOut | Ratio | Given) -> None:
    assert split_from_dict(json.loads(json.dumps(split.to_dict()))) == split


def test_faults_are_named() -> None:
    with pytest.raises(ValueError, match=r"leave some for training, received valid=0.5 test=0.5"):
        GlobalTime(0.5, 0.5)
    with pytest.raises(ValueError, match=r"leave some for training"):
        Ratio(-0.1, 0.1)
    with pytest.raises(ValueError, match=r"share of a held-out user's events in \(0, 1\), received 1.0"):
        HeldOutUsers(given=1.0)
    with pytest.raises(ValueError, match=r"t_valid first, received \(5, 3\)"):
        GlobalTime(boundaries=(5, 3))
    with pytest.raises(ValueError, match=r"at least one event"):
        GlobalTime().fit(np.empty(0, np.int64))
    with pytest.raises(ValueError, match=r"kind must be one of .* received 'week'"):
        split_from_dict({"kind": "week"})
    with pytest.raises(ValueError, match=r"does not know the key 'sed'"):
        split_from_dict({"kind": "ratio", "sed": 1})
