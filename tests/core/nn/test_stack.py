"""Stack: vectors first, then the numbers untouched."""

from __future__ import annotations

import pytest
import torch

from funnelrec.core.batch import Batch
from funnelrec.core.nn.stack import Stack
from tests.contracts import World, full_spec, make_spec


def test_vectors_and_then_numbers() -> None:
    spec = full_spec()
    stack, batch = Stack(spec, 4), World(spec).batch(8)
    x = stack(batch)
    assert x.shape == (8, stack.out_features) == (8, 6 * 4 + 5)
    assert torch.equal(x[:, :24], stack.embedding(batch).flatten(1))
    assert torch.equal(x[:, 24:], batch.numbers)


def test_numbers_alone_and_categories_alone() -> None:
    numbers = torch.tensor([[1.0, 2.0]])
    only = Stack(make_spec([], [("n", "context", 2)]), 4)
    assert only(Batch(ids=torch.zeros(1, 0, dtype=torch.int32), numbers=numbers)).tolist() == [[1.0, 2.0]]
    assert Stack(make_spec([("a", "context", 5, 1)]), 4).out_features == 4
    with pytest.raises(ValueError, match="neither categories nor numbers"):
        Stack(make_spec([]), 4)
