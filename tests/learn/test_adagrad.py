"""Adagrad with momentum, by hand and lazily."""

from __future__ import annotations

import pytest
import torch

from funnelrec.core.nn.embedding import Table
from funnelrec.learn.adagrad import Adagrad
from funnelrec.learn.optim import make_optimizers


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_two_steps_by_hand(momentum: float) -> None:
    """g = 3 then 4, lr .1: v = -.1 · 3 / 3, then -.1 · 4 / 5 + momentum · v."""
    weight = torch.ones(1, requires_grad=True)
    optimizer = Adagrad([weight], lr=0.1, momentum=momentum, eps=1e-12)
    weight.grad = torch.tensor([3.0])
    optimizer.step()
    assert float(weight.detach()) == pytest.approx(0.9)
    weight.grad = torch.tensor([4.0])
    optimizer.step()
    assert float(weight.detach()) == pytest.approx(0.9 - 0.08 - momentum * 0.1)


def test_tiny_first_gradients_make_tiny_steps() -> None:
    weight = torch.zeros(1, requires_grad=True)
    optimizer = Adagrad([weight], lr=1.0, eps=1e-6)
    weight.grad = torch.tensor([1e-6])
    optimizer.step()
    assert float(weight.detach()) == pytest.approx(-1e-3, rel=1e-3)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_lazy_equals_dense_on_the_rows_of_the_batch(momentum: float) -> None:
    torch.manual_seed(0)
    lazy, dense = Table(9, 4), Table(9, 4, dense=True)
    dense.load_state_dict(lazy.state_dict())
    for table in (lazy, dense):
        optimizer = Adagrad(table.parameters(), lr=0.1, momentum=momentum)
        for _ in range(3):
            optimizer.zero_grad()
            (table(torch.tensor([3, 5, 3])) * torch.arange(12.0).view(3, 4)).sum().backward()
            optimizer.step()
    torch.testing.assert_close(lazy.weight, dense.weight)


def test_a_gradient_that_is_a_view_is_read_in_its_own_order() -> None:
    whole, part = (torch.zeros(3, 2, requires_grad=True) for _ in range(2))
    gradient = torch.arange(9.0).view(3, 3)
    whole.grad, part.grad = gradient[:, :2].contiguous(), gradient[:, :2]
    for weight in (whole, part):
        Adagrad([weight], lr=0.1).step()
    assert torch.equal(whole, part)


def test_one_optimiser_for_the_whole_model() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    kinds = [type(o) for o in make_optimizers(model, table="adagrad", momentum=0.1).optimizers]
    assert kinds == [Adagrad]


def test_refusals() -> None:
    weight = torch.zeros(1, requires_grad=True)
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\), received 1.0"):
        Adagrad([weight], momentum=1.0)
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"momentum belongs to table='adagrad', received 0\.5 with table='lazy_adam'"):
        make_optimizers(model, momentum=0.5)
    with pytest.raises(ValueError, match=r"table='adagrad' has no weight_decay, received 0\.1"):
        make_optimizers(model, table="adagrad", weight_decay=0.1)
