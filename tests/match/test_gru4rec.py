"""GRU4Rec: the properties of its sheet."""

from __future__ import annotations

import pytest
import torch

from funnelrec.core.batch import Batch
from funnelrec.core.schema import Spec
from funnelrec.learn.losses import FullSoftmax, pairs
from funnelrec.match.gru4rec import GRU4Rec

SPEC = Spec(num_users=2, num_items=30)


def model(**options: object) -> GRU4Rec:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = GRU4Rec(SPEC, **{"embedding_dim": 8, "max_len": 12, **options})
        with torch.no_grad():
            made.items.weight.mul_(30)  # far from the near-zero start, so that every difference shows
    return made.eval()


def batch(*histories: list[int], length: int = 8) -> Batch:
    rows = torch.tensor([[0] * (length - len(h)) + h for h in histories])
    return Batch(history=rows, mask=rows != 0)


def test_one_step_by_hand() -> None:
    """D = 1, all weights 1, input 2 from state 0: z = σ(2), ĥ = tanh 2, h = z ĥ; then input -1."""
    made = GRU4Rec(SPEC, embedding_dim=1).eval()
    with torch.no_grad():
        made.items.weight[4], made.items.weight[5] = 2.0, -1.0
        for parameter in made.layers.parameters():
            parameter.fill_(1.0)
        made.layers[0].input.bias.zero_()
    first = 0.880797 * 0.964028
    gate = torch.sigmoid(torch.tensor(-1 + first))
    candidate = torch.tanh(-1 + gate * first)
    second = (1 - gate) * first + gate * candidate
    states = made.encode_positions(batch([4, 5], length=2))[0, :, 0]
    torch.testing.assert_close(states, torch.tensor([first, second]), atol=1e-5, rtol=0)
    torch.testing.assert_close(made.encode_users(batch([4, 5]))[0].squeeze(), second, atol=1e-5, rtol=0)


def test_equals_torchs_layers() -> None:
    """The same gates in another order (r, z, n) and with z as what is kept: z = 1 - u, so its weights change sign."""
    made = model(num_layers=2)
    theirs = torch.nn.GRU(8, 8, num_layers=2, batch_first=True)
    sign = torch.tensor([1.0, -1.0, 1.0]).repeat_interleave(8)
    with torch.no_grad():
        for depth, layer in enumerate(made.layers):
            layer.input.bias.normal_()
            getattr(theirs, f"weight_ih_l{depth}").copy_(layer.input.weight * sign.unsqueeze(1))
            getattr(theirs, f"weight_hh_l{depth}").copy_(layer.recurrent * sign.unsqueeze(1))
            getattr(theirs, f"bias_ih_l{depth}").copy_(layer.input.bias * sign)
            getattr(theirs, f"bias_hh_l{depth}").zero_()
    history = [3, 4, 5, 9, 3]
    expected = theirs(made.items.weight[history].unsqueeze(0))[0]
    torch.testing.assert_close(made.encode_positions(batch(history, length=5)), expected)


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("item_bias", [False, True])
def test_users_are_the_last_position_and_no_position_sees_the_future(pooling: str, item_bias: bool) -> None:
    made = model(pooling=pooling, item_bias=item_bias)
    data = batch([3, 4, 5, 6], [7, 8], [], length=6)
    positions, (users, valid) = made.encode_positions(data), made.encode_users(data)
    torch.testing.assert_close(users[:2, 0], positions[:2, -1])
    assert valid.squeeze(1).tolist() == [True, True, False]
    torch.testing.assert_close(made.encode_users(batch([3, 4]))[0][0, 0], positions[0, 3])
    changed = made.encode_positions(batch([3, 4, 5, 9], length=6))
    torch.testing.assert_close(changed[0, :-1], positions[0, :-1])
    assert not torch.allclose(changed[0, -1], positions[0, -1], atol=1e-3)


def test_the_mean_of_the_states() -> None:
    last, mean = model(), model(pooling="mean")
    states = last.encode_positions(batch([3, 4, 5], length=5))[0, 2:]
    torch.testing.assert_close(mean.encode_users(batch([3, 4, 5]))[0][0, 0], states.mean(0))


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("length", [5, 12, 20])
def test_padding_changes_nothing(pooling: str, length: int) -> None:
    made, short = model(pooling=pooling, num_layers=2), batch([3, 4, 5, 6], length=4)
    long = batch([3, 4, 5, 6], length=length)
    noise = long.replace(history=torch.where(long.mask, long.history, 17))
    torch.testing.assert_close(made.encode_users(short), made.encode_users(long))
    torch.testing.assert_close(made.encode_users(short), made.encode_users(noise))


