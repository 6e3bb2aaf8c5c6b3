from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from funnelrec.encode.text.decoding import BEGIN, END, beam_search, greedy


class Table:
    """Log-probabilities of the next token by the one before; texts of up to three tokens can be counted by hand."""

    def __init__(self, next_token: dict[int, dict[int, float]]) -> None:
        self.next_token = next_token

    class Past:
        def select(self, rows: Tensor) -> Table.Past:
            return self

    def start(self, source: Tensor) -> Table.Past:
        return self.Past()

    def step(self, written: Tensor, past: Table.Past) -> tuple[Tensor, Table.Past]:
        logits = torch.full((len(written), 8), -1e9)
        for row, token in enumerate(written.tolist()):
            for then, share in self.next_token.get(token, {END: 1.0}).items():
                logits[row, then] = math.log(share)
        return logits, past


def test_the_beam_by_hand() -> None:
    """Greedy takes 4 (.6), which leads to .6 · .5 · .9 = .27; the beam finds 5, .4 · 1 · 1 = .4."""
    table = Table({BEGIN: {4: 0.6, 5: 0.4}, 4: {6: 0.5, 7: 0.5}, 5: {6: 1.0}, 6: {END: 1.0}, 7: {END: 1.0}})
    source = torch.full((3, 1), 4)
    rows, total = greedy(table, source)
    assert rows.tolist() == [[4, 6]] * 3
    assert total.tolist() == pytest.approx([math.log(0.3)] * 3)
    rows, total = beam_search(table, source, width=2, alpha=0.0)
    assert rows.tolist() == [[5, 6]] * 3
    assert total.tolist() == pytest.approx([math.log(0.4)] * 3)
    _, scored = beam_search(table, source, width=2, alpha=1.0)  # three tokens, the end counted: (5 + 3) / 6
    assert scored.tolist() == pytest.approx([math.log(0.4) / (8 / 6)] * 3)


def test_the_length_penalty_prefers_the_longer_text() -> None:
    """The end at once has .5; 4 4 end has .5 · .8 · 1, less, but more a token."""
    table = Table({BEGIN: {END: 0.5, 4: 0.5}, 4: {5: 0.8, END: 0.2}, 5: {END: 1.0}})
    source = torch.full((1, 1), 4)
    short, _ = beam_search(table, source, width=3, alpha=0.0)
    long, _ = beam_search(table, source, width=3, alpha=2.0)
    assert (short.tolist(), long.tolist()) == ([[0]], [[4, 5]])
    with pytest.raises(ValueError, match=r"received 0 and 0\.6"):
        beam_search(table, source, width=0)


def test_a_text_without_an_end_is_cut() -> None:
    table, source = Table({BEGIN: {4: 1.0}, 4: {4: 1.0}}), torch.full((2, 1), 4)
    for rows, score in (greedy(table, source, most=5), beam_search(table, source, width=2, most=5)):
        assert rows.tolist() == [[4] * 5] * 2
        assert score.tolist() == pytest.approx([0.0, 0.0], abs=1e-4)
