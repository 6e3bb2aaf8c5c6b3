from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from funnelrec.core.nn.attention import (
    AdditiveScore,
    BilinearScore,
    DotScore,
    MLPScore,
    MultiHeadAttention,
    ScaledDotScore,
    masked_softmax,
)

PAST = torch.tensor([[False, False, True, True, True], [False] * 5, [True] * 5])


def naive(module: MultiHeadAttention, x: Tensor, mask: Tensor, causal: bool) -> Tensor:
    """The definition, one example, head, query at a time."""
    out = torch.zeros_like(x)
    size = x.shape[-1] // module.num_heads
    q, k, v = module.query(x), module.key(x), module.value(x)
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):
            seen = [j for j in range(x.shape[1]) if mask[b, j] and (j <= i or not causal)]
            if not seen:
                continue
            heads = []
            for h in range(module.num_heads):
                part = slice(h * size, (h + 1) * size)
                scores = torch.stack([q[b, i, part] @ k[b, j, part] for j in seen]) / math.sqrt(size)
                heads.append(scores.softmax(0) @ torch.stack([v[b, j, part] for j in seen]))
            out[b, i] = module.out(torch.cat(heads))
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("num_heads", [1, 2])
def test_equals_the_definition(causal: bool, num_heads: int) -> None:
    module = MultiHeadAttention(8, num_heads)
    nn.init.normal_(module.out.bias)
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(module(x, mask=PAST, causal=causal), naive(module, x, PAST, causal))
    real = torch.ones(3, 5, dtype=torch.bool)
    torch.testing.assert_close(module(x, causal=causal), naive(module, x, real, causal))


def test_by_hand() -> None:
    module = MultiHeadAttention(1, 1)
    for linear in (module.query, module.key, module.value, module.out):
        nn.init.ones_(linear.weight)
    # weights e^0 : e^1 = 0.2689 : 0.7311 for the query 1, values 0 and 1
    out = module(torch.tensor([[[0.0], [1.0]]]))
    torch.testing.assert_close(out.flatten(), torch.tensor([0.5, 0.7310586]))
    assert module(torch.tensor([[[0.0], [1.0]]]), causal=True).flatten()[0].item() == 0.0


@pytest.mark.parametrize("causal", [False, True])
def test_nothing_to_see_gives_zeros_and_finite_gradients(causal: bool) -> None:
    module = MultiHeadAttention(8, 2)
    nn.init.normal_(module.out.bias)
    x = torch.randn(3, 5, 8, requires_grad=True)
    out = module(x, mask=PAST, causal=causal)
    assert out[1].eq(0).all()
    assert out[0, :2].eq(0).all() == causal
    out.square().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_the_future_and_the_padding_do_not_matter() -> None:
    module = MultiHeadAttention(8, 2).eval()
    x = torch.randn(3, 5, 8)
    later, padding = x.clone(), x.clone()
    later[:, 3:] += 9
    padding[~PAST] += 9
    torch.testing.assert_close(module(x, causal=True)[:, :3], module(later, causal=True)[:, :3])
    assert not torch.allclose(module(x)[:, :3], module(later)[:, :3])  # control: without the mask it leaks
    torch.testing.assert_close(module(x, mask=PAST)[PAST], module(padding, mask=PAST)[PAST])
    longer = torch.cat([torch.randn(3, 4, 8), x], 1)
    longer_mask = torch.cat([torch.zeros(3, 4, dtype=torch.bool), PAST], 1)
    torch.testing.assert_close(module(longer, mask=longer_mask, causal=True)[:, 4:], module(x, mask=PAST, causal=True))


def test_cross_attention_and_dropout() -> None:
    module = MultiHeadAttention(8, 2, dropout=0.5, bias=False)
    query, keys = torch.randn(3, 2, 8), torch.randn(3, 5, 8)
    assert module(query, keys, PAST).shape == (3, 2, 8)
    assert not torch.equal(module(query, keys, PAST), module(query, keys, PAST))
    module.eval()
    assert torch.equal(module(query, keys, PAST), module(query, keys, PAST))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="dim=8, num_heads=3"):
        MultiHeadAttention(8, 3)
    with pytest.raises(ValueError, match="received 2 and 5"):
        MultiHeadAttention(8)(torch.randn(3, 2, 8), torch.randn(3, 5, 8), causal=True)


