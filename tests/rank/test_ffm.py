"""FFM: digits by hand, the double loop, FM as its special case, and what instance normalisation leaves unchanged."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from funnelrec.core.batch import Batch
from funnelrec.core.nn.crosses import fm_pairs
from funnelrec.rank.ffm import FFM, _FieldPairs
from tests.contracts import World, full_spec, make_spec

SPEC = full_spec()
WORLD = World(SPEC)


def random_model(*, normalise: bool = False) -> FFM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FFM(SPEC, embedding_dim=3, normalise=normalise)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
            model.embedding.table.weight[0] = 0
    return model


def vectors_of(model: FFM, batch: Batch) -> tuple[Tensor, Tensor]:
    """⟨w, x⟩ [B] and [B, F, F, K]: [:, a, b] is the vector of field a's value against field b, times its value."""
    first_order, flat = model.embedding.with_linear(batch)
    return first_order, flat.unflatten(2, (model.fields, -1))


def double_loop(model: FFM, batch: Batch) -> Tensor:
    _, t = vectors_of(model, batch)
    return torch.stack([(t[:, a, b] * t[:, b, a]).sum(1) for a, b in combinations(range(model.fields), 2)]).sum(0)


def pairs(model: FFM, batch: Batch) -> Tensor:
    return model(batch) - model.bias - vectors_of(model, batch)[0]


def by_hand(*, normalise: bool) -> FFM:
    """Three fields of one known value (fused rows 2, 4, 6), K = 1; v[a, b] are the digits below."""
    model = FFM(make_spec([(n, "context", 3, 1) for n in "abc"]), embedding_dim=1, normalise=normalise)
    with torch.no_grad():
        rows = torch.tensor([[9.0, 2.0, 3.0], [5.0, 9.0, 7.0], [0.5, 0.25, 9.0]])  # the diagonal must not matter
        model.embedding.table.weight[[2, 4, 6], :3] = rows
        model.embedding.table.weight[[2, 4, 6], 3] = torch.tensor([1.0, 0.0, 2.0])  # first order
        model.bias.fill_(0.5)
    return model


def test_by_hand() -> None:
    """ab: 2·5, ac: 3·0.5, bc: 7·0.25, together 13.25; first order 3; bias 0.5. ‖x‖² is the number of fields."""
    batch = Batch(ids=torch.tensor([[2, 4, 6], [2, 4, 0]], dtype=torch.int32), numbers=torch.zeros(2, 0))
    assert by_hand(normalise=False)(batch).tolist() == pytest.approx([16.75, 11.5])
    assert by_hand(normalise=True)(batch).tolist() == pytest.approx(
        [0.5 + 3 / 3**0.5 + 13.25 / 3, 0.5 + 1 / 2**0.5 + 10 / 2]
    )


def test_equals_the_double_loop() -> None:
    model, batch = random_model(), WORLD.batch(40)  # numbers are values other than 1
    torch.testing.assert_close(pairs(model, batch), double_loop(model, batch), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("chunk", [1, 2**20])
def test_pairs_and_their_gradient_whatever_the_chunk(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("funnelrec.rank.ffm.CHUNK_BYTES", chunk)
    generator = torch.Generator().manual_seed(0)
    t = torch.randn(3, 4, 4, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(_FieldPairs.apply, (t,))
    (gradient,) = torch.autograd.grad(_FieldPairs.apply(t).sum(), t)
    torch.testing.assert_close(gradient[:, 1, 2], t[:, 2, 1])
    assert (gradient.diagonal(dim1=1, dim2=2) == 0).all()


def test_one_vector_for_all_fields_is_an_fm() -> None:
    model, batch = random_model(), WORLD.batch(40)
    with torch.no_grad():
        for weight in (model.embedding.table.weight, model.embedding.number_vectors):
            weight[:, :-1] = weight[:, :3].repeat(1, model.fields)
    _, t = vectors_of(model, batch)
    torch.testing.assert_close(pairs(model, batch), fm_pairs(t[:, :, 0]), rtol=1e-4, atol=1e-3)


def test_the_order_of_the_fields_does_not_matter() -> None:
    t = torch.randn(5, 4, 4, 2, generator=torch.Generator().manual_seed(1))
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(_FieldPairs.apply(t[:, order][:, :, order]), _FieldPairs.apply(t))


def test_a_vector_against_an_absent_field_is_not_read() -> None:
    model, batch = random_model(), WORLD.batch(10)
    city = SPEC.categories[1]
    batch = batch.replace(ids=batch.ids.index_fill(1, torch.tensor([city.start]), 0))
    before = model(batch)
    with torch.no_grad():
        for weight in (model.embedding.table.weight, model.embedding.number_vectors):
            weight[1:, 3:6] = 7.0  # every vector against the second field
    torch.testing.assert_close(model(batch), before)


@pytest.mark.parametrize("normalise", [False, True])
def test_normalisation_takes_the_length_of_the_instance_away(normalise: bool) -> None:
    spec = make_spec([], [("a", "context", 1), ("b", "context", 3)])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FFM(spec, normalise=normalise)
        batch = Batch(ids=torch.zeros(6, 0, dtype=torch.int32), numbers=torch.randn(6, 4))
    with torch.no_grad():
        model.embedding.number_vectors[:, -1] = 1.0
    longer = batch.replace(numbers=batch.numbers * 3)
    assert torch.allclose(model(longer), model(batch), atol=1e-5) is normalise


def test_nothing_known_is_the_bias() -> None:
    model = by_hand(normalise=True)
    assert model(Batch(ids=torch.zeros(1, 3, dtype=torch.int32), numbers=torch.zeros(1, 0))).tolist() == [0.5]


def test_starts_as_libffm_does() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FFM(SPEC, embedding_dim=4)
    vectors = model.embedding.table.weight[1:, :-1]
    assert 0 <= vectors.min() < 0.01
    assert 0.49 < vectors.max() <= 0.5
    assert vectors.mean().item() == pytest.approx(0.25, abs=0.01)
    assert not model.embedding.table.weight[0].any()
    assert not model.embedding.table.weight[:, -1].any()
