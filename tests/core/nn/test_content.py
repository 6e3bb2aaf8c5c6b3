"""ContentTable: what each part gives, and who learns from what."""

from __future__ import annotations

import pytest
import torch

from funnelrec.core.nn.content import ContentTable


def table(**options: float) -> ContentTable:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = ContentTable(6, 4, content_dim=3, **options)  # type: ignore[arg-type]
    content = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    content[:2] = 0.0
    content[3] = 0.0  # nothing is known of item 3
    warm = torch.tensor([True, True, True, True, True, False])
    made.set_content(content, warm)
    return made


def test_a_vector_is_its_own_and_its_contents() -> None:
    made = table().eval()
    rows = torch.arange(6)
    x = made.adapter(made.content)
    expected = made.weight + x
    expected[torch.tensor([0, 1, 3])] = made.weight[torch.tensor([0, 1, 3])]  # no content: no bias either
    expected[5] = x[5]  # training never saw it
    torch.testing.assert_close(made(rows), expected)
    made.scale.fill_(2.0)
    expected[5] = 2 * x[5]
    torch.testing.assert_close(made(rows), expected)
    torch.testing.assert_close(made(torch.tensor([[5, 2]])), expected[torch.tensor([[5, 2]])])


def test_id_dropout_in_training_alone() -> None:
    made = table(id_dropout=0.5)
    rows = torch.full((4000,), 2)
    own, both = made.of_content(torch.tensor(2)), made.eval()(torch.tensor(2))
    drawn = made.train()(rows)
    alone, whole = (drawn - own).abs().amax(1) < 1e-6, (drawn - both).abs().amax(1) < 1e-6
    assert bool((alone | whole).all())
    assert float(alone.float().mean()) == pytest.approx(0.5, abs=0.03)


def test_gradients() -> None:
    """Content is given and not learnt; an item that training never saw teaches the adapter alone."""
    made = table().eval()
    made(torch.tensor([2, 5])).sum().backward()
    assert made.weight.grad is not None
    touched = made.weight.grad.coalesce().to_dense().abs().sum(1) > 0
    assert touched.tolist() == [False, False, True, False, False, False]
    assert made.adapter[1].weight.grad is not None
    assert not made.content.requires_grad


def test_bad_content() -> None:
    with pytest.raises(ValueError, match=r"content is \[6, 3\] and warm \[6\], received \[6, 2\] and \[6\]"):
        table().set_content(torch.zeros(6, 2), torch.ones(6, dtype=torch.bool))


def test_many_look_ups_adapt_each_row_once() -> None:
    """More look-ups than rows: the same vectors and gradients by one pass over the table."""
    made = table().eval()
    ids = torch.tensor([[2, 5, 5, 0], [4, 3, 2, 2]])
    many = made.of_content(ids)
    (many * torch.arange(4.0)).sum().backward()  # type: ignore[no-untyped-call]
    gradient = [p.grad.clone() for p in made.adapter.parameters() if p.grad is not None]
    made.zero_grad()
    few = torch.stack([made.of_content(row) for row in ids])
    (few * torch.arange(4.0)).sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(many, few)
    torch.testing.assert_close(gradient, [p.grad for p in made.adapter.parameters()])