def test_masked_softmax_by_hand() -> None:
    scores = torch.tensor([[0.0, math.log(3.0), 50.0], [1.0, 2.0, 3.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    weights = masked_softmax(scores, mask)
    torch.testing.assert_close(weights, torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.0, 0.0]]))
    weights.square().sum().backward()
    assert scores.grad is not None and scores.grad.isfinite().all() and scores.grad[~mask].eq(0).all()


QUERY = torch.tensor([[[1.0, 2.0]]])
KEYS = torch.tensor([[[3.0, 4.0], [0.0, -1.0], [0.0, 0.0]]])


def test_dot_scores_by_hand() -> None:
    torch.testing.assert_close(DotScore()(QUERY, KEYS), torch.tensor([[[11.0, -2.0, 0.0]]]))
    torch.testing.assert_close(ScaledDotScore()(QUERY, KEYS), torch.tensor([[[11.0, -2.0, 0.0]]]) / 2**0.5)


def test_bilinear_score_by_hand() -> None:
    score = BilinearScore(2, 2)
    with torch.no_grad():
        score.weight.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    torch.testing.assert_close(score(QUERY, KEYS), torch.tensor([[[10.0, -1.0, 0.0]]]))  # 1*4 + 2*3, 1*-1, 0


def test_additive_score_by_hand() -> None:
    score = AdditiveScore(2, 2, 1)
    for linear in (score.query, score.key, score.score):
        nn.init.constant_(linear.weight, 0.1)
    nn.init.zeros_(score.query.bias)
    expected = [0.1 * math.tanh(0.3 + 0.7), 0.1 * math.tanh(0.3 - 0.1), 0.1 * math.tanh(0.3)]
    torch.testing.assert_close(score(QUERY, KEYS), torch.tensor([[expected]]))


def test_mlp_score_by_hand() -> None:
    score = MLPScore(2, (1,), activation="relu")
    first, last = score.first, score.rest.layers[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():  # weigh the blocks q, k, q - k, q * k by 1, 10, 100, 1000
        first.weight.copy_(torch.tensor([[1.0, 1, 10, 10, 100, 100, 1000, 1000]]))
        last.weight.fill_(1.0)
    # 3 + 70 - 400 + 11000, 3 - 10 + 400 - 2000 -> relu 0, 3 + 0 + 300 + 0
    torch.testing.assert_close(score(QUERY, KEYS), torch.tensor([[[10673.0, 0.0, 303.0]]]))


@pytest.mark.parametrize("activation", ["dice", "prelu"])
def test_mlp_score_equals_the_joined_form(activation: str) -> None:
    score = MLPScore(4, (6, 5), activation=activation)
    query, keys = torch.randn(3, 2, 4), torch.randn(3, 5, 4)
    q, k = query.unsqueeze(2).expand(3, 2, 5, 4), keys.unsqueeze(1).expand(3, 2, 5, 4)
    real = PAST.unsqueeze(1).expand(3, 2, 5)
    hidden = score.first(torch.cat([q, k, q - k, q * k], -1))
    hidden = score.activation(hidden, real) if activation == "dice" else score.activation(hidden)
    torch.testing.assert_close(score(query, keys, PAST), score.rest(hidden, real).squeeze(-1), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="at least one hidden layer"):
        MLPScore(4, ())


@pytest.mark.parametrize(
    "score", [DotScore(), ScaledDotScore(), BilinearScore(4, 4), AdditiveScore(4, 4, 6), MLPScore(4)], ids=repr
)
def test_scores_share_one_call(score: nn.Module) -> None:
    out = score(torch.randn(3, 2, 4), torch.randn(3, 5, 4), PAST)
    assert out.shape == (3, 2, 5)
    out.sum().backward() if out.requires_grad else None
    assert all(p.grad is not None and p.grad.isfinite().all() for p in score.parameters())


@pytest.mark.parametrize("score", [BilinearScore(5, 4), MLPScore(4, activation="prelu")], ids=repr)
def test_pairs_have_the_score_of_the_grid(score: BilinearScore | MLPScore) -> None:
    query = torch.randn(3, 5 if isinstance(score, BilinearScore) else 4)
    keys, owner = torch.randn(6, 4), torch.tensor([2, 0, 0, 1, 2, 2])
    grid = score(query.unsqueeze(1), keys.expand(3, 6, 4))[:, 0]  # (B, T)
    torch.testing.assert_close(score.of_pairs(query, keys, owner), grid[owner, torch.arange(6)])
