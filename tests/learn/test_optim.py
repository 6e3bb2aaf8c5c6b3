from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from jaxtyping import TypeCheckError
from torch import Tensor, nn
from torch.optim import Adam, Optimizer, SparseAdam

from funnelrec.core.nn.embedding import Table
from funnelrec.learn.ftrl import FTRL
from funnelrec.learn.optim import LazyAdam, RowwiseAdagrad, make_optimizers, split_parameters
from funnelrec.learn.regularise import Proximal


def run(optimizer: Optimizer, weight: nn.Parameter, sparse: bool, steps: int = 30) -> Tensor:
    """Weights after some steps on random rows, duplicates among them, row 0 as padding."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        ids = torch.randint(0, len(weight), (40,), generator=generator)
        pull = torch.randn(40, weight.shape[1], generator=generator, dtype=weight.dtype)
        optimizer.zero_grad()
        (F.embedding(ids, weight, padding_idx=0, sparse=sparse) * pull).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return weight.detach()


def weight(rows: int = 50, dim: int = 4, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    values = torch.randn(rows, dim, generator=torch.Generator().manual_seed(1), dtype=dtype)
    values[0] = 0
    return nn.Parameter(values)


def test_lazy_adam_is_sparse_adam_on_sparse_gradients() -> None:
    a, b = weight(), weight()
    ours, theirs = run(LazyAdam([a], lr=0.01, eps=1e-12), a, True), run(SparseAdam([b], lr=0.01, eps=1e-12), b, True)
    # they add eps before the bias correction and Adam adds it after, which shows where a gradient is tiny
    assert float((ours - theirs).abs().max()) < 1e-7


def test_lazy_adam_is_adam_on_dense_gradients() -> None:
    a, b = weight(), weight()
    torch.testing.assert_close(
        run(LazyAdam([a], lr=0.01), a, False), run(Adam([b], lr=0.01), b, False), rtol=0, atol=1e-14
    )


def test_lazy_adam_hand_worked() -> None:
    # Two ids of one row, gradients 1 and 3, sum 4: the first step of Adam is lr · 4 / (|4| + eps) = lr.
    table = nn.Parameter(torch.tensor([[0.0], [1.0], [5.0]]))
    optimizer = LazyAdam([table], lr=0.1)
    (F.embedding(torch.tensor([1, 1]), table, sparse=True) * torch.tensor([[1.0], [3.0]])).sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert table.flatten().tolist() == pytest.approx([0.0, 0.9, 5.0])
    assert optimizer.state[table]["exp_avg"].flatten().tolist() == pytest.approx([0, 0.4, 0])
    assert optimizer.state[table]["exp_avg_sq"].flatten().tolist() == pytest.approx([0, 0.016, 0])


@pytest.mark.parametrize("sparse", [True, False])
def test_rowwise_adagrad_is_its_definition(sparse: bool) -> None:
    a = weight()
    ours = run(RowwiseAdagrad([a], lr=0.1), a, sparse)
    rows = [list(row) for row in weight().tolist()]
    total = [0.0] * len(rows)
    generator = torch.Generator().manual_seed(2)
    for _ in range(30):
        ids = torch.randint(0, len(rows), (40,), generator=generator).tolist()
        pull = torch.randn(40, 4, generator=generator, dtype=torch.float64).tolist()
        for row in set(ids) - {0}:
            gradient = [sum(p[d] for i, p in zip(ids, pull, strict=True) if i == row) for d in range(4)]
            total[row] += sum(g * g for g in gradient) / 4
            for d in range(4):
                rows[row][d] -= 0.1 * gradient[d] / (total[row] ** 0.5 + 1e-8)
    torch.testing.assert_close(ours, torch.tensor(rows, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [LazyAdam, RowwiseAdagrad])
def test_only_touched_rows_move_and_never_row_0(kind: type[LazyAdam] | type[RowwiseAdagrad]) -> None:
    table = Table(100, 8)
    before = table.weight.detach().clone()
    optimizer = kind([table.weight], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        table(torch.tensor([[0, 7], [7, 9]])).square().sum().backward()  # type: ignore[no-untyped-call]
        assert table.weight.grad is not None
        assert table.weight.grad.is_sparse
        optimizer.step()
    moved = (table.weight.detach() != before).any(1).nonzero().flatten().tolist()
    assert moved == [7, 9]
    assert not table.weight[0].any()


@pytest.mark.parametrize("kind", [LazyAdam, RowwiseAdagrad, FTRL, partial(Proximal, l1=0.1)])
def test_a_step_costs_the_same_for_a_thousand_times_the_rows(kind: Callable[..., Optimizer]) -> None:
    def seconds(make: Callable[[list[nn.Parameter], float], Optimizer], rows: int, sparse: bool) -> float:
        table = nn.Parameter(torch.zeros(rows, 8))
        optimizer = make([table], 0.1)
        ids = torch.arange(1, 500) * (rows // 500)
        times = []
        for _ in range(6):
            optimizer.zero_grad()
            F.embedding(ids, table, sparse=sparse).sum().backward()  # type: ignore[no-untyped-call]
            start = time.perf_counter()
            optimizer.step()
            times.append(time.perf_counter() - start)
        return min(times)

    assert seconds(kind, 1_000_000, True) < 6 * seconds(kind, 1_000, True) + 1e-3
    assert seconds(Adam, 1_000_000, False) > 6 * seconds(Adam, 1_000, False) + 1e-3, "the control must be slow"


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lazy, self.full = Table(9, 2), Table(9, 2, dense=True)
        self.torch_sparse, self.torch_dense = nn.Embedding(9, 2, sparse=True), nn.Embedding(9, 2)
        self.tied = self.lazy
        self.body = nn.Linear(2, 1)
        self.frozen = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        tables = (self.lazy, self.full, self.torch_sparse, self.torch_dense)
        out: Tensor = self.body(sum(t(ids) for t in tables))
        return out


def test_split_parameters() -> None:
    model = Model()
    tables, dense = split_parameters(model)
    assert [id(p) for p in tables] == [id(model.lazy.weight), id(model.torch_sparse.weight)]
    assert [id(p) for p in dense] == [
        id(p) for p in (model.full.weight, model.torch_dense.weight, *model.body.parameters())
    ]


@pytest.mark.parametrize("table", ["lazy_adam", "rowwise_adagrad"])
def test_state_goes_through_tensors_and_json(table: str) -> None:
    import json

    def step(model: Model, optimizers: object, seed: int) -> None:
        ids = torch.randint(0, 9, (5,), generator=torch.Generator().manual_seed(seed))
        model(ids).square().sum().backward()
        optimizers.step()  # type: ignore[attr-defined]
        optimizers.zero_grad()  # type: ignore[attr-defined]

    first = Model()
    optimizers = make_optimizers(first, 0.1, 0.2, table=table, weight_decay=0.1)  # type: ignore[arg-type]
    optimizers.set_lr_factor(0.5)
    for seed in range(3):
        step(first, optimizers, seed)
    state = optimizers.state_dict()
    assert all(type(tensor) is Tensor for tensor in state["tensors"].values())
    second = Model()
    second.load_state_dict(first.state_dict())
    other = make_optimizers(second, 0.1, 0.2, table=table)  # type: ignore[arg-type]
    saved = {name: tensor.clone() for name, tensor in state["tensors"].items()}
    other.load_state_dict({"tensors": saved, "values": json.loads(json.dumps(state["values"]))})
    for seed in range(3, 6):
        step(first, optimizers, seed)
        step(second, other, seed)
    other.set_lr_factor(1.0)
    optimizers.set_lr_factor(1.0)
    assert other.state_dict()["values"] == optimizers.state_dict()["values"]
    for name, tensor in optimizers.state_dict()["tensors"].items():
        assert torch.equal(tensor, other.state_dict()["tensors"][name]), name
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_refusals() -> None:
    with pytest.raises((ValueError, TypeCheckError), match=r"(?s)lazy_adam.*rowwise_adagrad"):
        make_optimizers(Model(), table="sgd")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no trainable parameter"):
        make_optimizers(nn.ReLU())
    with pytest.raises(ValueError, match="lr must be positive, received 0"):
        LazyAdam([weight()], lr=0.0)
    with pytest.raises(ValueError, match=r"betas must lie in \[0, 1\)"):
        LazyAdam([weight()], betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="belongs to the optimisers"):
        make_optimizers(Model()).load_state_dict(make_optimizers(Model(), table="rowwise_adagrad").state_dict())
    with pytest.raises(ValueError, match="step takes no closure"):
        LazyAdam([weight()]).step(lambda: 0.0)


def test_parts_have_rates_of_their_own() -> None:
    model = nn.ModuleDict({"body": nn.Linear(1, 1), "head": nn.Linear(1, 1)})
    optimizers = make_optimizers(model, lr=0.1, lr_factors={"body": 0.5, "body.bias": 0.1})
    optimizers.set_lr_factor(0.5)
    rates = {id(p): g["lr"] for g in optimizers.optimizers[0].param_groups for p in g["params"]}

    assert rates[id(model["head"].weight)] == pytest.approx(0.05)
    assert rates[id(model["body"].weight)] == pytest.approx(0.025)
    assert rates[id(model["body"].bias)] == pytest.approx(0.005)
    with pytest.raises(ValueError, match="no parameter 'neck'; its parts are body, head"):
        make_optimizers(model, lr_factors={"neck": 0.1})
    with pytest.raises(ValueError, match="factor of 'body'"):
        make_optimizers(model, lr_factors={"body": 0.0})
