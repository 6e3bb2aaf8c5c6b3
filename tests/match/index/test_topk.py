"""top_rows against a full sort, with many ties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from funnelrec.match.index.topk import top_rows


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 6), st.integers(1, 40), st.integers(1, 45), st.integers(1, 8), st.integers(0, 10**6))
def test_equals_a_stable_sort(count: int, width: int, k: int, values: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, values, (count, width), generator=generator).float()  # few values: ties everywhere
    scores[torch.rand(count, width, generator=generator) < 0.3] = -torch.inf
    columns, found = top_rows(scores, k)
    for row in range(count):
        order = sorted(range(width), key=lambda c: (-float(scores[row, c]), c))
        order = [c for c in order if scores[row, c] > -torch.inf][:k]
        missing = k - len(order)
        assert columns[row].tolist() == order + [0] * missing
        assert found[row].tolist() == scores[row, order].tolist() + [-torch.inf] * missing


def test_k_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="k must be at least 1, received 0"):
        top_rows(torch.zeros(1, 3), 0)
