"""The item graph by hand, and what is drawn from it against the counts of a slow loop."""

from __future__ import annotations

import math

import pytest
import torch

from funnelrec.encode.item import graph as graph_module
from funnelrec.encode.item.graph import ItemGraph


def star(*, weights: list[float] | None = None) -> ItemGraph:
    """Item 2 in the middle of 3, 4 and 5; 5 also knows 6; 7 knows nobody."""
    edges = [(2, 3), (2, 4), (2, 5), (5, 6)]
    both = sorted([*edges, *((b, a) for a, b in edges)])
    weight = dict(zip(edges, weights or [1.0] * 4, strict=True))
    row, column = (torch.tensor(x) for x in zip(*both, strict=True))
    values = torch.tensor([weight[min(e), max(e)] for e in both], dtype=torch.float64)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(row, minlength=8).cumsum(0)])
    return ItemGraph(offsets, column, values)


def test_edges_and_weights_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Users 1, 2, 3 took {2, 3}, users 1, 2 also 4, twice; 5 was taken by user 3 alone."""
    users = torch.tensor([1, 1, 1, 1, 2, 2, 2, 3, 3, 3])
    items = torch.tensor([2, 3, 4, 4, 2, 3, 4, 2, 3, 5])
    for block in (1, 64 * 2**20):  # an item at a time, or all at once
        monkeypatch.setattr(graph_module, "BLOCK_BYTES", block)
        graph = ItemGraph.from_interactions(users, items, 6, min_count=2)
        assert graph.degree.tolist() == [0, 0, 2, 2, 2, 0]
        assert graph.neighbours.tolist() == [3, 4, 2, 4, 2, 3]
        by_three, by_two = (math.log(3) + 1) / (math.log(2) + 1), (math.log(2) + 1) / (math.log(2) + 1)
        assert graph.weights.tolist() == pytest.approx([by_three, by_two, by_three, by_two, by_two, by_two])
    near = ItemGraph.from_interactions(users, items, 6, min_count=2, min_cosine=0.9)  # 2 / √6 = .816 is not enough
    assert near.neighbours.tolist() == [3, 2]
    alone = graph.without(torch.tensor([3]))
    assert alone.degree.tolist() == [0, 0, 1, 0, 1, 0]
    assert alone.neighbours.tolist() == [4, 2]


def test_draws_follow_the_weights() -> None:
    graph = star(weights=[1.0, 2.0, 5.0, 1.0])
    drawn = graph.draw(torch.tensor([2, 7, 3]), 20_000, torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn[0], minlength=8)[3:6] / 20_000
    torch.testing.assert_close(shares, torch.tensor([1 / 8, 2 / 8, 5 / 8]), atol=0.015, rtol=0)
    assert not drawn[1].any()
    assert drawn[2].unique().tolist() == [2]


def test_scores_of_a_context_by_hand() -> None:
    """From 3 one goes to 2, and from there to 3, 4 or 5: whoever is met at the second hop counts once, 2 twice."""
    graph = star()
    context, real = graph.contexts(torch.tensor([3, 7, 6]), (1, 12), 4, torch.Generator().manual_seed(0))
    assert context[0, 0] != 3
    assert 3 not in context[0].tolist()
    assert set(context[0, real[0]].tolist()) == {2, 4, 5}
    assert not real[1].any()
    assert context[2].tolist()[0] in (2, 5)


def test_contexts_are_those_of_a_slow_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the draws written down, the scores are counted by hand."""
    graph, drawn = star(), []
    plain = ItemGraph.draw

    def noted(self: ItemGraph, nodes: torch.Tensor, count: int, generator: torch.Generator | None) -> torch.Tensor:
        drawn.append(plain(self, nodes, count, generator))
        return drawn[-1]

    monkeypatch.setattr(ItemGraph, "draw", noted)
    nodes = torch.tensor([2, 3, 4, 5, 6])
    context, real = graph.contexts(nodes, (3, 2, 2), 3, torch.Generator().manual_seed(1))
    for i, node in enumerate(nodes.tolist()):
        score: dict[int, int] = {}
        for worth, visits in zip((3, 2, 1), drawn, strict=True):
            for item in visits.view(5, -1)[i].tolist():
                if item not in (0, node):
                    score[item] = score.get(item, 0) + worth
        expected = sorted(score, key=lambda item: (-score[item], item))[:3]
        assert context[i, real[i]].tolist() == expected


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="hops and size are positive"):
        star().contexts(torch.tensor([2]), (), 3, None)
