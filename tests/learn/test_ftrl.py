"""FTRL-proximal: its algorithm in digits, its closed form, exact zeros, and what it leaves alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from funnelrec.core.nn.embedding import Table
from funnelrec.learn.ftrl import FTRL
from funnelrec.learn.optim import make_optimizers

G = torch.Generator().manual_seed(0)


def descend(weight: nn.Parameter, gradients: Tensor, **options: float) -> FTRL:
    optimizer = FTRL([weight], **options)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return optimizer


def test_by_hand() -> None:
    """α = .5, β = 1, l1 = 1, l2 = 0; gradients 2 then −3.

    z = 2, n = 4, w = −(2 − 1) / ((1 + 2) / .5) = −1/6. Then σ = (√13 − 2) / .5, z = 2 − 3 + σ/6, n = 13.
    """
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = descend(weight, torch.tensor([[2.0]], dtype=torch.float64), alpha=0.5, l1=1.0)
    assert weight.item() == pytest.approx(-1 / 6)
    weight.grad = torch.tensor([-3.0], dtype=torch.float64)
    optimizer.step()
    z = -1 + (math.sqrt(13) - 2) / 0.5 / 6
    assert optimizer.state[weight]["z"].item() == pytest.approx(z)
    assert optimizer.state[weight]["n"].item() == 13
    assert weight.item() == (pytest.approx(-(z + 1) / ((1 + math.sqrt(13)) / 0.5)) if z < -1 else 0.0)


@pytest.mark.parametrize("start", [0.0, 0.7])
def test_without_penalties_it_is_descent_at_a_falling_rate(start: float) -> None:
    """w ← w − α / (β + √Σg²) g, the present gradient included; also from weights that are not 0."""
    gradients = torch.randn(30, 5, generator=G, dtype=torch.float64)
    weight = nn.Parameter(torch.full((5,), start, dtype=torch.float64))
    descend(weight, gradients, alpha=0.3, beta=0.5)
    expected, total = torch.full((5,), start, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    for gradient in gradients:
        total += gradient.square()
        expected -= 0.3 / (0.5 + total.sqrt()) * gradient
    torch.testing.assert_close(weight.detach(), expected)


def test_zeros_are_exact_and_more_of_them_with_more_l1() -> None:
    gradients = torch.randn(50, 400, generator=G, dtype=torch.float64)
    zeros = []
    for l1 in (0.0, 0.5, 2.0, 8.0, 1e6):
        weight = nn.Parameter(torch.zeros(400, dtype=torch.float64))
        descend(weight, gradients, l1=l1)
        zeros.append(int((weight == 0).sum()))
    assert zeros == sorted(zeros)
    assert zeros[0] == 0
    assert 0 < zeros[2] < 400
    assert zeros[-1] == 400


@pytest.mark.parametrize("sparse", [True, False])
def test_what_has_no_gradient_keeps_its_bits(sparse: bool) -> None:
    table = Table(20, 3, dense=not sparse)
    with torch.no_grad():
        table.weight[1:].normal_(generator=G)
    optimizer = FTRL([table.weight], l1=0.1)
    table(torch.arange(20)).sum().backward()  # every number has a z and an n, which must stay as well
    optimizer.step()
    before = table.weight.detach().clone()
    kept = {name: tensor.clone() for name, tensor in optimizer.state[table.weight].items()}
    for ids in ([3, 5, 3], [5, 7, 0]):
        optimizer.zero_grad()
        (table(torch.tensor(ids)) * torch.tensor([1.0, 0.0, 2.0])).sum().backward()  # the middle number has none
        optimizer.step()
    moved = (table.weight != before).nonzero()
    assert set(moved[:, 0].tolist()) == {3, 5, 7}
    assert set(moved[:, 1].tolist()) == {0, 2}
    same = table.weight == before
    for name, tensor in optimizer.state[table.weight].items():
        assert torch.equal(tensor[same], kept[name][same]), name
        assert not torch.equal(tensor, kept[name]), name


def test_sparse_and_dense_gradients_give_the_same() -> None:
    results = []
    for dense in (True, False):
        table = Table(20, 3, std=0.0, dense=dense)
        optimizer = FTRL([table.weight], l1=0.2, l2=0.1)
        draws = torch.Generator().manual_seed(4)
        for _ in range(10):
            optimizer.zero_grad()
            ids = torch.randint(0, 20, (8,), generator=draws)
            (table(ids) * torch.randn(8, 3, generator=draws)).sum().backward()
            optimizer.step()
        results.append(table.weight.detach().clone())
    torch.testing.assert_close(*results)


def test_scale_turns_a_mean_into_a_sum() -> None:
    gradients = torch.randn(20, 5, generator=G, dtype=torch.float64)
    summed, averaged = (nn.Parameter(torch.zeros(5, dtype=torch.float64)) for _ in range(2))
    descend(summed, gradients, l1=0.5)
    descend(averaged, gradients / 64, l1=0.5, scale=64)
    torch.testing.assert_close(summed, averaged)


class _WideAndDeep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.deep = Table(10, 1, std=0.0), nn.Linear(2, 1)
        self.widest = nn.Linear(1, 1)


def test_parameters_are_named_by_how_they_begin() -> None:
    model = _WideAndDeep()
    optimizers = make_optimizers(model, ftrl={"wide": {"l1": 1.0}}).optimizers
    owned = {type(o).__name__: [id(p) for g in o.param_groups for p in g["params"]] for o in optimizers}
    assert owned["FTRL"] == [id(model.wide.weight)], "'widest' only looks alike"
    assert len(owned["AdamW"]) == 4
    with pytest.raises(ValueError, match="_WideAndDeep has no parameter 'wid'; its parts are wide, deep, widest"):
        make_optimizers(model, ftrl={"wid": {}})


def test_state_survives_saving() -> None:
    model = _WideAndDeep()
    one = make_optimizers(model, ftrl={"wide": {"alpha": 0.3}})
    model.wide(torch.tensor([2, 3])).sum().backward()
    one.step()
    again = make_optimizers(model, ftrl={"wide": {"alpha": 0.3}})
    again.load_state_dict(one.state_dict())
    state = again.optimizers[-1].state[model.wide.weight]
    assert state["n"].flatten().tolist() == [0, 0, 1, 1, 0, 0, 0, 0, 0, 0]


def test_refuses() -> None:
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"beta, l1 and l2 must not be negative, received 1\.0, -1\.0 and 0\.0"):
        FTRL([weight], l1=-1.0)
    with pytest.raises(ValueError, match=r"alpha must be positive, received 0\.0"):
        FTRL([weight], alpha=0.0)
    optimizer = FTRL([weight])
    optimizer.param_groups[0]["lr"] *= 0.5
    with pytest.raises(ValueError, match="cannot change it in a run; leave its lr alone"):
        optimizer.step()
    for options in (
        {"ftrl": {"wide": {}}, "proximal": {"wide.weight": {"l1": 1.0}}},
        {"ftrl": {"wide": {}, "wide.weight": {}}},
    ):
        with pytest.raises(ValueError, match=r"'wide\.weight' is named twice by ftrl and proximal"):
            make_optimizers(_WideAndDeep(), **options)


def test_a_schedule_is_for_the_others() -> None:
    model = _WideAndDeep()
    optimizers = make_optimizers(model, ftrl={"wide": {"alpha": 0.5}})
    optimizers.set_lr_factor(0.0)
    before = [p.detach().clone() for p in model.deep.parameters()]
    for _ in range(2):
        optimizers.zero_grad()
        model.deep(model.wide(torch.tensor([[3, 4]])).squeeze(2) + 1).sum().backward()
        optimizers.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.deep.parameters(), strict=True))
    once = nn.Parameter(torch.zeros(1))
    descend(once, torch.full((2, 1), before[0][0, 0].item()), alpha=0.5)
    torch.testing.assert_close(model.wide.weight[3].detach(), once.detach())
