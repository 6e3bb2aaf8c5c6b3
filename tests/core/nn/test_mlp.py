from __future__ import annotations

import pytest
import torch
from torch import nn

from funnelrec.core.nn.mlp import MLP


def ones(mlp: MLP) -> MLP:
    for layer in mlp.layers:
        if isinstance(layer, nn.Linear):
            nn.init.ones_(layer.weight)
            nn.init.constant_(layer.bias, -1.0)
    return mlp


def test_by_hand() -> None:
    # hidden: relu(1 + 2 - 1) = 2 and relu(-3 + 1 - 1) = 0, twice each; out: 2 + 2 - 1 = 3 and -1 (no activation last)
    out = ones(MLP(2, (2, 1)))(torch.tensor([[1.0, 2.0], [-3.0, 1.0]]))
    assert out.flatten().tolist() == [3.0, -1.0]
    assert ones(MLP(2, (2, 1), activate_last=True))(torch.tensor([[-3.0, 1.0]])).item() == 0.0


def test_layers_in_order() -> None:
    kinds = [type(layer).__name__ for layer in MLP(4, (8, 1), activation="dice", dropout=0.1, batch_norm=True).layers]
    assert kinds == ["Linear", "MaskedBatchNorm", "Dice", "Dropout", "Linear"]
    assert len(MLP(4, (8, 8, 1)).layers) == 5


def test_start() -> None:
    first = MLP(300, (200, 1)).layers[0]
    assert isinstance(first, nn.Linear)
    assert first.bias.eq(0).all()
    assert first.weight.abs().max().item() == pytest.approx((6 / 500) ** 0.5, rel=1e-3)


def test_padding_stays_out_of_the_statistics() -> None:
    mlp = MLP(3, (4, 1), activation="dice", batch_norm=True)
    x, mask = torch.randn(6, 5, 3), torch.rand(6, 5) > 0.3
    other = torch.where(mask.unsqueeze(-1), x, torch.full_like(x, 50.0))
    torch.testing.assert_close(mlp(x, mask)[mask], mlp(other, mask)[mask])
    assert not torch.allclose(mlp(x)[mask], mlp(other)[mask], atol=1e-2)  # control: without the mask it does matter


def test_gradients_and_evaluation() -> None:
    mlp = MLP(3, (4, 4, 1), activation="prelu", dropout=0.5)
    mlp(torch.randn(32, 3)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mlp.parameters())
    x = torch.randn(5, 3)
    assert not torch.equal(mlp(x), mlp(x))
    mlp.eval()
    assert torch.equal(mlp(x), mlp(x))


def test_refuses_no_layers() -> None:
    with pytest.raises(ValueError, match=r"sizes=\(\)"):
        MLP(3, ())
    with pytest.raises(ValueError, match=r"sizes=\(4, 0\)"):
        MLP(3, (4, 0))
