"""DCN and DCN-V2: what a cross layer multiplies, of which degree the result is, and when the two are one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from funnelrec.core.batch import Batch
from funnelrec.rank.dcn import DCN
from funnelrec.rank.dcn import _Cross as CrossV1
from funnelrec.rank.dcn_v2 import DCNV2
from funnelrec.rank.dcn_v2 import _Cross as CrossV2
from tests.contracts import full_spec, make_spec, quiet

SPEC = full_spec()
G = torch.Generator().manual_seed(0)
X = torch.randn(6, 5, generator=G, dtype=torch.float64)


def crossed(layers: list[nn.Module], start: torch.Tensor) -> torch.Tensor:
    x = start
    with torch.no_grad():
        for layer in layers:
            x = layer.double()(start, x)
    return x


def filled(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=G)
    return layer


def test_v1_by_hand() -> None:
    """x₀ = (1, 2), w = (3, 4), b = (.5, 0): (1, 2) · 11 + (.5, 0) + (1, 2)."""
    layer = CrossV1(2)
    with torch.no_grad():
        layer.direction.weight[:] = torch.tensor([[3.0, 4.0]])
        layer.bias[:] = torch.tensor([0.5, 0.0])
    start = torch.tensor([[1.0, 2.0]])
    torch.testing.assert_close(layer(start, start), torch.tensor([[12.5, 24.0]]))


def test_v1_without_bias_only_rescales_its_input() -> None:
    layers = [filled(CrossV1(5)) for _ in range(4)]
    for layer in layers:
        nn.init.zeros_(layer.bias)
    scale = crossed(layers, X) / X
    torch.testing.assert_close(scale, scale[:, :1].expand_as(scale))


def test_v2_with_equal_rows_is_v1() -> None:
    one, two = filled(CrossV1(5)), CrossV2(5)
    nn.init.zeros_(one.bias)
    with torch.no_grad():
        two.matrix.weight[:] = one.direction.weight.expand(5, 5)
    torch.testing.assert_close(crossed([one, one], X), crossed([two, two], X))


@pytest.mark.parametrize("cls", [DCN, DCNV2])
def test_numbers_enter_as_they_are(cls: type[nn.Module]) -> None:
    """No vector for a number: one column of x₀ each."""
    model = cls(make_spec([("a", "context", 5, 1)], [("n", "context", 2)]), embedding_dim=3, hidden=())
    batch = Batch(ids=torch.tensor([[2]], dtype=torch.int32), numbers=torch.tensor([[0.5, -7.0]]))
    assert model.stack(batch)[0, 3:].tolist() == [0.5, -7.0]
    only = cls(make_spec([], [("n", "context", 2)]))
    assert quiet(only, batch)[0].isfinite().all()
