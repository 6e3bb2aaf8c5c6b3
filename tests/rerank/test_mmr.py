"""MMR: the greedy choice written out, and its two ends."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from funnelrec.core.contracts import Reranker
from funnelrec.rerank.mmr import MMR


def candidates(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=generator) * 7, torch.randn(count, 3, generator=generator)


def choose(trade_off: float, scores: Tensor, vectors: Tensor, k: int) -> list[int]:
    none = torch.zeros(len(scores), 1, dtype=torch.int64)
    return MMR(trade_off=trade_off).rerank(scores, k, categories=none, vectors=vectors).tolist()


def by_definition(trade_off: float, scores: Tensor, vectors: Tensor, k: int) -> list[int]:
    relevance = scores.double()
    span = float(relevance.max() - relevance.min())
    relevance = (relevance - relevance.min()) / (span or 1.0)
    unit = torch.nn.functional.normalize(vectors.double(), dim=1)
    likeness = unit @ unit.T
    chosen: list[int] = []
    for _ in range(min(k, len(scores))):
        rest = [i for i in range(len(scores)) if i not in chosen]
        worth = {
            i: float(relevance[i])
            if not chosen
            else trade_off * float(relevance[i]) - (1 - trade_off) * max(float(likeness[i, j]) for j in chosen)
            for i in rest
        }
        chosen.append(max(rest, key=lambda i: (worth[i], -i)))
    return chosen


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 25), st.integers(0, 10**6), st.integers(1, 10), st.floats(0, 1, width=16))
def test_equals_its_definition(count: int, seed: int, k: int, trade_off: float) -> None:
    scores, vectors = candidates(count, seed)
    chosen = choose(trade_off, scores, vectors, k)
    assert chosen == by_definition(trade_off, scores, vectors, k)
    assert len(set(chosen)) == min(k, count)


def test_one_keeps_the_best() -> None:
    scores, vectors = candidates(30, 0)
    assert choose(1.0, scores, vectors, 8) == scores.argsort(descending=True)[:8].tolist()


def test_the_twin_of_the_best_item_has_to_wait() -> None:
    scores = torch.tensor([1.0, 0.99, 0.5, 0.0])
    vectors = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    assert choose(0.5, scores, vectors, 4) == [0, 3, 2, 1]  # worths after item 0: -.005, .25, .5
    assert choose(0.9, scores, vectors, 2) == [0, 1]
    assert choose(0.0, scores, vectors, 2) == [0, 3]


def test_any_scale_of_the_scores_gives_the_same_list() -> None:
    scores, vectors = candidates(30, 1)
    assert choose(0.6, scores, vectors, 9) == choose(0.6, scores * 1000 - 50, vectors, 9)


def test_edges_and_contract() -> None:
    assert isinstance(MMR(), Reranker)
    assert choose(0.5, torch.ones(3), torch.zeros(3, 2), 5) == [0, 1, 2]
    assert choose(0.5, torch.zeros(0), torch.zeros(0, 2), 5) == []
    with pytest.raises(ValueError, match=r"trade_off must lie in \[0, 1\], received 1\.5"):
        MMR(trade_off=1.5)
