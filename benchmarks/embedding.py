"""Cost of the embedding table in a DeepFM training step: is it small, and is it independent of the number of rows?

    OMP_WAIT_POLICY=passive python benchmarks/embedding.py --output benchmarks/results/embedding.json

Network: DeepFM (arXiv:1703.04247) with 39 categorical fields, D = 16 plus a first-order weight, MLP 400-400-400, batch
4096, dropout 0.5, BCE, fused AdamW on the MLP. Field sizes grow geometrically from 4 values and add up to 1 M or 10 M
rows; ids are log-uniform within their field. The floor is the same network without a table: the vectors are a leaf
tensor whose gradient is thrown away. All variants run interleaved in one process, in rotating order, each round on a
fresh batch; read the ratios, not the milliseconds. `wall` is the clock; `cpu` is the processor time of all threads,
which a busy machine disturbs far less (OMP_WAIT_POLICY=passive, or waiting threads count as work). `floor_x` is a
variant's fastest or median round over the floor's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.core.nn.embedding import FieldEmbedding, Table, sum_by_row
from funnelrec.core.schema import CategorySpec, Spec
from funnelrec.learn.optim import LazyAdam, RowwiseAdagrad
from funnelrec.rank.deepfm import DeepFM

FIELDS, BATCH, DIM, HIDDEN = 39, 4096, 16, (400, 400, 400)
Step = Callable[[Batch], None]


def spec_of(rows: int) -> Spec:
    """39 fields whose sizes grow geometrically and add up to about `rows`."""
    low, high = 1.0, 4.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(4 * middle**k for k in range(FIELDS)) < rows else (low, middle)
    sizes = [int(4 * low**k) + 2 for k in range(FIELDS)]
    offsets = np.cumsum([1] + [size - 1 for size in sizes])
    return Spec(
        categories=tuple(CategorySpec(f"f{k}", "context", sizes[k], int(offsets[k]), k, k + 1) for k in range(FIELDS))
    )


def batch_of(spec: Spec, generator: torch.Generator) -> Batch:
    """Ids log-uniform over the known values of each field, labels by a coin."""
    known = torch.tensor([c.rows - 2 for c in spec.categories], dtype=torch.float64)
    first = torch.tensor([c.offset + 1 for c in spec.categories])
    draw = torch.rand(BATCH, FIELDS, generator=generator, dtype=torch.float64)
    value = (torch.exp(draw * torch.log(known + 1)).long() - 1).minimum(known.long() - 1)
    label = (torch.rand(BATCH, generator=generator) < 0.3).float()
    return Batch(ids=(first + value).int(), label=label)


class Leaf(nn.Module):
    """Stands where the FieldEmbedding stands and hands out a leaf tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = torch.randn(BATCH, FIELDS, DIM + 1).mul_(0.01).requires_grad_()

    def with_linear(self, batch: Batch) -> tuple[Tensor, Tensor]:
        vectors, weights = torch.split(self.rows, [DIM, 1], dim=-1)
        return weights.squeeze(-1).sum(1), vectors


class TwoTables(nn.Module):
    """First-order weights in a table of their own."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.vectors, self.weights = FieldEmbedding(spec, DIM), Table(spec.table_rows, 1)

    def with_linear(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.weights(batch.ids).squeeze(-1).sum(1), self.vectors(batch)


class TorchSparse(nn.Module):
    """torch's own sparse look-up, one gradient entry for every id."""

    def __init__(self, spec: Spec, sparse: bool = True) -> None:
        super().__init__()
        self.sparse = sparse
        self.weight = nn.Parameter(torch.randn(spec.table_rows, DIM + 1).mul_(0.01))

    def with_linear(self, batch: Batch) -> tuple[Tensor, Tensor]:
        rows = F.embedding(batch.ids, self.weight, padding_idx=0, sparse=self.sparse)
        vectors, weights = torch.split(rows, [DIM, 1], dim=-1)
        return weights.squeeze(-1).sum(1), vectors


