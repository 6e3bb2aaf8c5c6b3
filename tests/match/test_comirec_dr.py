"""ComiRec-DR: the properties of its sheet, and the faults of published versions."""

from __future__ import annotations

import pytest
import torch

from funnelrec.core.batch import Batch
from funnelrec.core.nn.capsule import squash
from funnelrec.core.schema import Spec
from funnelrec.match.comirec_dr import ComiRecDR
from tests.match.planted import trained_on_topics

SPEC = Spec(num_users=2, num_items=30)


def model(**options: int) -> ComiRecDR:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = ComiRecDR(SPEC, **{"embedding_dim": 8, "num_interests": 3, "max_len": 12, **options})
        with torch.no_grad():
            made.items.weight.mul_(30)  # far from the near-zero start, so that every difference shows
    return made.eval()


def batch(*histories: list[int], length: int = 8) -> Batch:
    rows = torch.tensor([[0] * (length - len(h)) + h for h in histories])
    return Batch(history=rows, mask=rows != 0)


def test_equals_algorithm_1_written_out() -> None:
    made, history = model(), [3, 4, 5, 9]
    maps = made.votes.maps.unflatten(2, (3, 8))  # (slot, D, K, D)
    votes = torch.stack(
        [
            torch.stack([made.items.weight[row] @ maps[3 - slot, :, k] for k in range(3)])
            for slot, row in enumerate(history)
        ]
    )  # (L, K, D)
    torch.testing.assert_close(made.votes(made.items.weight[history].unsqueeze(0))[0], votes)
    b = torch.zeros(4, 3)
    for _ in range(3):
        c = b.softmax(1)
        v = squash((c.unsqueeze(2) * votes).sum(0))
        b = b + (votes * v).sum(2)
    interests, valid = made.encode_users(batch(history))
    torch.testing.assert_close(interests[0], v)
    assert valid.tolist() == [[True, True, True]]
    assert (interests.norm(dim=2) < 1).all()


def test_one_interest_takes_everything_whatever_the_iterations() -> None:
    made, history = model(num_interests=1), [3, 4, 5]
    expected = squash(sum(made.items.weight[row] @ made.votes.maps[2 - slot] for slot, row in enumerate(history)))
    torch.testing.assert_close(made.encode_users(batch(history))[0][0, 0], expected)
    made.iterations = 6
    torch.testing.assert_close(made.encode_users(batch(history))[0][0, 0], expected)


def test_the_place_of_an_item_matters() -> None:
    made = model()
    assert not torch.allclose(made.encode_users(batch([3, 4, 5]))[0], made.encode_users(batch([5, 4, 3]))[0], atol=1e-2)
    with torch.no_grad():
        made.votes.maps[:] = made.votes.maps[0]
    torch.testing.assert_close(made.encode_users(batch([3, 4, 5]))[0], made.encode_users(batch([5, 4, 3]))[0])


@pytest.mark.parametrize("length", [5, 12, 20])
def test_padding_changes_nothing(length: int) -> None:
    made, short = model(), batch([3, 4, 5, 6], length=4)
    long = batch([3, 4, 5, 6], length=length)
    noise = long.replace(history=torch.where(long.mask, long.history, 17))
    torch.testing.assert_close(made.encode_users(short), made.encode_users(long))
    torch.testing.assert_close(made.encode_users(short), made.encode_users(noise))


def test_only_the_newest_max_len_items_are_read() -> None:
    made = model(max_len=3)
    torch.testing.assert_close(made.encode_users(batch([9, 9, 3, 4, 5]))[0], made.encode_users(batch([3, 4, 5]))[0])


def test_every_weight_is_drawn() -> None:
    """A published version leaves the maps as the memory was: zeros, or not numbers."""
    for _ in range(3):
        maps = ComiRecDR(SPEC, embedding_dim=8, num_interests=3, max_len=12).votes.maps.detach()
        assert maps.isfinite().all()
        noise = maps - torch.eye(8).repeat(1, 3)
        assert float(noise.std()) == pytest.approx(8**-0.5, rel=0.1)


def test_a_target_trains_only_its_closest_interest() -> None:
    made, data = model().train(), batch([3, 4, 5, 6])
    interests, valid = made.encode_users(data)
    chosen = made.user_for_target(interests, valid, made.encode_items(torch.tensor([7])))
    best = int((interests[0] @ made.items.weight[7]).argmax())
    torch.testing.assert_close(chosen[0], interests[0, best])
    chosen.square().sum().backward()
    gradient = made.votes.maps.grad[:4].unflatten(2, (3, 8)).abs().sum((0, 1, 3))
    assert (gradient > 0).tolist() == [k == best for k in range(3)]


def test_empty_and_unknown_histories_are_not_valid_and_stay_finite() -> None:
    made = model().train()
    interests, valid = made.encode_users(batch([], [1, 1], [1, 4]))
    assert valid.any(1).tolist() == [False, False, True]
    assert not interests[0].any()
    interests.sum().backward()
    assert all(p.grad.to_dense().isfinite().all() for p in made.parameters())


def test_the_interests_recover_planted_topics() -> None:
    before, after = trained_on_topics(lambda spec: ComiRecDR(spec, embedding_dim=16, num_interests=4, max_len=20))
    assert before < 0.4 < 0.8 < after, (before, after)


def test_messages_name_what_was_received() -> None:
    with pytest.raises(ValueError, match="at least 1, received 3 and 0"):
        ComiRecDR(SPEC, num_interests=3, iterations=0)
    with pytest.raises(ValueError, match="ComiRec-DR needs a catalogue; the spec has 0 item rows"):
        ComiRecDR(Spec())
