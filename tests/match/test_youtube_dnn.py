"""YouTubeDNN (retrieval): the properties of its sheet."""

from __future__ import annotations

import math

import pytest
import torch

from funnelrec.core.batch import Batch
from funnelrec.core.schema import Spec
from funnelrec.match.youtube_dnn import YouTubeDNN

SPEC = Spec(num_users=2, num_items=30)
DAY = 86_400


def model(**options: object) -> YouTubeDNN:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return YouTubeDNN(SPEC, **{"embedding_dim": 8, "hidden": (16,), "max_len": 12, **options}).eval()


def batch(*histories: list[int], length: int = 6, days: int = 100) -> Batch:
    rows = torch.tensor([[0] * (length - len(h)) + h for h in histories])
    return Batch(history=rows, mask=rows != 0, time=torch.full((len(rows),), days * DAY))


def test_by_hand() -> None:
    """Watches (1, 0) and (0, 2), 3 days old: the mean is (.5, 1), the age log 4."""
    made = YouTubeDNN(SPEC, embedding_dim=2, hidden=())
    with torch.no_grad():
        made.watched.weight[4], made.watched.weight[5] = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
        made.tower.layers[0].weight.copy_(torch.tensor([[2.0, 1.0, 1.0], [1.0, 1.0, -3.0]]))
        made.tower.layers[0].bias.copy_(torch.tensor([0.5, 0.0]))
    made.age(batch([4], days=103))  # the newest example of training
    user, valid = made.encode_users(batch([4, 5]))
    torch.testing.assert_close(user[0, 0], torch.tensor([2.5 + math.log(4), 0.0]))  # 1.5 - 3 log 4 is below 0
    torch.testing.assert_close(made.eval().encode_users(batch([4, 5]))[0][0, 0], torch.tensor([2.5, 1.5]))
    assert valid.tolist() == [[True]]


def test_order_does_not_matter_and_padding_changes_nothing() -> None:
    made = model()
    expected = made.encode_users(batch([3, 4, 5]))[0]
    torch.testing.assert_close(made.encode_users(batch([5, 3, 4]))[0], expected)
    long = batch([3, 4, 5], length=11)
    torch.testing.assert_close(made.encode_users(long)[0], expected)
    noise = long.replace(history=torch.where(long.mask, long.history, 17))
    torch.testing.assert_close(made.encode_users(noise)[0], expected)
    assert not torch.allclose(made.encode_users(batch([3, 4, 6]))[0], expected)


def test_age_is_counted_back_from_the_newest_example_in_training_alone() -> None:
    made = model().train()
    assert made.age(batch([3], [4], days=10)).tolist() == [0, 0]
    data = batch([3], [4], [5]).replace(time=torch.tensor([10 * DAY, 9 * DAY, 12 * DAY + DAY // 2]))
    torch.testing.assert_close(made.age(data), torch.tensor([2.5, 3.5, 0.0]))
    assert (made.age(batch([3], days=2)) == 10.5).all()
    old = made.encode_users(batch([3], days=2))[0]
    made.eval()
    assert not made.age(batch([3], days=2)).any()
    assert not torch.allclose(made.encode_users(batch([3], days=2))[0], old), "age must change scores"
    assert int(made.latest) == 12 * DAY + DAY // 2
    assert not made.train().age(Batch(history=torch.tensor([[3]]), mask=torch.tensor([[True]]))).any()


def test_age_takes_the_blame_for_what_was_liked_long_ago() -> None:
    """Item 5 was the hit of the first half, item 6 is that of the second: today's answer is 6, without age it is 5."""
    generator = torch.Generator().manual_seed(0)
    history = torch.randint(7, 30, (1200, 5), generator=generator)
    day = torch.arange(1200) // 4
    target = torch.where(day < 200, 5, 6)  # two thirds of the examples are of the old hit
    data = Batch(history=history, mask=history > 0, time=day * DAY, target=target)

    def share_of_the_new(aged: bool) -> float:
        made = model(embedding_dim=8).train()
        optimiser = torch.optim.Adam(made.parameters(), lr=0.01)
        made.items.dense = made.watched.dense = True
        seen = data if aged else Batch(**{k: v for k, v in data.items() if k != "time"})
        for _ in range(60):
            optimiser.zero_grad()
            users = made.encode_users(seen)[0][:, 0]
            torch.nn.functional.cross_entropy(users @ made.encode_items(torch.arange(30)).T, target).backward()
            optimiser.step()
        scores = made.eval().encode_users(seen)[0][:, 0] @ made.encode_items(torch.arange(30)).T
        return float((scores.argmax(1) == 6).double().mean())

    assert share_of_the_new(True) > 0.95
    assert share_of_the_new(False) < 0.2


def test_two_tables_and_no_negative_coordinate() -> None:
    made = model()
    users = made.encode_users(batch([3, 4], [5], [9, 9, 2]))[0]
    assert (users >= 0).all()
    with torch.no_grad():
        made.items.weight.add_(1.0)
    torch.testing.assert_close(made.encode_users(batch([3, 4], [5], [9, 9, 2]))[0], users)


def test_empty_and_unknown_histories_are_not_valid_and_stay_finite() -> None:
    made = model().train()
    users, valid = made.encode_users(batch([], [1, 1], [1, 4]))
    assert valid.squeeze(1).tolist() == [False, False, True]
    users.sum().backward()
    assert all(p.grad is None or p.grad.to_dense().isfinite().all() for p in made.parameters())


def test_messages_name_what_was_received() -> None:
    with pytest.raises(ValueError, match="YouTubeDNN needs a catalogue; the spec has 0 item rows"):
        YouTubeDNN(Spec())
