"""ControllableDiversity: the greedy choice of the paper, and what lambda promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from funnelrec.core.contracts import Reranker
from funnelrec.rerank.diversity import ControllableDiversity


def candidates(count: int, num_categories: int, seed: int, groups: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(count, generator=generator)
    categories = torch.randint(0 if groups > 1 else 1, num_categories + 1, (count, groups), generator=generator)
    return scores, categories, torch.randn(count, 4, generator=generator)


def choose(diversity: float, data: tuple[Tensor, Tensor, Tensor], k: int) -> list[int]:
    scores, categories, vectors = data
    return ControllableDiversity(diversity=diversity).rerank(scores, k, categories=categories, vectors=vectors).tolist()


def algorithm_2(diversity: float, data: tuple[Tensor, Tensor, Tensor], k: int) -> list[int]:
    """The paper's greedy inference with + lambda * sum g, written out."""
    scores, categories = data[0].double().tolist(), data[1][:, 0].tolist()
    chosen: list[int] = []
    for _ in range(min(k, len(scores))):
        rest = [i for i in range(len(scores)) if i not in chosen]
        gains = {i: scores[i] + diversity * sum(categories[i] != categories[j] for j in chosen) for i in rest}
        chosen.append(max(rest, key=lambda i: (gains[i], -i)))
    return chosen


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 30), st.integers(1, 6), st.integers(0, 10**6), st.integers(1, 12), st.floats(0, 3, width=16))
def test_equals_algorithm_2(count: int, num_categories: int, seed: int, k: int, diversity: float) -> None:
    data = candidates(count, num_categories, seed)
    chosen = choose(diversity, data, k)
    assert chosen == algorithm_2(diversity, data, k)
    assert len(set(chosen)) == min(k, count)


def test_zero_keeps_the_best_and_ties_go_to_the_earlier_candidate() -> None:
    data = candidates(40, 5, 0)
    assert choose(0.0, data, 10) == data[0].argsort(descending=True)[:10].tolist()
    flat = torch.zeros(5), torch.tensor([[1], [1], [2], [2], [3]]), torch.zeros(5, 2)
    assert choose(0.0, flat, 3) == [0, 1, 2]
    assert choose(1.0, flat, 5) == [0, 2, 4, 1, 3]


def test_a_large_lambda_takes_distinct_categories_first() -> None:
    data = candidates(50, 7, 1)
    chosen = choose(1e6, data, 12)
    first = data[1][chosen[:7], 0].tolist()
    assert sorted(first) == [1, 2, 3, 4, 5, 6, 7]
    best = {c: max(data[0][data[1][:, 0] == c].tolist()) for c in first}
    assert data[0][chosen[:7]].tolist() == [best[c] for c in first]  # the best item of each


def test_worked_digits_with_several_categories() -> None:
    scores = torch.tensor([1.0, 0.9, 0.8, 0.7])
    categories = torch.tensor([[1, 2, 0], [2, 1, 3], [2, 0, 0], [0, 0, 0]])
    # to item 0: item 1 shares 2 of 3, item 2 shares 1 of 2, item 3 nothing
    # gains after item 0 at lambda .5: .9 - .333 = .567, .8 - .25 = .55, .7
    assert choose(0.5, (scores, categories, torch.zeros(4, 1)), 4) == [0, 3, 1, 2]
    assert choose(0.1, (scores, categories, torch.zeros(4, 1)), 4) == [0, 1, 2, 3]


def test_items_without_a_category_are_one_category() -> None:
    data = torch.tensor([1.0, 0.9, 0.5]), torch.tensor([[0], [0], [3]]), torch.zeros(3, 1)
    assert choose(1.0, data, 3) == [0, 2, 1]


def test_diversity_of_the_list_grows_with_lambda() -> None:
    scores, categories, vectors = candidates(60, 6, 3)
    data = scores - 0.5 * categories[:, 0], categories, vectors  # the best items are much of a kind

    def share_of_different_pairs(chosen: list[int]) -> float:
        own = data[1][chosen, 0]
        return float((own.unsqueeze(0) != own.unsqueeze(1)).float().mean())

    values = [share_of_different_pairs(choose(x, data, 10)) for x in (0.0, 0.1, 0.5, 5.0)]
    assert values == sorted(values)
    assert values[-1] > values[0]


def test_input_is_left_alone_and_the_contract_is_met() -> None:
    data = candidates(10, 3, 4)
    before = data[0].clone()
    choose(0.5, data, 5)
    assert torch.equal(before, data[0])
    assert isinstance(ControllableDiversity(), Reranker)
    assert choose(0.5, candidates(3, 3, 0), 10) == algorithm_2(0.5, candidates(3, 3, 0), 10)
    assert choose(0.5, (torch.zeros(0), torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, 2)), 3) == []
    uncategorised = data[0], torch.zeros(10, 0, dtype=torch.int64), data[2]
    assert choose(0.5, uncategorised, 4) == choose(0.0, data, 4)
    with pytest.raises(ValueError, match=r"diversity must be at least 0, received -0\.1"):
        ControllableDiversity(diversity=-0.1)
