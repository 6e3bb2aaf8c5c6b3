from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from funnelrec.core.nn.pooling import AttentionPooling, masked_last, masked_max, masked_mean, masked_sum

X = torch.tensor([[[9.0, 9.0], [-1.0, 4.0], [-3.0, 2.0]], [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]])
MASK = torch.tensor([[False, True, True], [False, False, False]])
ATTENTION = AttentionPooling(2, hidden=3)
POOLS: list[Callable[[Tensor, Tensor], Tensor]] = [masked_sum, masked_mean, masked_max, masked_last, ATTENTION]


@pytest.mark.parametrize(
    ("pool", "expected"),
    [(masked_sum, [-4.0, 6.0]), (masked_mean, [-2.0, 3.0]), (masked_max, [-1.0, 4.0]), (masked_last, [-3.0, 2.0])],
)
def test_by_hand(pool: Callable[[Tensor, Tensor], Tensor], expected: list[float]) -> None:
    torch.testing.assert_close(pool(X, MASK), torch.tensor([expected, [0.0, 0.0]]))


def test_last_with_padding_at_the_end() -> None:
    torch.testing.assert_close(masked_last(X[:1], torch.tensor([[True, True, False]])), torch.tensor([[-1.0, 4.0]]))


@pytest.mark.parametrize("pool", POOLS)
def test_padding_content_and_length_change_nothing(pool: Callable[[Tensor, Tensor], Tensor]) -> None:
    junk = torch.where(MASK.unsqueeze(-1), X, torch.full_like(X, float("nan")))
    torch.testing.assert_close(pool(junk, MASK), pool(X, MASK))
    longer = torch.cat([torch.full((2, 4, 2), 5.0), X], 1)
    torch.testing.assert_close(pool(longer, torch.cat([torch.zeros(2, 4, dtype=torch.bool), MASK], 1)), pool(X, MASK))


@pytest.mark.parametrize("pool", POOLS)
def test_empty_history_has_a_finite_gradient(pool: Callable[[Tensor, Tensor], Tensor]) -> None:
    x = X.clone().requires_grad_()
    out = pool(x, MASK)
    assert out[1].eq(0).all()
    out.square().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad[~MASK].eq(0).all()


def test_attention_weights() -> None:
    weights = ATTENTION.weights(X, MASK)
    torch.testing.assert_close(weights.sum(1), torch.tensor([1.0, 0.0]))
    assert weights[~MASK].eq(0).all()
    flat = AttentionPooling(2)
    torch.nn.init.zeros_(flat.score.weight)
    torch.testing.assert_close(flat(X, MASK), masked_mean(X, MASK))  # equal scores are the mean
