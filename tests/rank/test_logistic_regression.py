"""LogisticRegression: the sum of weights by hand, its gradient, and what a number and a field of many values add."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from funnelrec.core.batch import Batch
from funnelrec.learn.optim import make_optimizers
from funnelrec.rank.logistic_regression import LogisticRegression
from tests.contracts import World, auc, full_spec, make_spec


def by_hand() -> tuple[LogisticRegression, Batch]:
    """Fields site (fused rows 1-3) and tags (rows 4-6, two slots), one number; weight of row r is r / 10."""
    model = LogisticRegression(
        make_spec([("site", "context", 4, 1), ("tags", "context", 4, 2)], [("age", "context", 1)])
    )
    with torch.no_grad():
        model.weight.table.weight.copy_(torch.arange(7).view(7, 1) / 10)
        model.weight.number_vectors.fill_(-2.0)
        model.bias.fill_(0.05)
    ids = torch.tensor([[2, 4, 6], [3, 5, 0], [1, 0, 0]], dtype=torch.int32)
    return model, Batch(ids=ids, numbers=torch.tensor([[0.5], [0.0], [-1.0]]))


def test_logits_by_hand() -> None:
    model, batch = by_hand()
    # .05 + .2 + mean(.4, .6) − 2 · .5;  .05 + .3 + .5;  .05 + .1 + nothing + 2
    assert model(batch).tolist() == pytest.approx([-0.25, 0.85, 2.15])


def test_a_new_model_knows_nothing() -> None:
    model = LogisticRegression(full_spec())
    assert torch.equal(model(World(full_spec()).batch(5)), torch.zeros(5))


def test_gradient_is_the_error_of_the_probability() -> None:
    model, batch = by_hand()
    label = torch.tensor([1.0, 0.0, 1.0])
    F.binary_cross_entropy_with_logits(model(batch), label, reduction="sum").backward()
    error = (torch.sigmoid(model(batch)) - label).detach()
    gradient = model.weight.table.weight.grad.to_dense().squeeze(1)
    expected = [0, error[2], error[0], error[1], error[0] / 2, error[1], error[0] / 2]
    assert gradient.tolist() == pytest.approx([float(e) for e in expected])
    assert float(model.bias.grad) == pytest.approx(float(error.sum()))


@pytest.mark.parametrize("l1", [0.0, 1e4])
def test_trained_by_ftrl(l1: float) -> None:
    """A click if the site is the first. With a huge l1 the weights never leave zero and the bias is the base rate."""
    world = World(make_spec([("site", "context", 6, 1), ("noise", "context", 50, 1)]))
    batch = world.batch(2000)
    batch = batch.replace(label=(batch.ids[:, 0] == 2).float())
    model = LogisticRegression(world.spec)
    optimizers = make_optimizers(
        model, ftrl={"weight": {"alpha": 0.5, "l1": l1, "scale": 100}, "bias": {"alpha": 0.5, "scale": 100}}
    )
    for _ in range(10):
        for part in torch.arange(2000).split(100):
            optimizers.zero_grad()
            rows = batch.select(part)
            F.binary_cross_entropy_with_logits(model(rows), rows.label).backward()
            optimizers.step()
    logits = model(batch).detach()
    if l1:
        assert not model.weight.table.weight.any()
        assert torch.equal(logits, model.bias.detach().expand(2000))
        assert torch.sigmoid(logits).mean().item() == pytest.approx(batch.label.mean().item(), abs=0.03)
    else:
        assert auc(batch.label, logits) > 0.99
