from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from funnelrec.core.batch import Batch
from funnelrec.core.nn.embedding import FieldEmbedding, Table, _in_order, coalesced, suggested_dim, sum_by_row
from funnelrec.core.schema import CategorySpec, NumberSpec, Spec

# columns: user | three slots of genre | item; rows: user 1..4, genre 5..7, item 8..9
SPEC = Spec(
    categories=(
        CategorySpec("user", "user", 5, 1, 0, 1),
        CategorySpec("genre", "item", 4, 5, 1, 4),
        CategorySpec("item", "item", 3, 8, 4, 5),
    ),
    numbers=(NumberSpec("age", "user", 0, 1),),
    num_users=5,
    num_items=3,
)
BATCH = Batch(
    ids=torch.tensor([[1, 5, 6, 0, 8], [4, 0, 0, 0, 9]], dtype=torch.int32),
    numbers=torch.tensor([[2.0], [-1.0]]),
)


def digits(fields: FieldEmbedding) -> FieldEmbedding:
    """Row r of the table becomes [10 r, r]; the number's vector [1, 100]."""
    with torch.no_grad():
        rows = torch.arange(fields.table.rows, dtype=torch.float32)
        fields.table.weight.copy_(torch.stack([10 * rows, rows], 1))
        assert fields.number_vectors is not None
        fields.number_vectors.copy_(torch.tensor([[1.0, 100.0]]))
    return fields


def test_table_starts_small_with_a_zero_padding_row() -> None:
    table = Table(50_000, 8, std=0.02)
    assert table.weight[0].eq(0).all()
    assert table.weight[1:].std().item() == pytest.approx(0.02, rel=0.02)
    assert table.weight[1:].mean().item() == pytest.approx(0.0, abs=2e-4)
    assert not Table(5, 8, padding=False).weight[0].eq(0).any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dense", [False, True])
def test_gradient_touches_the_rows_of_the_batch_and_never_padding(dtype: torch.dtype, dense: bool) -> None:
    table = Table(6, 2, dense=dense)
    table(torch.tensor([[0, 3, 3], [5, 0, 0]], dtype=dtype)).sum().backward()
    grad = table.weight.grad
    assert grad is not None
    assert grad.is_sparse is not dense
    if not dense:
        assert grad._nnz() == 2  # rows 3 and 5: what a step reads and writes, however many rows there are
        grad = grad.to_dense()
    torch.testing.assert_close(grad[:, 0], torch.tensor([0.0, 0.0, 0.0, 2.0, 0.0, 1.0]))


@given(st.lists(st.integers(0, 5), max_size=30), st.sampled_from([torch.float32, torch.float64]))
def test_sum_by_row_equals_a_loop(ids: list[int], dtype: torch.dtype) -> None:
    rows, values = torch.tensor(ids, dtype=torch.int32), torch.randn(len(ids), 3, dtype=dtype)
    distinct, sums = sum_by_row(rows, values)
    assert distinct.tolist() == sorted(set(ids))
    for row, total in zip(distinct.tolist(), sums, strict=True):
        torch.testing.assert_close(total, values[rows == row].sum(0))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("count", [1, 2, 7, 4096, 39_999, 40_000])
def test_rows_of_any_number_are_sorted_stably(count: int, dtype: torch.dtype) -> None:
    """Short lists by numpy, long ones by torch; equal rows keep their order, so that sums are the same bits."""
    for highest in (3, 2**31 - 1):
        rows = torch.randint(0, highest, (count,), dtype=dtype, generator=torch.Generator().manual_seed(count))
        wanted = torch.sort(rows, stable=True)
        ordered, order = _in_order(rows)
        assert ordered.dtype == order.dtype == torch.int64
        assert torch.equal(ordered, wanted.values.long()) and torch.equal(order, wanted.indices)


def test_coalesced_equals_torch() -> None:
    rows, values = torch.tensor([[4, 1, 4, 0]]), torch.randn(4, 3)
    gradient = torch.sparse_coo_tensor(rows, values, (6, 3), check_invariants=True)
    own = coalesced(gradient)
    assert own.is_coalesced() and coalesced(own) is own
    assert own.indices().tolist() == [[0, 1, 4]]
    torch.testing.assert_close(own.to_dense(), gradient.coalesce().to_dense())
    in_order = coalesced(torch.sparse_coo_tensor(torch.tensor([[1, 4]]), values[:2], (6, 3), check_invariants=True))
    assert in_order.is_coalesced() and in_order.values().data_ptr() == values.data_ptr()  # nothing was copied


def test_sparse_and_dense_gradients_agree_over_two_look_ups() -> None:
    sparse, dense = Table(9, 4), Table(9, 4, dense=True)
    dense.load_state_dict(sparse.state_dict())
    for table in (sparse, dense):
        (table(torch.tensor([[1, 0, 3], [8, 3, 3]])).square().sum() + table(torch.tensor([3, 8])).sum()).backward()
    assert sparse.weight.grad is not None
    torch.testing.assert_close(sparse.weight.grad.to_dense(), dense.weight.grad)


def test_padding_only_and_no_ids_give_an_empty_gradient() -> None:
    for ids in (torch.zeros(2, 3, dtype=torch.int32), torch.zeros(0, 3, dtype=torch.int32)):
        table = Table(4, 2)
        table(ids).sum().backward()
        assert table.weight.grad is not None and table.weight.grad._nnz() == 0


def test_ids_above_two_to_the_24_are_distinct() -> None:
    table = Table(2**24 + 2, 1)
    with torch.no_grad():
        table.weight[2**24] = 1.0
        table.weight[2**24 + 1] = 2.0
    assert table(torch.tensor([2**24, 2**24 + 1], dtype=torch.int32)).flatten().tolist() == [1.0, 2.0]