def test_only_the_newest_max_len_items_are_read() -> None:
    made = model(max_len=3)
    torch.testing.assert_close(made.encode_users(batch([9, 9, 3, 4, 5]))[0], made.encode_users(batch([3, 4, 5]))[0])
    with pytest.raises(ValueError, match="histories of 8 slots exceed max_len=3"):
        made.encode_positions(batch([3]))


def test_constrained_means_that_the_scored_vectors_are_read() -> None:
    data = batch([3, 4, 5])
    for constrained in (True, False):
        made = model(constrained=constrained)
        before = made.encode_users(data)[0]
        with torch.no_grad():
            made.items.weight[4] += 1.0
        assert torch.allclose(made.encode_users(data)[0], before) != constrained


def test_the_bias_is_added_to_the_score() -> None:
    made, data = model(item_bias=True), batch([3, 4, 5])
    with torch.no_grad():
        made.bias.weight[7] = 2.5
    (user, _), items = made.encode_users(data), made.encode_items(torch.tensor([6, 7]))
    assert items.shape == (2, 9)
    plain = made.items.weight[[6, 7]] @ user[0, 0, :8]
    torch.testing.assert_close(items @ user[0, 0], plain + torch.tensor([0.0, 2.5]))


def test_both_dropouts_act_in_training_alone() -> None:
    data = batch([3, 4, 5, 6, 7, 8])
    for options in ({"dropout": 0.5, "embedding_dropout": 0.0}, {"dropout": 0.0, "embedding_dropout": 0.5}):
        made = model(**options)
        still = made.encode_users(data)[0]
        made.train()
        assert not torch.allclose(made.encode_users(data)[0], still)
        assert torch.equal(made.eval().encode_users(data)[0], still)


def test_every_position_is_trained() -> None:
    made = model(item_bias=True, constrained=False, num_layers=2).train()
    data = batch([3, 4, 5, 6], [7, 8], length=5)
    data = data.replace(target=torch.tensor([[0, 4, 5, 6, 9], [0, 0, 0, 8, 2]]))
    users, target = pairs(made, data)
    assert target.tolist() == [4, 5, 6, 9, 8, 2]
    assert users.shape == (6, 9)
    FullSoftmax()(made, data).backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None and parameter.grad.to_dense().abs().sum() > 0, name


def test_learns_what_a_bag_of_items_cannot() -> None:
    """a b → c but b a → d: with the order of the two items reversed the answer is another one."""
    made = model(embedding_dim=16, dropout=0.0, embedding_dropout=0.0)
    data = batch([3, 4], [4, 3]).replace(target=torch.tensor([10, 11]))
    optimiser = torch.optim.Adam(made.parameters(), lr=0.02)
    made.items.dense = True
    for _ in range(120):
        optimiser.zero_grad()
        FullSoftmax()(made, data).backward()
        optimiser.step()
    users = made.eval().encode_users(data)[0][:, 0]
    assert (users @ made.items.weight[2:].T).argmax(1).tolist() == [8, 9]


def test_messages_name_what_was_received() -> None:
    with pytest.raises(ValueError, match="num_layers must be at least 1, received 0"):
        GRU4Rec(SPEC, num_layers=0)
    with pytest.raises(ValueError, match="pooling must be last or mean, received 'max'"):
        GRU4Rec(SPEC, pooling="max")
    with pytest.raises(ValueError, match="GRU4Rec needs a catalogue"):
        GRU4Rec(Spec())


def test_step_by_step_is_the_whole_history() -> None:
    made = model(num_layers=2, item_bias=True)
    states = made.no_states(1)
    expected = made.encode_positions(batch([3, 4, 5, 9], length=4))[0]
    for row, whole in zip([3, 4, 5, 9], expected, strict=True):
        users, states = made.step(torch.tensor([row]), states)
        torch.testing.assert_close(users[0], whole)
    with pytest.raises(ValueError, match="pooling must be last, it is 'mean'"):
        model(pooling="mean").step(torch.tensor([3]), states)
