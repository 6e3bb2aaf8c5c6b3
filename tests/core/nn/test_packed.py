from __future__ import annotations

import pytest
import torch
from torch import Tensor

from funnelrec.core.nn.packed import Packed, Steps, pack, steps


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


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.usefixtures("exporting")
def test_attention_of_the_newest_alone(causal: bool, heads: int) -> None:
    """The same as everybody's attention, read at the newest items; and its gradient is a number everywhere."""
    x, mask = some()
    packed = pack(mask)
    items = x[packed.example, packed.column].requires_grad_()
    expected = packed.by_example(packed.newest_of(packed.attend(items, 2 * items, items, heads, causal=causal)))
    found = packed.by_example(packed.attend_newest(packed.newest_of(items), 2 * items, items, heads))
    torch.testing.assert_close(found, expected)
    assert not found[~mask.any(1)].any()
    gradient = torch.autograd.grad(found.square().sum(), items)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.square().sum(), items)[0])


@pytest.mark.usefixtures("exporting")
def test_there_and_back_and_the_newest() -> None:
    x, mask = some()
    packed = pack(mask)
    items = x[packed.example, packed.column]
    torch.testing.assert_close(packed.grid(items), x.masked_fill(~mask.unsqueeze(2), 0.0))
    newest = packed.by_example(packed.newest_of(items))
    for row in range(20):
        expected = x[row, mask[row]][-1] if mask[row].any() else torch.zeros(8)
        torch.testing.assert_close(newest[row], expected)


def test_nothing_at_all() -> None:
    packed = Packed(torch.zeros(3, 4, dtype=torch.bool))
    nothing = torch.zeros(0, 8, requires_grad=True)
    assert packed.attend(nothing, nothing, nothing, 2, causal=False).shape == (0, 8)
    assert not packed.by_example(packed.newest_of(nothing)).any()
    assert not packed.attend_newest(packed.newest_of(nothing), nothing, nothing, 1).any()
    assert packed.grid(nothing).shape == (3, 4, 8)


@pytest.mark.usefixtures("exporting")
def test_steps_take_sum_and_weigh_the_items_of_each_example() -> None:
    x, mask = some()
    rows = steps(mask)
    items = rows.take(x)
    torch.testing.assert_close(rows.sum(items * rows.real.unsqueeze(1)), (x * mask.unsqueeze(2)).sum(1))
    weights = rows.softmax(items[:, 0])
    for row in range(20):
        mine = (rows.example == row) & rows.real
        torch.testing.assert_close(weights[mine].sum(), torch.tensor(float(mask[row].any())))
    total = rows.sum(weights.unsqueeze(1) * items)
    expected = [(x[r, mask[r]].T @ x[r, mask[r], 0].softmax(0)) if mask[r].any() else torch.zeros(8) for r in range(20)]
    torch.testing.assert_close(total, torch.stack(expected))


def test_steps_end_together_and_a_step_is_a_block_of_those_who_have_begun() -> None:
    """Histories a b c, none and d _ e: step by step a | b d | c e, the longest first."""
    mask = torch.tensor([[True] * 3, [False] * 3, [True, False, True]])
    rows = Steps(mask)
    assert rows.begun == [1, 2, 2]
    assert len(rows) == 5
    assert rows.slot.tolist() == [0, 1, 6, 2, 8]
    assert rows.example.tolist() == [0, 0, 2, 0, 2]
    assert [x.tolist() for x in rows.pairs()] == [[0, 1, 2], [1, 3, 4]]
    x = torch.tensor([[1.0], [2.0], [6.0], [3.0], [8.0]])
    torch.testing.assert_close(rows.last(x), torch.tensor([[3.0], [0.0], [8.0]]))
    expected = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [6.0, 6.0, 8.0]])
    torch.testing.assert_close(rows.grid(x).squeeze(2), expected)


def test_steps_of_nothing() -> None:
    for mask in (torch.zeros(3, 4, dtype=torch.bool), torch.zeros(0, 4, dtype=torch.bool)):
        rows = Steps(mask)
        assert len(rows) == 0
        assert rows.begun == []
        nothing = rows.take(torch.ones(*mask.shape, 2))
        assert rows.sum(nothing).shape == rows.last(nothing).shape == (len(mask), 2)
        assert not rows.grid(nothing).any()
        assert rows.pairs()[0].shape == rows.softmax(nothing[:, 0]).shape == (0,)
