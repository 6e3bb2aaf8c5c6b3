"""BERT4Rec: the properties of its sheet."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from funnelrec.core.batch import Batch
from funnelrec.core.schema import Spec
from funnelrec.learn.losses import FullSoftmax, pairs
from funnelrec.match.bert4rec import BERT4Rec

ITEMS = 30
SPEC = Spec(num_users=2, num_items=ITEMS)


def model(**options: int | float) -> BERT4Rec:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = BERT4Rec(SPEC, **{"embedding_dim": 8, "max_len": 12, **options})
        with torch.no_grad():
            for parameter in made.parameters():  # far from the near-zero start, so that every difference shows
                parameter.add_(0.3 * torch.randn_like(parameter))
            made.items.weight[0] = 0
    return made.eval()


def batch(*histories: list[int], length: int = 8) -> Batch:
    rows = torch.tensor([[0] * (length - len(h)) + h for h in histories])
    return Batch(history=rows, mask=rows != 0)


def sequences(*items: list[int], length: int = 8) -> Batch:
    """As NextItem(mode="all") makes them: histories and the item after each position."""
    rows = torch.tensor([[0] * (length + 1 - len(s)) + s for s in items])
    target = rows[:, 1:].masked_fill(rows[:, :-1] == 0, 0)
    return Batch(history=rows[:, :-1], mask=rows[:, :-1] != 0, target=target)


def by_hand(made: BERT4Rec, history: list[int]) -> Tensor:
    """The equations for one sequence; None of it is hidden but `hidden_row`: [l, D]."""
    length, heads = len(history), made.blocks[0].num_heads
    vectors = torch.cat([made.items.weight, made.hidden.unsqueeze(0)])
    x = made.norm(vectors[history] + made.positions[:length].flip(0))
    for block in made.blocks:
        parts = []
        for h in range(heads):
            own = slice(h * 8 // heads, (h + 1) * 8 // heads)
            q, k, v = block.query(x)[:, own], block.key(x)[:, own], block.value(x)[:, own]
            parts.append((q @ k.T / (8 / heads) ** 0.5).softmax(1) @ v)
        x = block.attention_norm(x + block.out(torch.cat(parts, 1)))
        x = block.forward_norm(x + block.outer(F.gelu(block.inner(x))))
    return made.head_norm(F.gelu(made.head(x)))


def test_equals_the_equations_written_out() -> None:
    made = model()
    histories = [[3, 4, ITEMS, 5], [ITEMS], [9, 8, 7, ITEMS, 5, 4]]
    got = made.encode_positions(batch(*histories))
    for row, history in enumerate(histories):
        torch.testing.assert_close(got[row, 8 - len(history) :], by_hand(made, history), rtol=1e-4, atol=1e-5)
    users, valid = made.encode_users(batch([3, 4, 5], [2]))
    torch.testing.assert_close(users[0, 0], by_hand(made, [3, 4, 5, ITEMS])[-1], rtol=1e-4, atol=1e-5)
    assert valid.squeeze(1).tolist() == [True, True]


def test_an_item_looks_at_both_sides() -> None:
    made = model()
    before = made.encode_positions(batch([3, ITEMS, 5, 6]))
    for changed in ([9, ITEMS, 5, 6], [3, ITEMS, 5, 9]):
        after = made.encode_positions(batch(changed))
        assert not torch.allclose(before[0, 5], after[0, 5], atol=1e-2)


@pytest.mark.parametrize("length", [5, 11, 20])
def test_padding_changes_nothing(length: int) -> None:
    made, short = model(), batch([3, 4, 5, 6], length=4)
    long = batch([3, 4, 5, 6], length=length)
    noise = long.replace(history=torch.where(long.mask, long.history, 17))
    torch.testing.assert_close(made.encode_users(short), made.encode_users(long))
    torch.testing.assert_close(made.encode_users(short), made.encode_users(noise))


def test_the_newest_max_len_slots_are_read_the_hidden_one_included() -> None:
    made = model(max_len=3)
    torch.testing.assert_close(made.encode_users(batch([9, 9, 4, 5]))[0], made.encode_users(batch([4, 5]))[0])
    with pytest.raises(ValueError, match="histories of 8 slots exceed max_len=3"):
        made.encode_positions(batch([3]))


def test_hiding_the_newest_item_in_training_is_what_serving_asks() -> None:
    made = model()  # in evaluation the newest item alone is hidden
    cloze = made.training_input(sequences([3, 4, 5, 6], [7, 8]))
    assert cloze.history[0].tolist() == [0, 0, 0, 0, 0, 3, 4, 5, ITEMS]
    assert cloze.target[0].tolist() == [0] * 8 + [6]
    positions = made.encode_positions(cloze)
    torch.testing.assert_close(positions[:, -1], made.encode_users(batch([3, 4, 5], [7]))[0][:, 0])
    full = made.training_input(sequences(list(range(3, 18)), length=14))
    assert full.history[0].tolist() == [*range(6, 17), ITEMS], "the oldest are dropped, the hidden slot is one of 12"


@pytest.mark.parametrize(("length", "expected"), [(2, 1), (3, 1), (7, 1), (8, 2), (10, 2), (12, 2)])
def test_the_number_of_hidden_items(length: int, expected: int) -> None:
    made = model(max_len=20).train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        cloze = made.training_input(sequences(*[list(range(2, 2 + length))] * 400, length=12))
    hidden = cloze.history == ITEMS
    assert torch.equal(hidden, cloze.target > 0)
    places = torch.arange(13)
    whole = torch.where(hidden, cloze.target, cloze.history)
    assert (whole == torch.where(places >= 13 - length, places + length - 11, 0)).all(), "what was hidden is the target"
    counts = hidden.sum(1)
    if expected > 1:
        assert set(counts.tolist()) == {1, expected}
        assert hidden[counts == 1][:, -1].all(), "one example in eleven hides the newest alone"
        assert float((counts == 1).double().mean()) == pytest.approx(1 / 11, abs=0.05)
        everywhere = hidden[counts == expected][:, 13 - length :].double().mean(0)
        assert everywhere == pytest.approx(torch.full((length,), expected / length), abs=0.1)
    else:
        assert (counts == 1).all()


def test_padding_and_unknown_items_are_never_hidden_nor_targets() -> None:
    made = model(mask_share=0.9).train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        cloze = made.training_input(sequences(*[[1, 3, 1, 4]] * 50, [1, 1, 1]))
    hidden = cloze.history == ITEMS
    assert hidden[:, -4:].any(0).tolist() == [False, True, False, True]
    assert not hidden[:, :-4].any()
    assert not hidden[50].any()
    assert not (cloze.target == 1).any()
    assert torch.equal(cloze.mask, cloze.history > 0)


def test_the_last_item_is_unknown_where_nothing_came_strictly_later() -> None:
    data = sequences([3, 4, 5, 6])
    tied = data.replace(target=data.target.masked_fill(data.target == 6, 0))
    assert model().training_input(tied).history[0].tolist() == [0] * 6 + [3, 4, ITEMS]


def test_the_vector_of_a_hidden_slot_does_not_know_what_was_hidden() -> None:
    made = model()
    first, second = (made.training_input(sequences([3, 4, 5, last])) for last in (6, 7))
    assert torch.equal(made.encode_positions(first), made.encode_positions(second))
    assert first.target[0, -1] != second.target[0, -1]


def test_pairs_are_the_hidden_items_and_every_parameter_learns() -> None:
    made = model(dropout=0.0).train()
    data = sequences(*[torch.randint(2, ITEMS, (9,)).tolist() for _ in range(30)])
    users, target = pairs(made, data)
    assert users.shape == (len(target), 8)
    assert 30 <= len(target) <= 60
    FullSoftmax()(made, data).backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None and parameter.grad.to_dense().abs().sum() > 0, name
    one = batch([3, 4]).replace(target=torch.tensor([5]))
    assert made.training_input(one) is one


def test_learns_what_only_the_future_tells() -> None:
    """In x, a, y the hidden a is x + y: guessed right, where one side alone leaves six answers."""
    made = BERT4Rec(SPEC, embedding_dim=32, max_len=3, dropout=0.0, mask_share=0.34)
    made.items.dense = True
    x, y = (a.flatten() for a in torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij"))
    middle = 14 + x + y
    data = Batch(
        history=torch.stack([2 + x, torch.full_like(x, ITEMS), 8 + y], 1),
        mask=torch.ones(36, 3, dtype=torch.bool),
    )
    optimiser = torch.optim.Adam(made.parameters(), lr=0.005)
    for _ in range(150):
        optimiser.zero_grad()
        F.cross_entropy(made.encode_positions(data)[:, 1] @ made.items.weight.T, middle).backward()
        optimiser.step()
    found = (made.eval().encode_positions(data)[:, 1] @ made.items.weight.T).argmax(1)
    assert (found == middle).double().mean() > 0.95


def test_messages_name_what_was_received() -> None:
    with pytest.raises(ValueError, match="num_heads must divide embedding_dim, received 3 and 8"):
        BERT4Rec(SPEC, embedding_dim=8, num_heads=3)
    with pytest.raises(ValueError, match=r"mask_share must lie between 0 and 1, received 1.0"):
        BERT4Rec(SPEC, mask_share=1.0)
    with pytest.raises(ValueError, match="max_len must be at least 2"):
        BERT4Rec(SPEC, max_len=1)
    with pytest.raises(ValueError, match="BERT4Rec needs a catalogue"):
        BERT4Rec(Spec())
