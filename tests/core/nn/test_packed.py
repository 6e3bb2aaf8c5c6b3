from __future__ import annotations

import pytest
import torch
from torch import Tensor

from funnelrec.core.nn.packed import Packed, pack


def some(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Vectors [B, L, D] and a mask with rows of every length, an empty one and one with holes."""
    x = torch.randn(20, 7, 8, generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(7) >= 7 - (torch.arange(20) % 8).view(-1, 1)
    mask[9] = torch.tensor([True, False, True, True, False, False, True])
    return x, mask


def by_hand(x: Tensor, heads: int, causal: bool) -> Tensor:
    """One example without padding: [l, D]."""
    length, dim = x.shape
    out = []
    for part in x.split(dim // heads, dim=1):
        scores = part @ part.T / (dim // heads) ** 0.5
        if causal:
            scores = scores.masked_fill(torch.ones(length, length).triu(1) > 0, -torch.inf)
        out.append(scores.softmax(1) @ part)
    return torch.cat(out, 1)


@pytest.fixture(params=[False, True], ids=["packed", "exported"])
def exporting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """While a graph is exported nothing is packed, and every answer is the same."""
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: request.param)
    return bool(request.param)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [1, 2])
def test_attention_within_each_example(causal: bool, heads: int, exporting: bool) -> None:
    x, mask = some()
    packed = pack(mask)
    items = x[packed.example, packed.column]  # (T, D)
    assert len(items) == (mask.numel() if exporting else mask.sum())
    got = packed.grid(packed.attend(items, items, items, heads, causal=causal))
    for row in range(20):
        torch.testing.assert_close(got[row, mask[row]], by_hand(x[row, mask[row]], heads, causal))
        assert not got[row, ~mask[row]].any()


@pytest.mark.usefixtures("exporting")
def test_there_and_back_and_the_newest() -> None:
    x, mask = some()
    packed = pack(mask)
    items = x[packed.example, packed.column]
    torch.testing.assert_close(packed.grid(items), x.masked_fill(~mask.unsqueeze(2), 0.0))
    newest = packed.newest(items)
    for row in range(20):
        expected = x[row, mask[row]][-1] if mask[row].any() else torch.zeros(8)
        torch.testing.assert_close(newest[row], expected)


def test_nothing_at_all() -> None:
    packed = Packed(torch.zeros(3, 4, dtype=torch.bool))
    nothing = torch.zeros(0, 8, requires_grad=True)
    assert packed.attend(nothing, nothing, nothing, 2, causal=False).shape == (0, 8)
    assert not packed.newest(nothing).any()
    assert packed.grid(nothing).shape == (3, 4, 8)
