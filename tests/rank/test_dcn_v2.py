"""DCN-V2: what a cross layer multiplies, of which degree the result is, low rank and experts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from funnelrec.rank.dcn_v2 import DCNV2, _Cross, _LowRankCross
from tests.contracts import World, full_spec, quiet
from tests.rank.test_dcn import X, crossed, filled

SPEC = full_spec()


def test_v2_by_hand() -> None:
    """x₀ = (1, 2), W = [[1, 1], [0, 2]], b = (1, 0): the bias is inside the product: (1·4, 2·4) + (1, 2)."""
    layer = _Cross(2)
    with torch.no_grad():
        layer.matrix.weight[:] = torch.tensor([[1.0, 1.0], [0.0, 2.0]])
        layer.matrix.bias[:] = torch.tensor([1.0, 0.0])
    start = torch.tensor([[1.0, 2.0]])
    torch.testing.assert_close(layer(start, start), torch.tensor([[5.0, 10.0]]))


@pytest.mark.parametrize("kind", [_Cross, lambda n: _LowRankCross(n, 2, 1)])
def test_l_layers_are_a_polynomial_of_degree_l_plus_1(kind: type[nn.Module]) -> None:
    """Along t · x₀ the differences of order L + 2 vanish, those of order L + 1 do not."""
    layers = [filled(kind(5)) for _ in range(2)]
    values = torch.stack([crossed(layers, t * X) for t in range(6)])
    third, fourth = values.diff(n=3, dim=0), values.diff(n=4, dim=0)
    assert third.abs().max() > 0.1
    assert fourth.abs().max() < 1e-9 * values.abs().max()


def test_low_rank_of_full_rank_is_the_full_layer() -> None:
    full, low = filled(_Cross(5)), _LowRankCross(5, 5, 1)
    with torch.no_grad():
        low.down[0] = torch.eye(5)
        low.up[0] = full.matrix.weight.T
        low.bias.copy_(full.matrix.bias)
    torch.testing.assert_close(crossed([low], X), crossed([full], X))


def test_experts_are_mixed_by_their_gates() -> None:
    """x + Σ_i G_i(x) x₀ ∘ (U_i tanh(C_i tanh(V_iᵀ x)) + b), written out."""
    layer = filled(_LowRankCross(5, 3, 4)).double()
    gates = torch.softmax(X @ layer.gate.weight.T, dim=1)
    expected = X.clone()
    for i in range(4):
        small = torch.tanh(torch.tanh(X @ layer.down[i]) @ layer.middle[i])
        expected = expected + gates[:, i : i + 1] * X * (small @ layer.up[i] + layer.bias)
    torch.testing.assert_close(layer(X, X), expected)


def test_stacked_and_parallel() -> None:
    batch = World(SPEC).batch(8)
    for stacked, width in ((True, 7), (False, 7 + DCNV2(SPEC, hidden=(7,)).stack.out_features)):
        model = DCNV2(SPEC, hidden=(7,), stacked=stacked)
        assert model.top.layers[0].in_features == width
        assert quiet(model, batch)[0].shape == (8,)


def test_without_weights_the_crosses_are_the_identity() -> None:
    model, batch = DCNV2(SPEC, stacked=True, hidden=(6,)).eval(), World(SPEC).batch(8)
    with torch.no_grad():
        for parameter in model.crosses.parameters():
            parameter.zero_()
        expected = model.top(model.deep(model.stack(batch))).squeeze(1)
    assert torch.equal(quiet(model, batch)[0], expected)


def test_refuses() -> None:
    with pytest.raises(ValueError, match="experts are of low rank: num_experts=4 needs a rank"):
        DCNV2(SPEC, num_experts=4)
    with pytest.raises(ValueError, match="rank and num_experts are at least 1, received 0 and 1"):
        DCNV2(SPEC, rank=0)
