"""SASRec: what its sheet and its paper promise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from funnelrec.core.batch import Batch
from funnelrec.core.schema import Spec
from funnelrec.match.sasrec import SASRec

SPEC = Spec(num_users=2, num_items=30)


def model(**options: int | float) -> SASRec:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = SASRec(SPEC, **{"embedding_dim": 8, "max_len": 12, "dropout": 0.0, **options})
        with torch.no_grad():
            for parameter in made.parameters():  # far from the near-zero start, so that every difference shows
                parameter.add_(0.2 * torch.randn_like(parameter))
            made.items.weight[0] = 0
    return made.eval()


def batch(*histories: list[int], length: int = 8) -> Batch:
    rows = torch.tensor([[0] * (length - len(h)) + h for h in histories])
    return Batch(history=rows, mask=rows != 0)


def by_hand(made: SASRec, history: list[int]) -> Tensor:
    """The equations for one history of one head, with an explicit mask: [l, D]."""
    length = len(history)
    x = made.items.weight[history] * made.items.dim**0.5 + made.positions[:length].flip(0)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    for block in made.blocks:
        q = block.attention_norm(x)
        scores = block.query(q) @ block.key(x).T / made.items.dim**0.5
        x = q + scores.masked_fill(~causal, -torch.inf).softmax(-1) @ block.value(x)
        y = block.forward_norm(x)
        x = y + block.outer(torch.relu(block.inner(y)))
    return made.norm(x)


def test_equals_the_equations_written_out() -> None:
    made = model()
    histories = [[3, 4, 5], [7], [9, 8, 7, 6, 5, 4], [2, 2, 3, 9, 29]]
    states = made.encode_positions(batch(*histories))
    for row, history in enumerate(histories):
        torch.testing.assert_close(states[row, 8 - len(history) :], by_hand(made, history), rtol=1e-4, atol=1e-5)
        assert not states[row, : 8 - len(history)].any()  # padding is zero


def test_the_many_groups_of_attention_change_nothing() -> None:
    made = model(num_heads=2)
    generator = torch.Generator().manual_seed(1)
    histories = [
        torch.randint(2, 30, (n,), generator=generator).tolist() for n in [5, 1, 8, 3, 3, 7, 2, 8, 6, 4, 5, 1, 2, 6]
    ]
    together = made.encode_positions(batch(*histories))
    alone = torch.cat([made.encode_positions(batch(h)) for h in histories])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_the_user_is_the_state_after_the_newest_item() -> None:
    made = model()
    data = batch([3, 4, 5], [], [6, 7])
    users, valid = made.encode_users(data)
    torch.testing.assert_close(users[:, 0], made.encode_positions(data)[:, -1])
    assert valid[:, 0].tolist() == [True, False, True]
    assert not users[1].any()


def test_a_later_item_changes_no_earlier_state() -> None:
    made = model()
    before = made.encode_positions(batch([3, 4, 5, 6, 7]))
    after = made.encode_positions(batch([3, 4, 5, 9, 10]))
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6:], after[:, 6:])


def test_no_gradient_flows_from_a_state_to_later_items() -> None:
    made = model()
    made.items.dense = True
    made.encode_positions(batch([3, 4, 5, 6, 7]))[0, 5].sum().backward()  # the state after item 5
    touched = made.items.weight.grad.abs().sum(1) > 0
    assert touched.nonzero().flatten().tolist() == [3, 4, 5]


def test_order_matters_through_positions_only() -> None:
    one_block = model(num_layers=1)
    swapped = [one_block.encode_users(batch(h))[0] for h in ([3, 4, 5, 6], [5, 3, 4, 6])]
    assert not torch.allclose(*swapped)
    with torch.no_grad():
        one_block.positions.zero_()
    swapped = [one_block.encode_users(batch(h))[0] for h in ([3, 4, 5, 6], [5, 3, 4, 6])]
    torch.testing.assert_close(*swapped)


@pytest.mark.parametrize("length", [5, 9, 12])
def test_longer_padding_changes_nothing(length: int) -> None:
    made = model()
    torch.testing.assert_close(
        made.encode_users(batch([3, 4, 5, 6], length=4))[0], made.encode_users(batch([3, 4, 5, 6], length=length))[0]
    )


def test_what_stands_at_padding_changes_nothing() -> None:
    made, data = model(), batch([3, 4, 5])
    noise = torch.where(data.mask, data.history, 17)
    torch.testing.assert_close(made.encode_users(data)[0], made.encode_users(data.replace(history=noise))[0])


def test_only_the_newest_max_len_items_are_read() -> None:
    made = model(max_len=3)
    long, short = batch([9, 9, 3, 4, 5]), batch([3, 4, 5])
    torch.testing.assert_close(made.encode_users(long)[0], made.encode_users(short)[0])
    with pytest.raises(ValueError, match="histories of 8 slots exceed max_len=3"):
        made.encode_positions(long)


def test_one_table_for_input_and_output() -> None:
    made, data = model(), batch([3, 4, 5])
    item = torch.tensor([20])
    before = made.encode_users(data)[0], made.encode_items(item)
    with torch.no_grad():
        made.items.weight[20] += 1
        made.items.weight[4] += 1
    after = made.encode_users(data)[0], made.encode_items(item)
    assert not torch.allclose(before[0], after[0])
    torch.testing.assert_close(after[1], before[1] + 1)


def test_all_histories_empty_and_unknown_items() -> None:
    made = model()
    users, valid = made.encode_users(batch([], []))
    assert not valid.any()
    assert not users.any()
    assert made.encode_positions(batch([], [])).shape == (2, 8, 8)
    users, valid = made.encode_users(batch([1, 1], [1, 3]))
    assert valid[:, 0].tolist() == [False, True]  # row 1 says nothing about the user
    assert users.isfinite().all()


def test_loss_at_the_start_is_two_log_two() -> None:
    fresh = SASRec(SPEC, embedding_dim=8, max_len=8, dropout=0.0)
    with torch.no_grad():
        fresh.items.weight.mul_(1e-4)
    state = fresh.encode_users(batch([3, 4, 5, 6]))[0][0, 0]
    positive, negative = fresh.encode_items(torch.tensor([7, 9])) @ state
    loss = -torch.nn.functional.logsigmoid(positive) - torch.nn.functional.logsigmoid(-negative)
    assert loss.item() == pytest.approx(2 * 0.693147, abs=1e-3)


def test_every_parameter_learns_and_dropout_is_off_in_eval() -> None:
    made = model(dropout=0.5)
    data = batch([3, 4, 5, 6], [7, 8], length=12)
    torch.testing.assert_close(made.encode_users(data)[0], made.encode_users(data)[0], rtol=0, atol=0)
    made.train()
    assert not torch.equal(made.encode_users(data)[0], made.encode_users(data)[0])
    (made.encode_positions(data) * torch.arange(8)).sum().backward()
    for name, parameter in made.named_parameters():
        gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0, name


def test_learns_the_next_item_of_a_cycle() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = SASRec(SPEC, embedding_dim=16, max_len=8, num_layers=1, dropout=0.0)
        made.items.dense = True
        generator = torch.Generator().manual_seed(0)
        optimiser = torch.optim.Adam(made.parameters(), lr=0.01)
        for _ in range(60):
            start = torch.randint(0, 28, (32, 1), generator=generator)
            walk = (start + torch.arange(9)) % 28 + 2  # item n is followed by n + 1
            states = made.encode_positions(Batch(history=walk[:, :-1], mask=torch.ones(32, 8, dtype=torch.bool)))
            logits = states @ made.encode_items(torch.arange(2, 30)).T
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), walk[:, 1:].flatten() - 2)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    users, _ = made.eval().encode_users(batch([10, 11, 12]))
    assert int((users[0, 0] @ made.items.weight[2:].T).argmax()) + 2 == 13


def test_messages_name_what_was_received() -> None:
    with pytest.raises(ValueError, match="num_heads must divide embedding_dim, received 3 and 8"):
        SASRec(SPEC, embedding_dim=8, num_heads=3)
    with pytest.raises(ValueError, match="needs a catalogue; the spec has 0 item rows"):
        SASRec(Spec())