# dynamo itself looks at .grad of an intermediate tensor when it resumes after a graph break
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_look_up_stays_out_of_compiled_graphs() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def spy(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def seen() -> str:
        return " ".join(str(node.target) for graph in graphs for node in graph.graph.nodes)

    class Body(torch.nn.Module):
        def __init__(self, look_up: torch.nn.Module) -> None:
            super().__init__()
            self.look_up = look_up

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.look_up(ids) + 1)

    ids = torch.tensor([1, 2])
    torch.compile(Body(torch.nn.Embedding(5, 2)), backend=spy)(ids)
    assert "embedding" in seen()  # the spy does see a look-up that was compiled
    graphs.clear()
    torch.compile(Body(Table(5, 2)), backend=spy)(ids)
    assert "tanh" in seen()
    assert "embedding" not in seen()


def test_fields_by_hand() -> None:
    fields = digits(FieldEmbedding(SPEC, 2))
    assert fields.output_fields == 4
    expected = [
        # user 1, mean of genres 5 and 6, item 8, 2 * the number's vector
        [[10.0, 1.0], [55.0, 5.5], [80.0, 8.0], [2.0, 200.0]],
        # user 4, no genre, item 9, -1 * the number's vector
        [[40.0, 4.0], [0.0, 0.0], [90.0, 9.0], [-1.0, -100.0]],
    ]
    torch.testing.assert_close(fields(BATCH), torch.tensor(expected))


def test_linear_shares_the_row() -> None:
    fields = digits(FieldEmbedding(SPEC, 1, linear=True))
    linear, vectors = fields.with_linear(BATCH)
    torch.testing.assert_close(linear, torch.tensor([1 + 5.5 + 8 + 200, 4 + 9 - 100.0]))
    torch.testing.assert_close(vectors[0], torch.tensor([[10.0], [55.0], [80.0], [2.0]]))
    torch.testing.assert_close(fields(BATCH), vectors)


def test_linear_weights_start_at_zero_and_vectors_do_not() -> None:
    fields = FieldEmbedding(SPEC, 3, linear=True)
    linear, vectors = fields.with_linear(BATCH)
    assert linear.eq(0).all()
    assert vectors[0].ne(0).all()
    with pytest.raises(ValueError, match="linear=True"):
        FieldEmbedding(SPEC, 3).with_linear(BATCH)


def test_lookup_of_item_columns_equals_the_batch() -> None:
    fields = FieldEmbedding(SPEC, 4)
    history = BATCH.ids[:, SPEC.item_ids].unsqueeze(1).expand(-1, 7, -1)  # (B, L, Ci)
    vectors = fields.lookup(history, SPEC.item_ids)
    assert vectors.shape == (2, 7, 2, 4)
    torch.testing.assert_close(vectors[:, 3], fields(BATCH)[:, 1:3])
    torch.testing.assert_close(fields.lookup(BATCH.ids), fields(BATCH)[:, :3])


def test_lookup_refuses_half_a_field() -> None:
    fields = FieldEmbedding(SPEC, 4)
    with pytest.raises(ValueError, match="do not hold whole fields"):
        fields.lookup(BATCH.ids[:, 2:5], slice(2, 5))
    with pytest.raises(ValueError, match="the spec has 5 columns"):
        fields.lookup(BATCH.ids, slice(4, 9))
    with pytest.raises(ValueError, match="hold 2 columns but columns 1:5 are 4"):
        fields.lookup(BATCH.ids[:, :2], SPEC.item_ids)


def test_padding_slots_change_nothing() -> None:
    fields = FieldEmbedding(SPEC, 4)
    moved = BATCH.replace(ids=torch.tensor([[1, 0, 6, 5, 8], [4, 0, 0, 0, 9]], dtype=torch.int32))
    torch.testing.assert_close(fields(moved), fields(BATCH))


def test_every_parameter_gets_a_gradient() -> None:
    fields = FieldEmbedding(SPEC, 4, linear=True)
    linear, vectors = fields.with_linear(BATCH)
    (linear.sum() + vectors.sum()).backward()
    assert fields.table.weight.grad is not None and fields.number_vectors is not None
    touched = fields.table.weight.grad.to_dense().abs().sum(1).ne(0).nonzero().flatten().tolist()
    assert touched == [1, 4, 5, 6, 8, 9]
    torch.testing.assert_close(fields.number_vectors.grad, torch.ones(1, 5))  # 2 + (-1)


def test_only_numbers_or_nothing() -> None:
    numbers = Spec(numbers=(NumberSpec("x", "context", 0, 3),))
    assert FieldEmbedding(numbers, 5)(Batch(numbers=torch.rand(4, 3))).shape == (4, 3, 5)
    with pytest.raises(ValueError, match="neither categories nor numbers"):
        FieldEmbedding(Spec(), 5)(BATCH)


@given(st.integers(1, 2**40))
def test_suggested_dim_bounds(n: int) -> None:
    dim = suggested_dim(n)
    assert 2**dim >= n  # wide enough to tell n values apart bit by bit
    assert dim == 1 or 2 ** (dim - 1) < n
    assert suggested_dim(n, "root4") >= 6


def test_suggested_dim_by_hand() -> None:
    assert suggested_dim(1024) == 10
    assert suggested_dim(1025) == 11
    assert suggested_dim(10_000, "root4") == 60
    assert suggested_dim(10_000, "root4", k=1.0) == 10
    with pytest.raises(ValueError, match="at least 1, received 0"):
        suggested_dim(0)
    with pytest.raises(ValueError, match="received 'cube'"):
        suggested_dim(5, "cube")


def test_table_refuses_no_rows() -> None:
    with pytest.raises(ValueError, match="rows=0"):
        Table(0, 4)
