from __future__ import annotations

import math

import pytest
import torch

from funnelrec.core.nn.transformer import Attention, causal_bias, padding_bias, sinusoidal_positions


def test_positions_by_hand() -> None:
    table = sinusoidal_positions(3, 4)
    assert table[0].tolist() == [0, 1, 0, 1]
    # p = 2: the first pair turns by 1 a step, the second by 1 / 10000^(2/4) = 0.01
    assert table[2].tolist() == pytest.approx([math.sin(2), math.cos(2), math.sin(0.02), math.cos(0.02)])
    with pytest.raises(ValueError, match="must be even, received 5"):
        sinusoidal_positions(3, 5)


def test_products_of_positions_depend_on_their_distance_alone() -> None:
    table = sinusoidal_positions(40, 16).double()
    products = table @ table.T
    for distance in (0, 3, 17):
        diagonal = products.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5)


def test_attention_by_hand() -> None:
    attention = Attention(1, 1)
    for linear in (attention.query, attention.key, attention.value, attention.out):
        torch.nn.init.ones_(linear.weight)
    x = torch.tensor([[[0.0], [math.log(2.0)]]])
    # the first query is 0 and weighs both alike: ln 2 / 2. The second: scores 0 and (ln 2)²
    weight = math.exp(math.log(2) ** 2)
    expected = [math.log(2) / 2, math.log(2) * weight / (1 + weight)]
    assert attention(x).flatten().tolist() == pytest.approx(expected)
    assert attention(x, bias=causal_bias(2, x.device)).flatten().tolist() == pytest.approx([0.0, expected[1]])
    only_first = padding_bias(torch.tensor([[True, False]]))
    assert attention(x, bias=only_first).flatten().tolist() == pytest.approx([0.0, 0.0])
    assert padding_bias(torch.tensor([[True, True]])) is None
    nothing = attention(x, bias=padding_bias(torch.tensor([[False, False]])))
    assert nothing.isfinite().all()


def test_attention_agrees_with_the_fused_one() -> None:
    torch.manual_seed(0)
    ours = Attention(16, 4)
    torch_like = super(Attention, ours).forward
    x, mask = torch.randn(3, 5, 16), torch.arange(5) < torch.tensor([[5], [2], [4]])
    assert torch.allclose(ours(x, bias=padding_bias(mask)), torch_like(x, mask=mask), atol=1e-6)
    assert torch.allclose(ours(x, bias=causal_bias(5, x.device)), torch_like(x, causal=True), atol=1e-6)
