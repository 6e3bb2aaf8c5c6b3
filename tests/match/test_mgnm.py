"""MGNM: the properties of its sheet, and the faults of the authors' code."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from funnelrec.core.batch import Batch
from funnelrec.core.nn.capsule import route, squash
from funnelrec.core.schema import Spec
from funnelrec.match.mgnm import MGNM
from tests.match.planted import trained_on_topics

SPEC = Spec(num_users=6, num_items=30)


def model(**options: int | float) -> MGNM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = MGNM(SPEC, **{"embedding_dim": 8, "num_interests": 3, "max_len": 12, "user_dropout": 0.0, **options})
        with torch.no_grad():
            made.items.weight.mul_(6)  # far from the near-zero start, so that every difference shows
    return made.eval()


def batch(*histories: list[int], length: int = 8, user: int = 3) -> Batch:
    rows = torch.tensor([[0] * (length - len(h)) + h for h in histories])
    return Batch(history=rows, mask=rows != 0, user=torch.full((len(rows),), user))


def reference(made: MGNM, history: list[int], user: int) -> Tensor:
    """The equations for one history, pair by pair and step by step: [levels · K, D]."""
    x, u = made.items.weight[history], made.users.weight[user]
    n = len(history)
    a = torch.stack([torch.stack([torch.sigmoid((x[i] * x[j] * u).sum()) for j in range(n)]) for i in range(n)])
    hat = a + torch.eye(n)
    degree = hat.sum(1).rsqrt()
    levels = [x]
    for convolution in made.convolutions:
        mixed = torch.diag(degree) @ hat @ torch.diag(degree) @ levels[-1]
        levels.append(F.leaky_relu(convolution(mixed), 0.2))
    found = []
    for capsules, h in zip(made.capsules, levels, strict=True):
        maps = capsules.votes.maps.unflatten(2, (3, 8))
        votes = torch.stack([torch.stack([h[i] @ maps[n - 1 - i, :, k] for k in range(3)]) for i in range(n)])
        b = torch.einsum("kd,lkd->lk", squash(votes.sum(0) / 3), votes)
        flat = votes.flatten(1)
        states = [capsules.forwards(flat)[0], capsules.backwards(flat.flip(0))[0].flip(0)]
        ordered = capsules.out(torch.cat(states, 1)).view(votes.shape)
        votes = votes + ordered
        for last in (False, True):
            z = squash((b.softmax(1).unsqueeze(2) * votes).sum(0))
            b = b if last else b + torch.einsum("kd,lkd->lk", z, votes)
        found.append(z)
    return torch.cat(found)


def test_equals_the_equations_written_out() -> None:
    made = model()
    histories = [[3, 4, 5, 9], [7], [2, 8, 8, 12, 20, 4, 29]]
    interests, valid = made.encode_users(batch(*histories))
    assert interests.shape == (3, 9, 8)
    assert valid.all()
    for row, history in enumerate(histories):
        torch.testing.assert_close(interests[row], reference(made, history, 3), rtol=1e-4, atol=1e-5)


def test_the_graph_is_symmetric_between_0_and_1_and_empty_at_padding() -> None:
    made, data = model(), batch([3, 4, 5], [6, 7, 8, 9, 10], [])
    graph = made.graph(made.items(data.history), data.mask, data.user)
    torch.testing.assert_close(graph, graph.transpose(1, 2))
    assert ((graph >= 0) & (graph <= 1)).all()
    real = data.mask.unsqueeze(1) & data.mask.unsqueeze(2)
    assert torch.equal(graph > 0, real)


def test_the_graph_is_the_users_own() -> None:
    made, history = model(), [3, 4, 5, 6]
    mine, hers = (made.encode_users(batch(history, user=u))[0] for u in (3, 4))
    assert not torch.allclose(mine, hers, atol=1e-3)
    torch.testing.assert_close(mine[:, :3], hers[:, :3])  # level 0 knows no graph
    stranger = batch(history, user=1)
    graph = made.graph(made.items(stranger.history), stranger.mask, stranger.user)
    assert (graph[0, 4:, 4:] == 0.5).all()
    nobody = Batch(**{k: v for k, v in stranger.items() if k != "user"})
    assert torch.equal(made.encode_users(nobody)[0], made.encode_users(stranger)[0])


def test_each_level_convolves_the_one_before() -> None:
    made, data = model(num_layers=3), batch([3, 4, 5, 6], [7, 8])
    x = made.items(data.history)
    nothing = torch.zeros(2, 8, 8)
    with torch.no_grad():
        for convolution in made.convolutions:
            convolution.weight.copy_(2 * torch.eye(8))
    levels = made.levels(x.abs(), data.mask, nothing)  # without links an item keeps to itself
    for depth, level in enumerate(levels):
        torch.testing.assert_close(level, x.abs() * 2**depth)


def test_without_convolutions_there_is_one_level_and_no_user() -> None:
    raw, deep = model(num_layers=0, penalty=0), model(num_layers=2)
    raw.load_state_dict(deep.state_dict(), strict=False)
    data = batch([3, 4, 5, 6])
    torch.testing.assert_close(raw.encode_users(data)[0], deep.encode_users(data)[0][:, :3])
    assert torch.equal(raw.encode_users(batch([3, 4, 5, 6], user=5))[0], raw.encode_users(data)[0])


@pytest.mark.parametrize("length", [5, 12, 20])
def test_padding_changes_nothing(length: int) -> None:
    made, short = model(), batch([3, 4, 5, 6], length=4)
    long = batch([3, 4, 5, 6], length=length)
    noise = long.replace(history=torch.where(long.mask, long.history, 17))
    torch.testing.assert_close(made.encode_users(short), made.encode_users(long))
    torch.testing.assert_close(made.encode_users(short), made.encode_users(noise))


def test_no_example_reaches_another_through_the_recurrence() -> None:
    """The authors' code puts the two directions side by side along the wrong axis, which mixes the batch."""
    made = model()
    together = made.encode_users(batch([3, 4, 5, 6], [7, 8, 9], [10]))[0]
    for row, history in enumerate([[3, 4, 5, 6], [7, 8, 9], [10]]):
        torch.testing.assert_close(together[row], made.encode_users(batch(history))[0][0], rtol=1e-4, atol=1e-5)


