"""FM: digits by hand, the double loop, the closed gradient, and the split into user and item vectors."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from funnelrec.core.batch import Batch
from funnelrec.rank.fm import FM
from tests.contracts import World, full_spec, make_spec


def two_fields(values: list[list[float]]) -> FM:
    """Two fields of one known value each (fused rows 1, 2 and 3, 4), D = 1, w = 0; `values`: v of rows 2 and 4."""
    model = FM(make_spec([("a", "context", 3, 1), ("b", "context", 3, 1)]), embedding_dim=1)
    with torch.no_grad():
        model.embedding.table.weight.zero_()
        model.embedding.table.weight[[2, 4], :1] = torch.tensor(values)
    return model


def brute_force(model: FM, batch: Batch) -> Tensor:
    """Eq. (1) by the double loop over the fields."""
    first_order, vectors = model.embedding.with_linear(batch)
    pairs = [(vectors[:, i] * vectors[:, j]).sum(1) for i, j in combinations(range(vectors.shape[1]), 2)]
    return model.bias + first_order + torch.stack(pairs).sum(0)


def random_model(embedding_dim: int = 4) -> FM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FM(full_spec(), embedding_dim=embedding_dim)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
            model.embedding.table.weight[0] = 0
    return model


def test_one_pair_by_hand() -> None:
    batch = Batch(ids=torch.tensor([[2, 4], [2, 0], [0, 4]], dtype=torch.int32), numbers=torch.zeros(3, 0))
    assert two_fields([[0.5], [3.0]])(batch).tolist() == pytest.approx([1.5, 0.0, 0.0])  # v₁ v₂; alone, no pair


def test_all_terms_by_hand() -> None:
    model = two_fields([[0.5], [3.0]])
    with torch.no_grad():
        model.embedding.table.weight[[2, 4], 1] = torch.tensor([0.25, -1.0])  # w stands last in a row
        model.bias.fill_(0.1)
    batch = Batch(ids=torch.tensor([[2, 4]], dtype=torch.int32), numbers=torch.zeros(1, 0))
    assert model(batch).tolist() == pytest.approx([0.1 + 0.25 - 1.0 + 1.5])


def test_equals_the_double_loop() -> None:
    model, batch = random_model(), World(full_spec()).batch(20)  # numbers are values other than 1
    torch.testing.assert_close(model(batch), brute_force(model, batch), rtol=1e-4, atol=1e-4)


def test_pairs_grow_with_the_square_of_the_vectors() -> None:
    model, batch = random_model(), World(full_spec()).batch(20)

    def pairs() -> Tensor:
        return model(batch) - model.bias - model.embedding.with_linear(batch)[0]

    before = pairs()
    with torch.no_grad():
        model.embedding.table.weight[:, :-1] *= 3
        model.embedding.number_vectors[:, :-1] *= 3
    torch.testing.assert_close(pairs(), 9 * before, rtol=1e-4, atol=1e-3)


def test_gradient_in_closed_form() -> None:
    """∂ŷ/∂v_i = Σ_{j≠i} v_j for values of 1: here v₁ gets v₂ and the other way round."""
    model = two_fields([[0.5], [3.0]])
    model(Batch(ids=torch.tensor([[2, 4]], dtype=torch.int32), numbers=torch.zeros(1, 0))).sum().backward()
    gradient = model.embedding.table.weight.grad.to_dense()
    assert gradient[[2, 4]].tolist() == [[3.0, 1.0], [0.5, 1.0]]


def test_ranking_is_a_dot_product_of_user_and_item() -> None:
    """y(u, i) = y(u) + y(i) − w₀ + ⟨S_u, S_i⟩, so an FM can be searched like a vector matcher."""
    model = random_model()
    spec, batch = model.spec, World(full_spec()).batch(10)
    user_side = torch.tensor([c.side != "item" for c in spec.categories for _ in range(c.start, c.stop)])
    user_number = torch.tensor([n.side != "item" for n in spec.numbers for _ in range(n.start, n.stop)])
    user = batch.replace(ids=batch.ids * user_side, numbers=batch.numbers * user_number)
    item = batch.replace(ids=batch.ids * ~user_side, numbers=batch.numbers * ~user_number)
    dot = (model.embedding(user).sum(1) * model.embedding(item).sum(1)).sum(1)
    torch.testing.assert_close(model(batch), model(user) + model(item) - model.bias + dot, rtol=1e-4, atol=1e-3)
