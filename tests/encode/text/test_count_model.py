"""Witten-Bell counts: a hand-worked text, probabilities that sum to 1, and what a longer context is worth."""

from __future__ import annotations

import math

import pytest
import torch

from funnelrec.encode.text.count_model import CountModel


def test_by_hand() -> None:
    """a b a b a c, V = 5. #(a) = 3, T = 3: p1(a) = (3 + 3/5) / 9 = .4, p1(b) = (2 + 3/5) / 9, p1(c) = (1 + 3/5) / 9.

    After a: b twice, c once, T = 2: p2(b | a) = (2 + 2 p1(b)) / 5; after c nothing was seen: p1.
    """
    text = torch.tensor([2, 3, 2, 3, 2, 4])
    one, two = (CountModel(text, num_tokens=5, order=n) for n in (1, 2))
    expected = [0.4, 2.6 / 9, 1.6 / 9]
    assert one.log_probabilities(torch.tensor([2, 3, 4])).exp().tolist() == pytest.approx(expected)
    got = two.log_probabilities(torch.tensor([2, 3, 4, 2])).exp().tolist()
    assert got == pytest.approx([0.4, (2 + 2 * 2.6 / 9) / 5, 1 / 3 * (1.6 / 9), 0.4])
    assert two.perplexity(torch.tensor([2, 3])) == pytest.approx(1 / got[1])


@pytest.mark.parametrize("order", [1, 2, 3])
def test_what_may_follow_sums_to_one(order: int) -> None:
    rows = torch.randint(0, 7, (300,), generator=torch.Generator().manual_seed(0))
    model = CountModel(rows, num_tokens=7, order=order)
    for context in ([3, 4], [6, 6], [0, 1]):
        p = [float(model.log_probabilities(torch.tensor([*context, w]))[-1].exp()) for w in range(7)]
        assert sum(p) == pytest.approx(1)


def test_longer_contexts_find_longer_rules() -> None:
    rule = torch.tensor([2, 3, 3, 4, 3, 3] * 50)
    perplexities = [CountModel(rule, num_tokens=5, order=n).perplexity(rule) for n in (1, 2, 3, 4)]
    assert perplexities == sorted(perplexities, reverse=True)
    assert perplexities[-1] < 1.1 < 1.5 < perplexities[0]
    unigram = CountModel(rule, num_tokens=5, order=1)
    entropy = -sum(p * math.log(p) for p in (1 / 6, 4 / 6, 1 / 6))
    assert math.log(unigram.perplexity(rule)) == pytest.approx(entropy, abs=0.01)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"10000\^order below 2\^62, received order 5"):
        CountModel(torch.arange(9), num_tokens=10_000, order=5)
    with pytest.raises(ValueError, match="order 3 need 3 tokens at least, received 2"):
        CountModel(torch.tensor([2, 3]), num_tokens=5, order=3)
