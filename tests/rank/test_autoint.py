"""AutoInt: an interacting layer against its definition, and what its weights at zero mean."""

from __future__ import annotations

import math

import pytest
import torch

from funnelrec.core.batch import Batch
from funnelrec.rank import autoint
from funnelrec.rank.autoint import AutoInt, _attend, _Interact
from tests.contracts import World, full_spec, quiet

SPEC = full_spec()
NOTHING = Batch(ids=World(SPEC).batch(1).ids[:0], numbers=World(SPEC).batch(1).numbers[:0])
E = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))


def layer(num_heads: int = 2) -> _Interact:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _Interact(4, num_heads, 3)


def test_by_hand() -> None:
    """Two fields 0 and 1 of width 1; W_Q = ln 3, W_K = 1, W_V = 2, W_Res = −1.

    Field 1 attends with scores 0 and ln 3: 1/4 and 3/4, so 2 · 3/4 − 1 = .5. Field 0 attends evenly: 2 · 1/2 + 0.
    """
    one = _Interact(1, 1, 1)
    with torch.no_grad():
        one.project[:, 0, 0] = torch.tensor([math.log(3), 1.0, 2.0, -1.0])
    torch.testing.assert_close(one(torch.tensor([[[0.0], [1.0]]])), torch.tensor([[[1.0], [0.5]]]))


def test_equals_the_definition() -> None:
    interact = layer()
    query, key, value, residual = (E @ w.T for w in interact.project)
    heads = []
    for h in range(2):
        part = slice(3 * h, 3 * h + 3)
        weights = torch.softmax(query[:, :, part] @ key[:, :, part].transpose(1, 2), dim=2)  # unscaled, as in the paper
        heads.append(weights @ value[:, :, part])
    torch.testing.assert_close(interact(E), torch.relu(torch.cat(heads, dim=2) + residual), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 30.0], ids=["plain", "scores that need a shift"])
def test_attention_and_its_gradient_by_chunks(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven pairs of example and head, two at a time, against autograd through the softmax."""
    monkeypatch.setattr(autoint, "CHUNK", 2 * 5 * 5)
    draw = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(7, 3, 5, generator=draw, dtype=torch.float64).requires_grad_() for _ in range(3))
    expected = v @ torch.softmax(scale * q.mT @ k, dim=-1).mT
    gradients = torch.autograd.grad(expected.square().sum(), (q, k, v))
    found = _attend(scale * q, k, v)
    assert (scale * q.mT @ k).abs().max().item() > 60 or scale == 1
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), (q, k, v)), gradients)


def test_attention_is_exact_to_the_last_digits_of_float64() -> None:
    draw = torch.Generator().manual_seed(2)
    inputs = tuple(torch.randn(2, 2, 3, generator=draw, dtype=torch.float64).requires_grad_() for _ in range(3))
    assert torch.autograd.gradcheck(_attend, inputs)


def test_values_with_much_in_common_keep_their_differences_in_bfloat16() -> None:
    """Values around 30: without putting the mean aside the gradient of q is off by a quarter."""
    draw = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(128, 8, 39, generator=draw) for _ in range(3))
    g, v = torch.randn(v.shape, generator=draw), v + 30
    gradients = []
    for dtype in (torch.float64, torch.bfloat16):
        of = tuple(x.to(torch.bfloat16).to(dtype).requires_grad_() for x in (q, k, v))
        gradients.append(torch.autograd.grad((_attend(*of) * g.to(dtype)).sum(), of)[0].double())
    assert float((gradients[1] - gradients[0]).norm() / gradients[0].norm()) < 0.02


def test_fields_have_no_order() -> None:
    order, interact = torch.tensor([3, 0, 4, 1, 2]), layer()
    torch.testing.assert_close(interact(E[:, order]), interact(E)[:, order])


def test_without_queries_everyone_hears_the_mean() -> None:
    interact = layer()
    with torch.no_grad():
        interact.project[0] = 0.0
        interact.project[3] = 0.0
        mean = (E @ interact.project[2].T).mean(1, keepdim=True)
    torch.testing.assert_close(interact(E), torch.relu(mean).expand(-1, 5, -1), rtol=1e-4, atol=1e-5)


def test_without_values_only_the_residual_is_left() -> None:
    interact = layer()
    with torch.no_grad():
        interact.project[2] = 0.0
        expected = torch.relu(E @ interact.project[3].T)
    torch.testing.assert_close(interact(E), expected)


def test_one_field_attends_to_itself() -> None:
    interact, alone = layer(), E[:, :1]
    expected = torch.relu(alone @ interact.project[2].T + alone @ interact.project[3].T)
    torch.testing.assert_close(interact(alone), expected)


def test_plus_adds_the_logit_of_a_network() -> None:
    plus, batch = AutoInt(SPEC, hidden=(8,)).eval(), World(SPEC).batch(8)
    assert plus.deep is not None
    deep = plus.deep(plus.embedding(batch).flatten(1)).squeeze(1)
    both = quiet(plus, batch)[0]
    plus.deep = None
    torch.testing.assert_close(both - deep, quiet(plus, batch)[0])
    assert AutoInt(SPEC).deep is None


def test_first_order_adds_a_weight_of_each_value() -> None:
    wide, batch = AutoInt(SPEC, first_order=True).eval(), World(SPEC).batch(8)
    weights = wide.embedding.table.weight
    with torch.no_grad():
        weights[1:, -1] = torch.randn(len(weights) - 1, generator=torch.Generator().manual_seed(0))
        first = wide.embedding.with_linear(batch)[0]
        both = quiet(wide, batch)[0]
        weights[:, -1] = 0.0
        if wide.embedding.number_vectors is not None:
            wide.embedding.number_vectors[:, -1] = 0.0
    torch.testing.assert_close(both - first, quiet(wide, batch)[0])
    assert first.abs().min() > 0


def test_a_batch_of_nothing() -> None:
    assert quiet(AutoInt(SPEC), NOTHING)[0].shape == (0,)


def test_refuses() -> None:
    with pytest.raises(ValueError, match="head_dim are at least 1, received 3, 2 and 0"):
        AutoInt(SPEC, head_dim=0)
