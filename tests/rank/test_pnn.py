"""PNN: the products that reach the network, against double loops, and digits by hand."""

from __future__ import annotations

import pytest
import torch

from funnelrec.core.batch import Batch
from funnelrec.core.nn.crosses import fm_pairs
from funnelrec.rank.pnn import PNN
from tests.contracts import World, full_spec, make_spec, quiet

SPEC = full_spec()
E = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("product", "expected"), [("inner", 4.0), ("outer", 28.0), ("both", 32.0)])
def test_by_hand(product: str, expected: float) -> None:
    """Vectors (1, 2) and (2, 1): inner 4; their sum (3, 3) squared: 9 + 9 + 9 = 27 in the triangle, and 1 from z."""
    pnn = PNN(
        make_spec([("a", "context", 3, 1), ("b", "context", 3, 1)]), embedding_dim=2, product=product, hidden=()
    ).eval()
    with torch.no_grad():
        pnn.embedding.table.weight[2] = torch.tensor([1.0, 2.0])
        pnn.embedding.table.weight[4] = torch.tensor([2.0, 1.0])
        weight = pnn.top.layers[0].weight
        weight.fill_(1.0)
        weight[0, :4] = torch.tensor([1.0, 0.0, 0.0, 0.0]) if product == "outer" else 0.0
        if product == "both":
            weight[0, 0] = 1.0
    batch = Batch(ids=torch.tensor([[2, 4]], dtype=torch.int32), numbers=torch.zeros(1, 0))
    torch.testing.assert_close(pnn(batch), torch.tensor([expected]))


def test_inner_products_are_those_of_a_double_loop() -> None:
    pnn = PNN(make_spec([(n, "context", 3, 1) for n in "abcde"]), embedding_dim=4)
    expected = torch.stack([(E[:, i] * E[:, j]).sum(1) for i in range(5) for j in range(i + 1, 5)], dim=1)
    torch.testing.assert_close(pnn._inner(E), expected)
    torch.testing.assert_close(pnn._inner(E).sum(1), fm_pairs(E))


def test_the_outer_product_of_sums_is_the_sum_of_outer_products() -> None:
    pnn = PNN(make_spec([(n, "context", 3, 1) for n in "abcde"]), embedding_dim=4, product="outer")
    total = sum(E[:, i].unsqueeze(2) * E[:, j].unsqueeze(1) for i in range(5) for j in range(5))
    row, column = torch.triu_indices(4, 4)
    torch.testing.assert_close(pnn._outer(E), total[:, row, column])
    trace = total.diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(trace, 2 * fm_pairs(E) + E.square().sum((1, 2)), rtol=1e-4, atol=1e-4)


def test_without_the_weights_of_the_products_it_is_a_plain_network() -> None:
    pnn, batch = PNN(SPEC, hidden=(8,)).eval(), World(SPEC).batch(8)
    with torch.no_grad():
        pnn.embedding.table.weight[1:].normal_()
        z = pnn.embedding.output_fields * 10
        before = pnn(batch)
        pnn.top.layers[0].weight[:, z:] = 0.0
        plain = pnn.top(torch.nn.functional.pad(pnn.embedding(batch).flatten(1), (0, 55)))
    torch.testing.assert_close(quiet(pnn, batch)[0], plain.squeeze(1))
    assert not torch.allclose(before, quiet(pnn, batch)[0])


def test_refuses_another_product() -> None:
    with pytest.raises(ValueError, match="product is 'inner', 'outer' or 'both', received 'kernel'"):
        PNN(SPEC, product="kernel")
