from __future__ import annotations

import pytest
import torch
from torch import nn

from funnelrec.core.nn.activation import Dice, MaskedBatchNorm, PReLU, activation


def test_prelu_is_per_last_axis_channel() -> None:
    prelu = PReLU(2)
    with torch.no_grad():
        prelu.alpha.copy_(torch.tensor([0.5, 2.0]))
    out = prelu(torch.tensor([[[-1.0, -1.0], [3.0, 3.0]]]))
    torch.testing.assert_close(out, torch.tensor([[[-0.5, -2.0], [3.0, 3.0]]]))


def test_dice_by_hand() -> None:
    # channel values 0, 2: mean 1, variance 1 -> z = -1, 1; σ(1) = 0.7310586
    out = Dice(1, alpha=0.5)(torch.tensor([[0.0], [2.0]]))
    assert out[0].item() == 0.0
    assert out[1].item() == pytest.approx(2 * (0.7310586 + 0.2689414 * 0.5), abs=1e-5)


def test_dice_with_alpha_one_is_the_identity() -> None:
    x = torch.randn(16, 3)
    torch.testing.assert_close(Dice(3, alpha=1.0)(x), x)


def test_dice_is_half_way_where_the_variance_is_huge() -> None:
    dice = Dice(1, alpha=0.25).eval()
    dice.norm.running_var.fill_(1e12)
    x = torch.tensor([[-3.0], [2.0]])
    torch.testing.assert_close(dice(x), x * 1.25 / 2)


def test_dice_is_prelu_where_mean_and_variance_are_zero() -> None:
    dice = Dice(1, alpha=0.25).eval()
    dice.norm.running_var.zero_()
    torch.testing.assert_close(dice(torch.tensor([[-3.0], [2.0]])), torch.tensor([[-0.75], [2.0]]))


def test_masked_statistics_equal_the_statistics_of_the_real_rows() -> None:
    x, mask = torch.randn(4, 5, 3), torch.rand(4, 5) > 0.4
    junk = torch.where(mask.unsqueeze(-1), x, torch.full_like(x, 77.0))
    masked, plain = Dice(3), Dice(3)
    torch.testing.assert_close(masked(junk, mask)[mask], plain(x[mask]), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(masked.norm.running_mean, plain.norm.running_mean)
    torch.testing.assert_close(masked.norm.running_var, plain.norm.running_var)
    without = Dice(3)(junk)[mask]  # control: unmasked statistics do see the padding
    assert not torch.allclose(without, plain(x[mask]), atol=1e-2)


def test_batch_norm_equals_torch_and_evaluates_with_running_statistics() -> None:
    own, torchs = MaskedBatchNorm(3), nn.BatchNorm1d(3)
    for _ in range(3):
        x = torch.randn(8, 3) * 4 + 1
        everything = torch.ones(8, dtype=torch.bool)
        torch.testing.assert_close(own(x, everything), torchs(x))
    own.eval(), torchs.eval()
    torch.testing.assert_close(own(x), torchs(x))
    assert not torch.allclose(own(x), own.train()(x), atol=1e-2)


@pytest.mark.parametrize("mask", [None, torch.tensor([False]), torch.tensor([True])])
def test_one_row_and_no_real_row_are_finite(mask: torch.Tensor | None) -> None:
    dice = Dice(3)
    x = torch.randn(1, 3, requires_grad=True)
    out = dice(x, mask)
    out.sum().backward()
    assert out.isfinite().all() and x.grad is not None and x.grad.isfinite().all()
    assert dice.norm.running_var.eq(1).all()  # one value has no variance
    assert dice.norm.running_mean.eq(0).all() == (mask is not None and not mask.any())


def test_activation_by_name() -> None:
    for name in ("relu", "prelu", "dice", "gelu", "tanh", "sigmoid", "identity"):
        assert activation(name, 3)(torch.randn(4, 3)).shape == (4, 3)
    with pytest.raises(ValueError, match="received 'swish'"):
        activation("swish", 3)
