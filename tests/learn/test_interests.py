"""BestInterestSoftmax: the loss of what serving does with several interests."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from funnelrec.core.batch import Batch
from funnelrec.core.nn.items import closest_interest
from funnelrec.learn import interests as module
from funnelrec.learn.interests import BestInterestSoftmax
from funnelrec.learn.losses import FullSoftmax, SampledSoftmax
from funnelrec.learn.samplers import Uniform


class Fixed(torch.nn.Module):
    """Interests and items that are parameters."""

    def __init__(self, interests: Tensor, items: Tensor, valid: Tensor | None = None) -> None:
        super().__init__()
        self.interests, self.items = torch.nn.Parameter(interests), torch.nn.Parameter(items)
        self.valid = torch.ones(interests.shape[:2], dtype=torch.bool) if valid is None else valid
        self.spec = SimpleNamespace(num_items=len(items))

    def encode_users(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.interests, self.valid

    def encode_items(self, rows: Tensor) -> Tensor:
        return self.items[rows]

    def user_for_target(self, interests: Tensor, valid: Tensor, target: Tensor) -> Tensor:
        return closest_interest(interests, valid, target)


def random(users: int = 5, count: int = 3, items: int = 20, dim: int = 4) -> tuple[Fixed, Batch]:
    generator = torch.Generator().manual_seed(0)
    model = Fixed(torch.randn(users, count, dim, generator=generator), torch.randn(items, dim, generator=generator))
    return model, Batch(target=torch.randint(2, items, (users,), generator=generator))


def test_by_hand() -> None:
    """Interests (1, 0) and (0, 2); items (3, 0), (0, 1), (1, 1) score 3, 2, 2."""
    items = torch.tensor([[9.0, 9.0], [9.0, 9.0], [3.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    model = Fixed(torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]), items)
    expected = math.log(math.exp(3) + 2 * math.exp(2)) - 2
    assert BestInterestSoftmax()(model, Batch(target=torch.tensor([3]))).item() == pytest.approx(expected)
    cold = math.log(math.exp(6) + 2 * math.exp(4)) - 4
    assert BestInterestSoftmax(temperature=0.5)(model, Batch(target=torch.tensor([3]))).item() == pytest.approx(cold)


def test_an_interest_that_the_target_did_not_choose_learns_too() -> None:
    """The first interest puts an item that was not taken on top; the loss of the papers never tells it."""
    items = torch.tensor([[0.0, 0.0], [0.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
    gradients = {}
    for loss in (BestInterestSoftmax(), FullSoftmax()):
        model = Fixed(torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]), items)
        loss(model, Batch(target=torch.tensor([3]))).backward()
        assert model.interests.grad is not None
        gradients[type(loss).__name__] = model.interests.grad[0, 0]
    assert gradients["BestInterestSoftmax"][0] > 0.5  # down with it
    assert (gradients["FullSoftmax"] == 0).all()  # positive control


def test_one_interest_is_the_ordinary_softmax() -> None:
    model, batch = random(count=1)
    for best, plain in (
        (BestInterestSoftmax(temperature=0.3), FullSoftmax(temperature=0.3)),
        (BestInterestSoftmax(8, Uniform(20)), SampledSoftmax(8, sampler=Uniform(20))),
    ):
        values, gradients = [], []
        for loss in (best, plain):
            torch.manual_seed(3)
            model.zero_grad()
            value: Any = loss(model, batch)
            value.backward()
            values.append(value.detach())
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        torch.testing.assert_close(values[0], values[1])
        torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-4)


def test_parts_give_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = random()
    gradients = []
    for bytes_ in (module.SCORES_BYTES, 4 * 3 * 18 * 2):  # all at once; two users at a time
        monkeypatch.setattr(module, "SCORES_BYTES", bytes_)
        model.zero_grad()
        BestInterestSoftmax()(model, batch).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients)


def test_interests_that_are_not_valid_do_not_count() -> None:
    model, batch = random()
    wild = torch.cat([model.interests.detach(), torch.full((5, 1, 4), 50.0)], 1)
    valid = torch.tensor([[True, True, True, False]]).expand(5, 4)
    other = Fixed(wild, model.items.detach().clone(), valid)
    torch.testing.assert_close(BestInterestSoftmax()(other, batch), BestInterestSoftmax()(model, batch))
    nobody = Fixed(wild, model.items.detach().clone(), torch.zeros(5, 4, dtype=torch.bool))
    assert BestInterestSoftmax()(nobody, batch).item() == 0


def test_messages() -> None:
    model, _ = random()
    with pytest.raises(ValueError, match=r"one target a user; make examples of mode='cut'"):
        BestInterestSoftmax()(model, Batch(target=torch.ones(5, 3, dtype=torch.int64)))
    with pytest.raises(ValueError, match=r"at least 0 .* received -1 and 1\.0"):
        BestInterestSoftmax(-1)
    with pytest.raises(ValueError, match=r"temperature positive, received 0 and 0\.0"):
        BestInterestSoftmax(temperature=0.0)
