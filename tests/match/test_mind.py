"""MIND: the properties of its sheet, and the faults of published versions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from funnelrec.core.batch import Batch
from funnelrec.core.nn.capsule import squash
from funnelrec.core.schema import Spec
from funnelrec.match.mind import MIND
from tests.match.planted import trained_on_topics

SPEC = Spec(num_users=2, num_items=30)


def model(**options: object) -> MIND:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = MIND(SPEC, **{"embedding_dim": 8, "num_interests": 3, "max_len": 12, **options})
        with torch.no_grad():
            made.items.weight.mul_(30)  # far from the near-zero start, so that every difference shows
    return made.eval()


def batch(*histories: list[int], length: int = 8) -> Batch:
    rows = torch.tensor([[0] * (length - len(h)) + h for h in histories])
    return Batch(history=rows, mask=rows != 0)


def test_equals_algorithm_1_written_out() -> None:
    made, history = model(), [3, 4, 5, 9, 3, 7, 8, 2]
    low = made.items.weight[history] @ made.bilinear.weight.T  # (L, D)
    b = made.routing[:8].flip(0).clone()  # (L, K)
    for _ in range(3):
        w = b.softmax(1)
        u = torch.stack([squash((w[:, j : j + 1] * low).sum(0)) for j in range(3)])
        b = b + low @ u.T
    interests, valid = made.encode_users(batch(history))
    torch.testing.assert_close(interests[0], u)
    assert valid.tolist() == [[True] * 3]
    assert (interests.norm(dim=2) < 1).all()


@pytest.mark.parametrize(("length", "expected"), [(1, 1), (2, 1), (3, 1), (4, 2), (7, 2), (8, 3), (11, 3)])
def test_the_number_of_interests_grows_with_the_logarithm(length: int, expected: int) -> None:
    interests, valid = model().encode_users(batch([5] * length, length=12))
    assert valid.sum() == expected
    assert valid[0].tolist() == [k < expected for k in range(3)]
    assert not interests[0, expected:].any()
    assert model(adaptive=False).encode_users(batch([5] * length, length=12))[1].all()


def test_a_single_interest_is_the_squashed_sum_whatever_the_iterations() -> None:
    for options in ({"num_interests": 1}, {"num_interests": 1, "iterations": 7}, {}):
        made, history = model(**options), [3, 4, 5]  # three items have one interest
        expected = squash(made.bilinear(made.items.weight[history]).sum(0))
        torch.testing.assert_close(made.encode_users(batch(history))[0][0, 0], expected)


def test_two_eval_calls_are_the_same_bits_and_the_logits_travel_with_the_weights() -> None:
    made, data = model(), batch([3, 4, 5, 6, 7, 8, 9, 10])
    first = made.encode_users(data)[0]
    assert torch.equal(first, made.encode_users(data)[0])
    other = MIND(SPEC, embedding_dim=8, num_interests=3, max_len=12).eval()  # drawn elsewhere
    assert not torch.equal(other.routing, made.routing)
    other.load_state_dict(made.state_dict())
    assert torch.equal(other.encode_users(data)[0], first)


def test_equal_logits_would_make_all_interests_equal() -> None:
    made, data = model(), batch([3, 4, 5, 6, 7, 8, 9, 10])
    interests = made.encode_users(data)[0][0]
    assert not torch.allclose(interests[0], interests[1], atol=0.05)
    made.routing.zero_()
    interests = made.encode_users(data)[0][0]
    torch.testing.assert_close(interests, interests[:1].expand(3, 8))


@pytest.mark.parametrize("length", [5, 12, 20])
def test_padding_takes_no_share(length: int) -> None:
    made, short = model(), batch([3, 4, 5, 6], length=4)
    long = batch([3, 4, 5, 6], length=length)
    noise = long.replace(history=torch.where(long.mask, long.history, 17))
    torch.testing.assert_close(made.encode_users(short), made.encode_users(long))
    torch.testing.assert_close(made.encode_users(short), made.encode_users(noise))


def test_items_that_move_with_their_logits_change_nothing() -> None:
    made = model()
    before = made.encode_users(batch([3, 4, 5, 6]))[0]
    order = [2, 0, 3, 1]
    moved = [[3, 4, 5, 6][i] for i in order]
    assert not torch.allclose(made.encode_users(batch(moved))[0], before)
    made.routing[:4] = made.routing[:4].flip(0)[order].flip(0)
    torch.testing.assert_close(made.encode_users(batch(moved))[0], before)


def interests_of_two() -> tuple[Tensor, Tensor, Tensor]:
    interests = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]]], requires_grad=True)
    return interests, torch.tensor([[True, True, False]]), torch.tensor([[2.0, 1.0]])


def test_label_aware_attention_by_hand() -> None:
    interests, valid, target = interests_of_two()
    even = model(sharpness=0).user_for_target(interests, valid, target)
    torch.testing.assert_close(even, torch.tensor([[0.5, 0.5]]))
    # products 2 and 1 (and 15 of no interest): softmax(p · (2, 1)) = σ(p), 1 - σ(p)
    soft = model(sharpness=1).user_for_target(interests, valid, target)
    torch.testing.assert_close(soft, torch.tensor([[0.7310586, 0.2689414]]))
    for hard in (None, 60.0):
        torch.testing.assert_close(
            model(sharpness=hard).user_for_target(interests, valid, target), torch.tensor([[1.0, 0.0]])
        )


def test_only_the_closest_interest_learns_unless_attention_is_soft() -> None:
    for sharpness, trained in ((None, [True, False, False]), (1.0, [True, True, False])):
        interests, valid, target = interests_of_two()
        model(sharpness=sharpness).user_for_target(interests, valid, target).square().sum().backward()
        assert interests.grad is not None
        assert (interests.grad[0].abs().sum(1) > 0).tolist() == trained


def test_with_a_tower_every_parameter_learns() -> None:
    made = model(hidden=(16,), sharpness=1).train()
    data = batch([3, 4, 5, 6, 7, 8, 9, 10], [2, 3, 4, 2])
    interests, valid = made.encode_users(data)
    assert interests.shape == (2, 3, 8)
    made.user_for_target(interests, valid, made.encode_items(torch.tensor([5, 6]))).square().sum().backward()
    assert all(p.grad is not None and p.grad.to_dense().abs().sum() > 0 for p in made.parameters())


def test_empty_and_unknown_histories_are_not_valid_and_stay_finite() -> None:
    made = model().train()
    interests, valid = made.encode_users(batch([], [1, 1], [1, 4]))
    assert valid.any(1).tolist() == [False, False, True]
    interests.sum().backward()
    assert all(p.grad.to_dense().isfinite().all() for p in made.parameters())


def test_the_interests_recover_planted_topics() -> None:
    before, after = trained_on_topics(lambda spec: MIND(spec, embedding_dim=16, num_interests=4, max_len=20))
    assert before < 0.4 < 0.8 < after, (before, after)


def test_a_softmax_over_the_items_would_depend_on_the_padding() -> None:
    """The fault of two published versions: what padding takes of the softmax is lost to the items."""
    made, history = model(), [3, 4, 5, 6]
    low = made.items.weight[history] @ made.bilinear.weight.T

    def one_round(padding: int) -> Tensor:
        b = torch.cat([torch.zeros(padding, 3), made.routing[:4].flip(0)])
        return b.softmax(0)[padding:].T @ low

    assert not torch.allclose(one_round(0), one_round(4), atol=1e-2)


def test_messages_name_what_was_received() -> None:
    with pytest.raises(ValueError, match="at least 1, received 0 and 3"):
        MIND(SPEC, num_interests=0)
    with pytest.raises(ValueError, match="sharpness must be at least 0 or None, received -1"):
        MIND(SPEC, sharpness=-1)
    with pytest.raises(ValueError, match="MIND needs a catalogue; the spec has 0 item rows"):
        MIND(Spec())
