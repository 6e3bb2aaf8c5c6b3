from __future__ import annotations

import pytest
import torch
from torch import nn

from funnelrec.core.nn.target_attention import TargetAttention

MASK = torch.tensor([[False, True, True, True], [False] * 4])


def constant(softmax: bool, score: float) -> TargetAttention:
    """A unit whose MLP gives `score` for everything."""
    unit = TargetAttention(2, hidden=(3,), softmax=softmax)
    last = unit.score.rest.layers[-1]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    nn.init.constant_(last.bias, score)
    return unit


def test_by_hand() -> None:
    keys = torch.tensor([[[9.0, 9.0], [1.0, 2.0], [3.0, 4.0], [5.0, 0.0]]])
    query = torch.tensor([[1.0, 1.0]])
    torch.testing.assert_close(constant(False, 0.5)(query, keys, MASK[:1]), torch.tensor([[4.5, 3.0]]))  # half the sum
    torch.testing.assert_close(constant(True, 0.5)(query, keys, MASK[:1]), torch.tensor([[3.0, 2.0]]))  # the mean


@pytest.mark.parametrize("softmax", [False, True])
def test_padding_weighs_nothing_and_empty_is_zero(softmax: bool) -> None:
    unit = TargetAttention(4, softmax=softmax)
    query, keys = torch.randn(2, 4), torch.randn(2, 4, 4, requires_grad=True)
    weights = unit.weights(query, keys, MASK)
    assert weights[~MASK].eq(0).all()
    if softmax:
        torch.testing.assert_close(weights.sum(1), torch.tensor([1.0, 0.0]))
    out = unit(query, keys, MASK)
    assert out[1].eq(0).all()
    out.square().sum().backward()
    assert keys.grad is not None and keys.grad.isfinite().all() and keys.grad[~MASK].eq(0).all()
    changed = keys.detach().clone()
    changed[~MASK] = 40.0
    torch.testing.assert_close(unit(query, changed, MASK), out)


def test_doubling_the_history() -> None:
    query, keys = torch.randn(2, 4), torch.randn(2, 4, 4)
    for softmax, factor in ((False, 2.0), (True, 1.0)):
        unit = TargetAttention(4, softmax=softmax).eval()
        twice = unit(query, torch.cat([keys, keys], 1), torch.cat([MASK, MASK], 1))
        torch.testing.assert_close(twice, factor * unit(query, keys, MASK))


def test_order_of_the_history_is_ignored_and_one_item_is_itself() -> None:
    unit = TargetAttention(4, softmax=True).eval()
    query, keys = torch.randn(2, 4), torch.randn(2, 4, 4)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(unit(query, keys[:, order], MASK[:, order]), unit(query, keys, MASK))
    one = torch.tensor([[False, False, True, False]] * 2)
    torch.testing.assert_close(unit(query, keys, one), keys[:, 2])


def test_the_query_matters_and_every_parameter_learns() -> None:
    unit = TargetAttention(4, activation="prelu")
    keys, mask = torch.randn(8, 4, 4), torch.ones(8, 4, dtype=torch.bool)
    out = unit(torch.randn(8, 4), keys, mask)
    assert not torch.allclose(out, unit(torch.randn(8, 4), keys, mask))
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.ne(0).any() for p in unit.parameters())
