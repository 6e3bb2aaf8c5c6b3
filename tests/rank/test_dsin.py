"""DSIN: where sessions begin, one block for all of them, and what the bias encoding and the candidate change."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from funnelrec.core.batch import Batch
from funnelrec.data.sessions import session_ids
from funnelrec.rank.din import DIN
from funnelrec.rank.dsin import DSIN, _session_slots
from tests.contracts import World, auc, full_spec, make_spec, quiet, rows_spec, train

SPEC = full_spec()
WORLD = World(SPEC)


def model(**arguments: object) -> DSIN:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dsin = DSIN(SPEC, embedding_dim=4, **arguments).eval()
        with torch.no_grad():
            dsin.embedding.table.weight[1:].normal_()
    return dsin


def with_sessions(size: int, sessions: list[list[int]]) -> Batch:
    """Every user has these sessions of items: a minute between items, two hours between sessions."""
    items = [item for session in sessions for item in session]
    hours = [7200 * n + 60 * m for n, session in enumerate(sessions) for m in range(len(session))]
    batch = WORLD.batch(size, history=torch.tensor([items]).expand(size, -1))
    return batch.replace(history_times=torch.tensor([hours]).expand(size, -1) + 1000)


def slots(times: list[int], gap: int = 1800, sessions: int = 3, length: int = 3, pad: int = 0) -> list[list[int]]:
    mask = torch.tensor([[False] * pad + [True] * len(times)])
    return _session_slots(torch.tensor([[0] * pad + times]), mask, gap, sessions, length)[0].tolist()


def test_refuses() -> None:
    with pytest.raises(ValueError, match="no item column; name user and item in the schema, or use rank/deepfm"):
        DSIN(rows_spec())
    with pytest.raises(ValueError, match="session_gap at least 0 seconds, received 5, 0 and 1800"):
        DSIN(SPEC, session_length=0)


def test_a_pause_of_1800_seconds_stays_and_1801_splits() -> None:
    nothing = [-1, -1, -1]
    assert slots([100, 1900]) == [[0, 1, -1], nothing, nothing]
    assert slots([100, 1901]) == [[0, -1, -1], [1, -1, -1], nothing]
    assert slots([100, 1901], pad=2) == [[2, -1, -1], [3, -1, -1], nothing]
    assert slots([5], sessions=1, length=1) == [[0]]


def test_the_newest_sessions_and_the_newest_items_of_each_stay() -> None:
    times = [0, 10, 9000, 9010, 9020, 9030, 20000]
    assert slots(times, sessions=2, length=3) == [[3, 4, 5], [6, -1, -1]]
    assert slots(times, sessions=3, length=2) == [[0, 1], [4, 5], [6, -1]]
    nobody = _session_slots(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.bool), 1800, 2, 2)
    assert (nobody == -1).all()


@settings(max_examples=60, deadline=None)
@given(
    pauses=st.lists(st.sampled_from([0, 60, 1799, 1800, 1801, 9999]), max_size=12),
    pad=st.integers(0, 4),
    sessions=st.integers(1, 4),
    length=st.integers(1, 4),
)
def test_sessions_are_those_of_the_data_layer(pauses: list[int], pad: int, sessions: int, length: int) -> None:
    times = np.cumsum([1000, *pauses])
    ids = session_ids(np.zeros(len(times), dtype=np.int64), times)
    kept = [np.flatnonzero(ids == s)[-length:] + pad for s in range(ids.max() + 1)][-sessions:]
    expected = np.full((sessions, length), -1)
    for row, positions in zip(expected, kept, strict=False):
        row[: len(positions)] = positions
    assert slots(times.tolist(), sessions=sessions, length=length, pad=pad) == expected.tolist()


def test_equal_sessions_have_equal_interests_until_the_bias_encoding_tells_them_apart() -> None:
    dsin, batch = model(), with_sessions(3, [[5, 9, 11], [5, 9, 11]])
    interests, sessions = dsin._interests(batch)
    assert sessions.tolist() == [[True, True, False, False, False]] * 3
    torch.testing.assert_close(interests[:, 0], interests[:, 1])
    assert not interests[:, 2:].any()
    assert sum(p.numel() for p in dsin.bias_encoding.parameters()) == 5 + 10 + 12  # K + T + D
    with torch.no_grad():
        dsin.bias_encoding.session[0] = 1.0  # the newest session
    changed, _ = dsin._interests(batch)
    torch.testing.assert_close(changed[:, 0], interests[:, 0])
    assert not torch.allclose(changed[:, 1], interests[:, 1])


def test_bias_encoding_by_hand() -> None:
    encoding = model().bias_encoding
    with torch.no_grad():
        encoding.session[1], encoding.place[2], encoding.channel[3] = 100.0, 10.0, 1.0
    added = encoding(torch.zeros(2, 10, 12), torch.tensor([0, 1]))
    assert added[0, 0, 0] == 0
    assert added[0, 2, 3] == 11
    assert added[1, 2, 3] == 111
    assert added[1, 0, 0] == 100


def test_within_a_session_only_the_place_tells_the_order() -> None:
    dsin = model()
    one, other = with_sessions(2, [[5, 9, 11], [7, 8]]), with_sessions(2, [[11, 5, 9], [8, 7]])
    torch.testing.assert_close(dsin(other), dsin(one), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        dsin.bias_encoding.place[0] = 2.0
    assert not torch.allclose(dsin(other), dsin(one), rtol=1e-4, atol=1e-5)


def test_the_order_of_the_sessions_matters() -> None:
    dsin = model()
    one, other = with_sessions(2, [[5, 9, 11], [7, 8]]), with_sessions(2, [[7, 8], [5, 9, 11]])
    assert not torch.allclose(dsin(other), dsin(one), rtol=1e-4, atol=1e-5)


def test_more_room_for_sessions_changes_nothing() -> None:
    dsin, batch = model(), with_sessions(4, [[5, 9], [7], [3, 8, 12]])
    wide = model(num_sessions=8, session_length=14)
    with torch.no_grad():
        dsin.bias_encoding.session.normal_()
        dsin.bias_encoding.place.normal_()
    state = dsin.state_dict()
    for name, extra in (("bias_encoding.session", 3), ("bias_encoding.place", 4)):
        state[name] = torch.cat([state[name], torch.full((extra,), 9.0)])
    wide.load_state_dict(state)
    torch.testing.assert_close(wide(batch), dsin(batch))


def test_one_session_is_all_there_is_to_choose() -> None:
    """With one session both softmaxes are 1: what W^I and W^H hold does not matter. With two it does."""
    dsin = model()
    batches = [with_sessions(3, [[5, 9, 11]]), with_sessions(3, [[5, 9], [7]])]
    before = [dsin(b) for b in batches]
    with torch.no_grad():
        dsin.choose.weight.neg_()
        dsin.choose_evolved.weight.neg_()
    assert torch.equal(dsin(batches[0]), before[0])
    assert not torch.allclose(dsin(batches[1]), before[1])


def test_nobody_has_a_session() -> None:
    dsin, batch = model(), WORLD.batch(4, history=torch.zeros(4, 3, dtype=torch.int64))
    interests, sessions = dsin._interests(batch)
    assert not interests.any()
    assert not sessions.any()
    assert dsin(batch).isfinite().all()


def test_lstm_reads_both_ways_over_real_sessions_only() -> None:
    dsin = model()
    interests = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(2))
    sessions = torch.tensor([[True] * 2 + [False] * 3, [True] * 5])
    evolved = dsin._evolved(interests, sessions)
    alone = dsin.evolution(interests[:1, :2])[0]
    torch.testing.assert_close(evolved[:1, :2], alone)


def test_finds_whether_two_items_belong_together() -> None:
    """Label: the two items of the history were seen in one session. Only a model that reads sessions can know."""
    world = World(make_spec([("user", "user", 40, 1), ("item", "item", 14, 1)]))

    def labelled(size: int, seed: int) -> Batch:
        label = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(seed))
        history = torch.randint(2, 14, (size, 2), generator=torch.Generator().manual_seed(seed + 10_000))
        times = torch.stack([torch.full((size,), 1000), torch.where(label == 1, 1060, 9000)], 1)
        return world.batch(size, seed=seed, history=history).replace(label=label.float(), history_times=times)

    def area(ranker: torch.nn.Module) -> float:
        train(ranker, world, (labelled(256, s) for s in range(100)), lr=0.01)
        test = labelled(2000, 999)
        return auc(test.label, quiet(ranker, test)[0])

    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert area(DSIN(world.spec, embedding_dim=8, hidden=(32,))) > 0.95
        assert abs(area(DIN(world.spec, embedding_dim=8, hidden=(32,))) - 0.5) < 0.05