def network(embedding: nn.Module | None, spec: Spec) -> tuple[nn.Module, torch.optim.Optimizer]:
    """DeepFM over the given embedding (absent: its own) and the optimiser of its dense part."""
    if embedding is None:
        model = DeepFM(spec, embedding_dim=DIM, hidden=HIDDEN, dropout=0.5)
    else:
        model = DeepFM(spec_of(1000), embedding_dim=DIM, hidden=HIDDEN, dropout=0.5)
        model.embedding = embedding  # type: ignore[assignment]
    return model, torch.optim.AdamW(model.deep.parameters(), lr=1e-3, fused=True)


def train_step(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> Step:
    def step(batch: Batch) -> None:
        for parameter in model.parameters():
            parameter.grad = None
        F.binary_cross_entropy_with_logits(model(batch), batch.label).backward()
        for optimizer in optimizers:
            optimizer.step()

    return step


def floor(spec: Spec) -> Step:
    leaf = Leaf()
    model, dense = network(leaf, spec)
    inner = train_step(model, [dense])

    def step(batch: Batch) -> None:
        leaf.rows.grad = None
        inner(batch)

    return step


def funnelrec_step(spec: Spec, kind: type[LazyAdam] | type[RowwiseAdagrad], pages: str = "plain") -> Step:
    model, dense = network(None, spec)
    table = model.embedding.table  # type: ignore[union-attr]
    if pages == "huge":  # numpy asks for huge pages from 4 MiB on, torch does not
        weight = torch.from_numpy(np.empty((table.rows, table.dim), dtype=np.float32))
        table.weight = nn.Parameter(weight.normal_(0, 0.01))  # type: ignore[union-attr]
    return train_step(model, [dense, kind([table.weight])])  # type: ignore[list-item]


def two_tables(spec: Spec) -> Step:
    tables = TwoTables(spec)
    model, dense = network(tables, spec)
    return train_step(model, [dense, LazyAdam(list(tables.parameters()))])


def torch_sparse(spec: Spec) -> Step:
    table = TorchSparse(spec)
    model, dense = network(table, spec)
    return train_step(model, [dense, torch.optim.SparseAdam([table.weight])])


def torch_dense(spec: Spec) -> Step:
    table = TorchSparse(spec, sparse=False)
    model, dense = network(table, spec)
    return train_step(model, [dense, torch.optim.Adam([table.weight], fused=True)])


def rows_as_leaf(spec: Spec, distinct: bool) -> Step:
    """The look-up outside autograd: the optimiser gets (rows, gradient) from the step, not from `weight.grad`.

    `distinct`: the leaf holds each row of the batch once and the model spreads it; else it holds all B·F rows.
    """
    leaf = Leaf()
    model, dense = network(leaf, spec)
    weight = Table(spec.table_rows, DIM + 1).weight
    optimizer = LazyAdam([weight])
    inner = train_step(model, [dense])

    def step(batch: Batch) -> None:
        flat = batch.ids.reshape(-1)
        if distinct:
            rows, inverse = torch.unique(flat, return_inverse=True)
            taken = weight.detach().index_select(0, rows).requires_grad_()
            leaf.rows = F.embedding(inverse, taken).view(BATCH, FIELDS, DIM + 1)
            inner(batch)
            gradient = taken.grad
        else:
            leaf.rows = weight.detach().index_select(0, flat).view(BATCH, FIELDS, DIM + 1).requires_grad_()
            inner(batch)
            rows, gradient = sum_by_row(flat, leaf.rows.grad.view(-1, DIM + 1))  # type: ignore[union-attr]
        weight.grad = torch.sparse_coo_tensor(
            rows.long().unsqueeze(0), gradient, weight.shape, is_coalesced=True, check_invariants=False
        )
        optimizer.step()

    return step


def interleaved(spec: Spec) -> Step:
    """Lazy Adam over rows that hold weight and both moments side by side: one random access instead of three."""
    leaf = Leaf()
    model, dense = network(leaf, spec)
    width, count = DIM + 1, 0
    store = torch.from_numpy(np.zeros((spec.table_rows, 3 * width), dtype=np.float32))
    store[:, :width].normal_(0, 0.01)
    inner = train_step(model, [dense])

    def step(batch: Batch) -> None:
        nonlocal count
        count += 1
        flat = batch.ids.reshape(-1)
        weight = store[:, :width].index_select(0, flat)
        leaf.rows = weight.view(BATCH, FIELDS, width).requires_grad_()
        inner(batch)
        rows, gradient = sum_by_row(flat, leaf.rows.grad.view(-1, width))  # type: ignore[union-attr]
        taken = store.index_select(0, rows)
        weight, mean, square = torch.split(taken, width, dim=1)
        mean.lerp_(gradient, 0.1)
        square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        change = square.sqrt().div_((1 - 0.999**count) ** 0.5).add_(1e-8)
        weight.addcdiv_(mean, change, value=-1e-3 / (1 - 0.9**count))
        store.index_copy_(0, rows, taken)

    return step


def primitives(spec: Spec, rounds: int) -> dict[str, dict[str, float]]:
    """The parts of a table's step one by one, each on a fresh batch: milliseconds of wall and processor time."""
    width, generator = DIM + 1, torch.Generator().manual_seed(0)
    weight, slots = torch.randn(spec.table_rows, width), torch.zeros(spec.table_rows, dtype=torch.int64)
    gradient = torch.randn(BATCH * FIELDS, width)

    def slot_array(ids: Tensor, rows: Tensor, sums: Tensor) -> None:
        """Distinct rows without a sort: each row remembers who came last, who names the row's place in the sum."""
        long, own = ids.long(), torch.arange(len(ids))
        slots[long] = own
        distinct = long[slots[long] == own]
        slots[distinct] = torch.arange(len(distinct))
        torch.zeros(len(distinct), width).index_add_(0, slots[long], gradient)

    def torch_coalesce(ids: Tensor, rows: Tensor, sums: Tensor) -> None:
        torch.sparse_coo_tensor(ids.long().unsqueeze(0), gradient, weight.shape, check_invariants=False).coalesce()

    def torch_unique(ids: Tensor, rows: Tensor, sums: Tensor) -> None:
        distinct, inverse = torch.unique(ids, return_inverse=True)
        torch.zeros(len(distinct), width).index_add_(0, inverse, gradient)

    parts: dict[str, Callable[[Tensor, Tensor, Tensor], object]] = {
        "look-up": lambda ids, rows, sums: weight.index_select(0, ids),
        "sum by row: sort + embedding_bag (adopted)": lambda ids, rows, sums: sum_by_row(ids, gradient),
        "sum by row: coalesce": torch_coalesce,
        "sum by row: unique + index_add_": torch_unique,
        "sum by row: slot array + index_add_": slot_array,
        "write distinct rows: index_copy_ of weight - change (adopted)": lambda ids, rows, sums: weight.index_copy_(
            0, rows, weight.index_select(0, rows).sub_(sums, alpha=1e-6)
        ),
        "write distinct rows: index_add_": lambda ids, rows, sums: weight.index_add_(0, rows, sums, alpha=-1e-6),
    }
    wall: dict[str, list[float]] = {name: [] for name in parts}
    cpu: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(rounds):
        ids = batch_of(spec, generator).ids.reshape(-1)
        rows, sums = sum_by_row(ids, gradient)
        for name, part in parts.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            part(ids, rows, sums)
            cpu[name].append(1000 * (time.process_time() - start_cpu))
            wall[name].append(1000 * (time.perf_counter() - start))
    return {
        name: {
            "wall_min_ms": round(min(wall[name]), 2),
            "cpu_min_ms": round(min(cpu[name]), 2),
            "cpu_median_ms": round(statistics.median(cpu[name]), 2),
        }
        for name in parts
    }


def variants(one: Spec, ten: Spec) -> Iterator[tuple[str, str, Callable[[], dict[str, tuple[Spec, Step]]]]]:
    """(name of the group, what it is about, how to build its steps)."""
    both = {"1M": one, "10M": ten}

    def group(**makers: Callable[[Spec], Step]) -> Callable[[], dict[str, tuple[Spec, Step]]]:
        def build() -> dict[str, tuple[Spec, Step]]:
            steps = {"floor": (one, floor(one))}
            for name, make in makers.items():
                for size, spec in both.items():
                    if not (name == "torch_dense_adam" and size == "10M"):  # 2.7 GB and seconds a step
                        steps[f"{name} {size}"] = (spec, make(spec))
            return steps

        return build

    yield (
        "adopted",
        "Table with sparse gradients summed by row; lazy Adam or row-wise Adagrad",
        group(
            lazy_adam=lambda s: funnelrec_step(s, LazyAdam),
            rowwise_adagrad=lambda s: funnelrec_step(s, RowwiseAdagrad),
        ),
    )
    yield (
        "gradient",
        "who sums the gradient of a row, all with lazy Adam",
        group(
            adopted=lambda s: funnelrec_step(s, LazyAdam),
            rows_as_leaf=lambda s: rows_as_leaf(s, distinct=False),
            distinct_rows_as_leaf=lambda s: rows_as_leaf(s, distinct=True),
            torch_sparse_adam=torch_sparse,
            torch_dense_adam=torch_dense,
        ),
    )
    yield (
        "memory",
        "first-order weight in a table of its own; weights on huge pages; weight and moments in one row",
        group(
            adopted=lambda s: funnelrec_step(s, LazyAdam),
            two_tables=two_tables,
            huge_pages=lambda s: funnelrec_step(s, LazyAdam, pages="huge"),
            interleaved_state=interleaved,
        ),
    )


def measure(steps: dict[str, tuple[Spec, Step]], rounds: int) -> dict[str, dict[str, float]]:
    generator = torch.Generator().manual_seed(0)
    wall: dict[str, list[float]] = {name: [] for name in steps}
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for number in range(rounds + 2):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            spec, step = steps[name]
            batch = batch_of(spec, generator)
            start, start_cpu = time.perf_counter(), time.process_time()
            step(batch)
            if number >= 2:  # two rounds to warm up
                cpu[name].append(1000 * (time.process_time() - start_cpu))
                wall[name].append(1000 * (time.perf_counter() - start))
    return {
        name: {
            f"{clock}_{what}": round(value, 3)
            for clock, times in (("wall", wall), ("cpu", cpu))
            for what, value in (
                ("min_ms", min(times[name])),
                ("median_ms", statistics.median(times[name])),
                ("floor_x_min", min(times[name]) / min(times["floor"])),
                ("floor_x_median", statistics.median(times[name]) / statistics.median(times["floor"])),
            )
        }
        for name in names
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--groups", nargs="*", default=["adopted", "gradient", "memory", "primitives"])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    one, ten = spec_of(1_000_000), spec_of(10_000_000)
    unique = {
        size: batch_of(spec, torch.Generator().manual_seed(0)).ids.unique().numel()
        for size, spec in (("1M", one), ("10M", ten))
    }
    result: dict[str, Any] = {
        "command": " ".join(["OMP_WAIT_POLICY=passive", "python", *sys.argv]),
        "threads": options.threads,
        "rounds": options.rounds,
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "rows": {"1M": one.table_rows, "10M": ten.table_rows},
        "distinct_rows_of_a_batch": unique,
        "look_ups_of_a_batch": BATCH * FIELDS,
        "groups": {},
    }
    for name, about, build in variants(one, ten):
        if name not in options.groups:
            continue
        before = os.getloadavg()[0]
        table = measure(build(), options.rounds)
        result["groups"][name] = {"about": about, "load_average": [before, os.getloadavg()[0]], "variants": table}
        for variant, row in table.items():
            sys.stdout.write(f"{name:10s} {variant:28s} " + "  ".join(f"{k} {v:.2f}" for k, v in row.items()) + "\n")
        sys.stdout.flush()
    if "primitives" in options.groups:
        result["primitives"] = {size: primitives(spec, options.rounds) for size, spec in (("1M", one), ("10M", ten))}
        for size, parts in result["primitives"].items():
            for part, row in parts.items():
                sys.stdout.write(f"{size:4s} {part:64s} " + "  ".join(f"{k} {v:.2f}" for k, v in row.items()) + "\n")
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
