"""Dropout: the share that is dropped, its scale, its gradient, and that a seed decides."""

from __future__ import annotations

import pytest
import torch

from funnelrec.core.nn.dropout import Dropout


@pytest.fixture(autouse=True)
def _seeded() -> object:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_and_scale(p: float) -> None:
    """A million draws: the share is p within five standard deviations, what is kept is x / (1 − p)."""
    out = Dropout(p)(torch.full((1000, 1000), 3.0))
    share = (out == 0).double().mean().item()
    assert abs(share - p) < 5 * (p * (1 - p) / 1e6) ** 0.5
    torch.testing.assert_close(out[out != 0], torch.full_like(out[out != 0], 3 / (1 - p)), rtol=1e-3, atol=0)


def test_no_pattern_within_the_four_numbers_of_a_draw() -> None:
    """Pairs of neighbours are dropped together as often as two that are far apart: p²."""
    out = Dropout(0.5)(torch.ones(4, 250_000).T.contiguous()) == 0
    for i in range(4):
        for j in range(i):
            both = (out[:, i] & out[:, j]).double().mean().item()
            assert abs(both - 0.25) < 5 * (0.25 * 0.75 / 250_000) ** 0.5


def test_gradient_follows_the_mask() -> None:
    x = torch.ones(7, 3, requires_grad=True)  # 21 numbers: no multiple of four
    out = Dropout(0.5)(x)
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())
    assert 0 < int((out == 0).sum()) < 21


def test_a_seed_gives_one_mask_and_the_next_call_another() -> None:
    drop, x = Dropout(0.3), torch.ones(50, 4)
    masks = []
    for _ in range(2):
        torch.manual_seed(7)
        masks.append((drop(x), drop(x)))
    assert torch.equal(masks[0][0], masks[1][0])
    assert torch.equal(masks[0][1], masks[1][1])
    assert not torch.equal(*masks[0])


def test_nothing_happens_outside_training_and_everything_at_one() -> None:
    x = torch.randn(5, 3)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0)(x) is x
    assert not Dropout(1.0)(x).any()
    assert Dropout(0.5)(x.bfloat16()).dtype == torch.bfloat16
    assert Dropout(0.5)(torch.zeros(0, 3)).shape == (0, 3)