def test_order_enters_by_the_maps_and_the_recurrence_alone() -> None:
    made = model()
    one, other = batch([3, 4, 5, 6]), batch([6, 5, 4, 3])
    with torch.no_grad():
        for capsules in made.capsules:
            capsules.votes.maps[:] = capsules.votes.maps[0]
    assert not torch.allclose(made.encode_users(one)[0], made.encode_users(other)[0], atol=1e-3)
    for capsules in made.capsules:
        capsules.in_order = lambda votes, mask: torch.zeros_like(votes)  # type: ignore[method-assign]
    torch.testing.assert_close(made.encode_users(one)[0], made.encode_users(other)[0])
    h = made.items(one.history)
    plain = route(made.capsules[0].votes(h), one.mask, iterations=3)
    torch.testing.assert_close(made.encode_users(one)[0][:, :3], plain)  # ComiRec-DR's routing


def test_the_attentive_readout_by_hand() -> None:
    """Two levels of two interests; products 1 and 0, then 3 and 3."""
    made = MGNM(SPEC, embedding_dim=2, num_interests=2, num_layers=1)
    interests = torch.tensor([[[1.0, 5.0], [0.0, 7.0], [3.0, 1.0], [3.0, -1.0]]])
    valid, target = torch.ones(1, 4, dtype=torch.bool), torch.tensor([[1.0, 0.0]])
    first, second = torch.tensor([[0.7310586, 5 * 0.7310586 + 7 * 0.2689414]]), torch.tensor([[3.0, 0.0]])
    torch.testing.assert_close(made.eval().user_for_target(interests, valid, target), second)  # 3 > .731
    with torch.random.fork_rng():
        torch.manual_seed(0)
        many = made.train().user_for_target(interests.repeat(400, 1, 1), valid.repeat(400, 1), target.repeat(400, 1))
    of_first = torch.isclose(many, first).all(1)
    assert torch.isclose(many[~of_first], second).all()
    assert float(of_first.double().mean()) == pytest.approx(0.5, abs=0.08)


def test_the_penalty_is_the_mean_link() -> None:
    assert model(penalty=0).training_terms(batch([3, 4])) == {}
    made, data = model(penalty=0.5), batch([3, 4, 5], [6], [])
    graph = made.graph(made.items(data.history), data.mask, data.user)
    torch.testing.assert_close(made.training_terms(data)["graph"], 0.5 * graph.sum() / (9 + 1))
    assert float(made.training_terms(batch([]))["graph"].detach()) == 0


def test_users_are_unknown_at_times_in_training_alone() -> None:
    made = model(user_dropout=0.5)
    data = batch(*[[3, 4]] * 400)
    assert (made._user(data) == 3).all()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = made.train()._user(data)
    assert set(drawn.tolist()) == {1, 3}
    assert float((drawn == 1).double().mean()) == pytest.approx(0.5, abs=0.08)


def test_empty_and_unknown_histories_are_not_valid_and_stay_finite() -> None:
    made = model().train()
    data = batch([], [1, 1], [1, 4])
    interests, valid = made.encode_users(data)
    assert valid.any(1).tolist() == [False, False, True]
    assert not interests[0].any()
    (interests.sum() + made.training_terms(data)["graph"]).backward()
    assert all(p.grad.to_dense().isfinite().all() for p in made.parameters())


def test_the_interests_recover_planted_topics() -> None:
    def make(spec: Spec) -> MGNM:
        made = MGNM(replace(spec, num_users=5), embedding_dim=16, num_interests=4, num_layers=1, max_len=20)
        made.users.dense = True
        return made

    before, after = trained_on_topics(make, steps=160)
    assert before < 0.45 < 0.65 < after, (before, after)


def test_messages_name_what_was_received() -> None:
    with pytest.raises(ValueError, match="received num_interests=0, num_layers=2, iterations=3"):
        MGNM(SPEC, num_interests=0)
    with pytest.raises(ValueError, match="must be even, received 7"):
        MGNM(SPEC, embedding_dim=7)
    with pytest.raises(ValueError, match="MGNM needs users; the spec has 0 user rows"):
        MGNM(Spec(num_items=9))
    with pytest.raises(ValueError, match="MGNM needs a catalogue; the spec has 0 item rows"):
        MGNM(Spec(num_users=9))
