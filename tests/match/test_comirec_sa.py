"""ComiRec-SA: what its sheet and its paper promise."""

from __future__ import annotations

import pytest
import torch

from funnelrec.core.batch import Batch
from funnelrec.core.schema import Spec
from funnelrec.match.comirec_sa import ComiRecSA
from tests.match.planted import trained_on_topics

SPEC = Spec(num_users=2, num_items=30)


def model(**options: int | float) -> ComiRecSA:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = ComiRecSA(SPEC, **{"embedding_dim": 8, "num_interests": 3, "max_len": 12, **options})
        with torch.no_grad():
            made.positions.normal_()
            made.items.weight.mul_(20)  # far from the near-zero start, so that every difference shows
    return made.eval()


def batch(*histories: list[int], length: int = 8) -> Batch:
    rows = torch.tensor([[0] * (length - len(h)) + h for h in histories])
    return Batch(history=rows, mask=rows != 0)


def test_equals_the_equations_written_out() -> None:
    made, history = model(), [3, 4, 5, 9]
    h = made.items.weight[history]  # (L, D)
    hidden = torch.tanh((h + made.positions[:4].flip(0)) @ made.inner.weight.T + made.inner.bias)
    attention = (hidden @ made.outer.weight.T).softmax(0)  # (L, K)
    interests, valid = made.encode_users(batch(history))
    torch.testing.assert_close(interests[0], attention.T @ h)
    torch.testing.assert_close(made.attention(batch(history))[0, :, 4:], attention.T)
    assert valid.tolist() == [[True, True, True]]


def test_attention_sums_to_one_over_the_real_items() -> None:
    weights = model().attention(batch([3, 4, 5], [6], []))
    torch.testing.assert_close(weights.sum(2), torch.tensor([[1.0] * 3, [1.0] * 3, [0.0] * 3]))
    assert not weights[0, :, :5].any()


def test_one_interest_of_one_item_is_the_item() -> None:
    made = model()
    torch.testing.assert_close(made.encode_users(batch([6]))[0][0], made.items.weight[6].expand(3, 8))


def test_equal_columns_of_w2_give_equal_interests() -> None:
    made = model()
    with torch.no_grad():
        made.outer.weight[:] = made.outer.weight[0]
    interests = made.encode_users(batch([3, 4, 5]))[0][0]
    torch.testing.assert_close(interests, interests[:1].expand(3, 8))


def test_without_positions_order_does_not_matter() -> None:
    made = model()
    one, other = batch([3, 4, 5, 6]), batch([6, 4, 3, 5])
    assert not torch.allclose(made.encode_users(one)[0], made.encode_users(other)[0])
    with torch.no_grad():
        made.positions.zero_()
    torch.testing.assert_close(made.encode_users(one)[0], made.encode_users(other)[0])


@pytest.mark.parametrize("length", [5, 9, 12, 20])
def test_padding_changes_nothing(length: int) -> None:
    made, short = model(), batch([3, 4, 5, 6], length=4)
    long = batch([3, 4, 5, 6], length=length)
    noise = long.replace(history=torch.where(long.mask, long.history, 17))
    torch.testing.assert_close(made.encode_users(short)[0], made.encode_users(long)[0])
    torch.testing.assert_close(made.encode_users(short)[0], made.encode_users(noise)[0])


def test_only_the_newest_max_len_items_are_read() -> None:
    made = model(max_len=3)
    torch.testing.assert_close(made.encode_users(batch([9, 9, 3, 4, 5]))[0], made.encode_users(batch([3, 4, 5]))[0])


def test_a_target_trains_only_its_closest_interest() -> None:
    made = model()
    interests = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    target = made.encode_items(torch.tensor([7, 9]))
    valid = torch.ones(2, 3, dtype=torch.bool)
    chosen = made.user_for_target(interests, valid, target)
    best = (interests @ target.unsqueeze(-1)).squeeze(-1).argmax(1)
    assert torch.equal(chosen, interests[torch.arange(2), best])
    chosen.square().sum().backward()
    trained = interests.grad.abs().sum(2) > 0
    assert torch.equal(trained, torch.nn.functional.one_hot(best, 3).bool())
    # an interest that is not valid is never chosen
    valid[0, best[0]] = False
    assert not torch.equal(made.user_for_target(interests, valid, target)[0], chosen[0])


def test_empty_and_unknown_histories_are_not_valid_and_stay_finite() -> None:
    made = model(penalty=1.0).train()
    data = batch([], [1, 1], [1, 4])
    interests, valid = made.encode_users(data)
    assert valid.any(1).tolist() == [False, False, True]
    assert not interests[0].any()
    (interests.sum() + made.training_terms(data)["overlap"]).backward()
    assert all(p.grad.to_dense().isfinite().all() for p in made.parameters())


def test_the_penalty_is_the_overlap_of_the_interests() -> None:
    assert model().training_terms(batch([3, 4])) == {}
    made, data = model(penalty=0.5), batch([3, 4, 5], [])
    weights = made.attention(data)[0]
    by_hand = 0.5 * (weights @ weights.T - torch.eye(3)).square().sum()
    torch.testing.assert_close(made.training_terms(data)["overlap"], by_hand)


def test_every_parameter_learns() -> None:
    made, data = model(penalty=0.1), batch([3, 4, 5, 6], [7, 8], length=12)
    loss = (made.encode_users(data)[0] * torch.arange(8)).sum() + made.training_terms(data)["overlap"]
    loss.backward()
    for name, parameter in made.named_parameters():
        gradient = parameter.grad.to_dense()
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0, name


def test_the_interests_recover_planted_topics() -> None:
    before, after = trained_on_topics(lambda spec: ComiRecSA(spec, embedding_dim=16, num_interests=4, max_len=20))
    assert before < 0.6 < after, (before, after)


def test_messages_name_what_was_received() -> None:
    with pytest.raises(ValueError, match="num_interests must be at least 1, received 0"):
        ComiRecSA(SPEC, num_interests=0)
    with pytest.raises(ValueError, match="needs a catalogue; the spec has 0 item rows"):
        ComiRecSA(Spec())
