"""The recurrence: digits by hand, torch's GRU, the written-out loop, its own backward, and what padding may not do."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from funnelrec.core.nn.recurrent import GRU, Evolution

KINDS: list[Evolution] = ["gru", "aigru", "agru", "augru"]
MASK = torch.tensor([[True] * 5, [False, False, True, True, True], [False] * 5])


def cell(kind: Evolution, in_features: int = 3, out_features: int = 4) -> GRU:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = GRU(in_features, out_features, kind=kind)
        nn.init.normal_(layer.input.bias)
    return layer.double()


def inputs(seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(3, 5, 3, generator=g).double(), torch.rand(3, 5, generator=g).double()


def attention_for(kind: Evolution, attention: Tensor) -> Tensor | None:
    return None if kind == "gru" else attention


def written_out(layer: GRU, x: Tensor, mask: Tensor, attention: Tensor) -> Tensor:
    """The equations of the docstring, one step after another, differentiated by autograd."""
    dim = layer.recurrent.shape[1]
    h, states = x.new_zeros(len(x), dim), []
    for t in range(x.shape[1]):
        a = attention[:, t : t + 1]
        step = a * x[:, t] if layer.kind == "aigru" else x[:, t]
        from_x = [
            step @ w.T + b for w, b in zip(layer.input.weight.split(dim), layer.input.bias.split(dim), strict=True)
        ]
        from_h = [h @ w.T for w in layer.recurrent.split(dim)]
        r = torch.sigmoid(from_x[0] + from_h[0])
        c = torch.tanh(from_x[-1] + r * from_h[-1])
        if layer.kind == "agru":
            new = (1 - a) * h + a * c
        else:
            u = torch.sigmoid(from_x[1] + from_h[1]) * (a if layer.kind == "augru" else 1.0)
            new = (1 - u) * h + u * c
        h = torch.where(mask[:, t : t + 1], new, h)
        states.append(h)
    return torch.stack(states, 1)


def test_by_hand() -> None:
    """One number; all weights 1, no bias: x = 1 from h = 0 gives u = σ(1), c = tanh(1), h = a u c."""
    for kind, expected in (
        ("gru", 0.7310586 * math.tanh(1)),
        ("augru", 0.5 * 0.7310586 * math.tanh(1)),
        ("agru", 0.5 * math.tanh(1)),
        ("aigru", 1 / (1 + math.exp(-0.5)) * math.tanh(0.5)),
    ):
        layer = GRU(1, 1, kind=kind)
        nn.init.ones_(layer.input.weight)
        nn.init.ones_(layer.recurrent)
        attention = None if kind == "gru" else torch.full((1, 1), 0.5)
        state = layer(torch.ones(1, 1, 1), torch.ones(1, 1, dtype=torch.bool), attention)
        assert state.item() == pytest.approx(expected, rel=1e-5), kind


def test_is_torchs_gru_with_the_update_gate_turned_round() -> None:
    layer, (x, _) = cell("gru"), inputs()
    theirs = nn.GRU(3, 4, batch_first=True).double()
    with torch.no_grad():
        theirs.bias_hh_l0.zero_()
        for mine, their in (
            (layer.input.weight, theirs.weight_ih_l0),
            (layer.recurrent, theirs.weight_hh_l0),
            (layer.input.bias, theirs.bias_ih_l0),
        ):
            r, u, c = mine.split(4)
            their.copy_(torch.cat([r, -u, c]))  # its z is the share that is kept: σ(-v) = 1 - σ(v)
    torch.testing.assert_close(layer(x, torch.ones(3, 5, dtype=torch.bool)), theirs(x)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_states_and_gradients_are_those_of_the_written_out_loop(kind: Evolution) -> None:
    layer, (x, attention) = cell(kind), inputs()
    weight = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(4)).double()
    results = []
    for run in (lambda x, a: layer(x, MASK, attention_for(kind, a)), lambda x, a: written_out(layer, x, MASK, a)):
        layer.zero_grad()
        leaves = [x.clone().requires_grad_(), attention.clone().requires_grad_()]
        states = run(*leaves)
        (states * weight).sum().backward()
        of_attention = torch.zeros_like(attention) if leaves[1].grad is None else leaves[1].grad
        results.append([states.detach(), leaves[0].grad, of_attention, *(p.grad.clone() for p in layer.parameters())])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: Evolution) -> None:
    layer, (x, attention) = cell(kind), inputs()
    leaves = (x.requires_grad_(), attention.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, a: layer(x, MASK, attention_for(kind, a)), leaves)


@pytest.mark.parametrize("kind", ["agru", "augru"])
def test_no_attention_keeps_the_state(kind: Evolution) -> None:
    layer, (x, attention) = cell(kind), inputs()
    attention[:, 3] = 0.0
    states = layer(x, torch.ones(3, 5, dtype=torch.bool), attention)
    assert torch.equal(states[:, 3], states[:, 2])
    assert not torch.equal(states[:, 4], states[:, 3])


def test_full_attention_is_a_gru_and_in_agru_the_candidate() -> None:
    x, _ = inputs()
    ones, mask = torch.ones(3, 5).double(), torch.ones(3, 5, dtype=torch.bool)
    plain = cell("gru")
    for kind in ("aigru", "augru"):
        layer = cell(kind)
        layer.load_state_dict(plain.state_dict())
        torch.testing.assert_close(layer(x, mask, ones), plain(x, mask))
    layer = cell("agru")
    first = layer(x, mask, ones)[:, 0]
    torch.testing.assert_close(first, torch.tanh(layer.input(x[:, 0])[:, 4:]))  # h = c, and from h = 0 that is tanh x^c


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing_wherever_it_stands(kind: Evolution) -> None:
    layer, (x, attention) = cell(kind), inputs()
    states = layer(x, MASK, attention_for(kind, attention))
    assert not states[2].any(), "nothing but padding: the state stays zero"
    assert not states[1, :2].any()
    alone = layer(x[1:2, 2:], MASK[1:2, 2:], attention_for(kind, attention[1:2, 2:]))
    torch.testing.assert_close(states[1:2, 2:], alone)
    behind = torch.tensor([[True, True, True, False, False]])
    moved = layer(x[1:2].roll(-2, 1), behind, attention_for(kind, attention[1:2].roll(-2, 1)))
    torch.testing.assert_close(moved[:, -1], states[1:2, -1])
    x[~MASK] = 1e6
    attention[~MASK] = 7.0
    torch.testing.assert_close(layer(x, MASK, attention_for(kind, attention)), states)


def test_every_gate_starts_as_a_matrix_of_its_own() -> None:
    layer = cell("augru", 6, 6)
    for block in layer.recurrent.detach().split(6):
        torch.testing.assert_close(block @ block.T, torch.eye(6).double(), atol=1e-6, rtol=0)
    bound = math.sqrt(6 / 12)
    assert 0.8 * bound < layer.input.weight.abs().max() <= bound
    assert GRU(2, 3, kind="agru").recurrent.shape == (6, 3), "AGRU has no update gate to leave unused"


def test_refusals() -> None:
    x, attention = inputs()
    with pytest.raises(ValueError, match="kind 'gru' takes no attention"):
        cell("gru")(x, MASK, attention)
    with pytest.raises(ValueError, match="kind 'augru' needs an attention"):
        cell("augru")(x, MASK)


def test_under_bfloat16_the_state_stays_in_float32() -> None:
    layer, (x, attention) = cell("augru").float(), inputs()
    expected = layer(x.float(), MASK, attention.float())
    with torch.autocast("cpu", torch.bfloat16):
        states = layer(x.float(), MASK, attention.float())
    assert states.dtype == torch.float32
    torch.testing.assert_close(states, expected, atol=0.02, rtol=0.02)
    states.sum().backward()
    assert layer.recurrent.grad is not None


def test_only_the_plain_gru_goes_step_by_step() -> None:
    with pytest.raises(ValueError, match="only a recurrence of kind 'gru' goes step by step, this one is 'augru'"):
        GRU(2, 2, kind="augru").step(torch.zeros(1, 2), torch.zeros(1, 2))
