"""Session-parallel lanes against a slow loop that walks them one event at a time."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from funnelrec.data.batches import Batches
from funnelrec.data.histories import Histories
from funnelrec.data.lanes import SessionParallel


def lanes_of(sessions: list[list[int]], lanes: int, starts: list[int] | None = None, **options: int) -> SessionParallel:
    """Sessions of item rows that begin at `starts` (in the order given where absent)."""
    user = np.repeat(np.arange(len(sessions)), [len(s) for s in sessions])
    begin = np.arange(len(sessions)) if starts is None else np.array(starts)
    time = np.concatenate([begin[n] * 1000 + np.arange(len(s)) for n, s in enumerate(sessions)])
    histories = Histories.build(user, np.concatenate([np.array(s) for s in sessions]), time, len(sessions))
    return SessionParallel(SimpleNamespace(train_histories=histories), lanes, **options)  # type: ignore[arg-type]


def steps_of(made: SessionParallel) -> list[list[tuple[int, int, int, bool]]]:
    """(lane, item, target, fresh) of every open lane, step by step."""
    return [
        list(zip(b.lane.tolist(), b.history[:, 0].tolist(), b.target.tolist(), b.fresh.tolist(), strict=True))
        for b in Batches(made, 1).epoch(0)
    ]


def walked(sessions: list[list[int]], lanes: int) -> list[list[tuple[int, int, int, bool]]]:
    """The slow loop: each lane holds what is left of its session; the next one is taken where nothing is."""
    waiting = [list(s) for s in sessions if len(s) > 1]
    holds: dict[int, list[int]] = {}
    steps = []
    while True:
        fresh = set()
        for lane in range(lanes):
            if len(holds.get(lane, [])) < 2:
                holds.pop(lane, None)
                if waiting:
                    holds[lane] = waiting.pop(0)
                    fresh.add(lane)
        if not holds:
            return steps
        steps.append([(lane, holds[lane][0], holds[lane][1], lane in fresh) for lane in sorted(holds)])
        for session in holds.values():
            session.pop(0)


def test_by_hand() -> None:
    """Two lanes; the session of one event is never shown; the last session takes lane 1, which is free first."""
    made = lanes_of([[2, 3, 4, 5], [6, 7], [9], [8, 2]], lanes=2)
    assert steps_of(made) == [
        [(0, 2, 3, True), (1, 6, 7, True)],
        [(0, 3, 4, False), (1, 8, 2, True)],
        [(0, 4, 5, False)],
    ]
    assert len(made) == 3 and made.num_events == 5


@pytest.mark.parametrize("lanes", [1, 3, 8, 100])
def test_equals_the_slow_loop(lanes: int) -> None:
    generator = np.random.default_rng(lanes)
    sessions = [generator.integers(2, 50, generator.integers(1, 9)).tolist() for _ in range(60)]
    expected = walked(sessions, lanes)
    assert steps_of(lanes_of(sessions, lanes)) == expected
    # a planted fault: a lane that forgets to say where a session begins
    assert steps_of(lanes_of(sessions, lanes)) != [[(a, b, c, False) for a, b, c, _ in step] for step in expected]


def test_every_pair_of_neighbours_exactly_once() -> None:
    generator = np.random.default_rng(0)
    sessions = [(100 * n + np.arange(2, 3 + generator.integers(0, 6))).tolist() for n in range(40)]
    shown = sorted((item, target) for step in steps_of(lanes_of(sessions, 7)) for _, item, target, _ in step)
    assert shown == sorted(pair for s in sessions for pair in itertools.pairwise(s))


def test_sessions_come_in_the_order_of_their_first_event() -> None:
    made = lanes_of([[2, 3], [4, 5], [6, 7]], lanes=1, starts=[30, 10, 20])
    assert [step[0][1] for step in steps_of(made)] == [4, 6, 2]


def test_thin_steps_are_left_out() -> None:
    assert len(lanes_of([[2, 3, 4, 5], [6, 7]], lanes=2, least=2)) == 1
    with pytest.raises(ValueError, match="least between 1 and lanes, received 2 and 3"):
        lanes_of([[2, 3]], lanes=2, least=3)


def test_a_batch_is_one_step() -> None:
    made = lanes_of([[2, 3, 4]], lanes=1)
    with pytest.raises(ValueError, match="use batch_size=1, received 2"):
        made.gather(torch.tensor([0, 1]))
