"""Splits: against brute force, and the rules that make them honest."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from funnelrec.data.split import TEST, TRAIN, VALID, Given, GlobalTime, LeaveLastOut, Ratio, split_from_dict

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
    with pytest.raises(ValueError, match=r"received 3"):
        Given(np.array([3], np.uint8))


@pytest.mark.parametrize("split", [GlobalTime(0.1, 0.2, (5, 9)), GlobalTime(), LeaveLastOut(), Ratio(seed=4), Given()])
def test_json_round_trip(split: GlobalTime | LeaveLastOut | Ratio | Given) -> None:
    assert split_from_dict(json.loads(json.dumps(split.to_dict()))) == split


def test_faults_are_named() -> None:
    with pytest.raises(ValueError, match=r"leave some for training, received valid=0.5 test=0.5"):
        GlobalTime(0.5, 0.5)
    with pytest.raises(ValueError, match=r"leave some for training"):
        Ratio(-0.1, 0.1)
    with pytest.raises(ValueError, match=r"t_valid first, received \(5, 3\)"):
        GlobalTime(boundaries=(5, 3))
    with pytest.raises(ValueError, match=r"at least one event"):
        GlobalTime().fit(np.empty(0, np.int64))
    with pytest.raises(ValueError, match=r"kind must be one of .* received 'week'"):
        split_from_dict({"kind": "week"})
    with pytest.raises(ValueError, match=r"does not know the key 'sed'"):
        split_from_dict({"kind": "ratio", "sed": 1})
