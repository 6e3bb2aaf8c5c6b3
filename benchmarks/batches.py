"""Rows per second into batches: whole tensors by an index against a DataLoader that asks for one row at a time.

    python benchmarks/batches.py --output benchmarks/results/batches.json

Data: a CTR log of 26 ids, 13 numbers and a label, 1 M rows, batch 4096, shuffled. The DataLoader is torch's, with a
Dataset whose `__getitem__` takes one row of three tensors in memory and with the default collate; no worker processes.
All variants run in turn in one process with one thread (a row-by-row loader has no use for a second); read the
ratios, not the rows per second. `wall` is the clock, `cpu` the processor time, which a busy machine disturbs far less.
"cold" is the memory map after its pages were dropped from the page cache (Linux): its wall time measures the disk, too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from torch.utils.data import Dataset as TorchDataset

from funnelrec.core.schema import Category, Number, Schema
from funnelrec.data.batches import Batches
from funnelrec.data.dataset import Dataset
from funnelrec.data.examples import Impressions
from funnelrec.data.split import Ratio
from funnelrec.data.tables import Tables

IDS, NUMBERS, BATCH, BLOCK = 26, 13, 4096, 65_536


class PerRow(TorchDataset[tuple[Tensor, Tensor, Tensor]]):
    """One example at a time, from tensors in memory."""

    def __init__(self, ids: Tensor, numbers: Tensor, label: Tensor) -> None:
        self.ids, self.numbers, self.label = ids, numbers, label

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.ids[row], self.numbers[row], self.label[row]


def build(rows: int, folder: Path) -> Dataset:
    """The made-up log as a dataset: every row trains."""
    rng = np.random.default_rng(0)
    columns: dict[str, np.ndarray] = {"label": rng.integers(0, 2, rows)}
    columns |= {f"c{k}": (rng.random(rows) ** 4 * 20_000).astype(np.int64) for k in range(IDS)}
    columns |= {f"n{k}": rng.random(rows) for k in range(NUMBERS)}
    schema = Schema(
        label="label",
        context=tuple([Category(f"c{k}") for k in range(IDS)] + [Number(f"n{k}", "standard") for k in range(NUMBERS)]),
    )
    return Dataset.build(Tables(pl.DataFrame(columns), schema), folder, split=Ratio(0.0, 0.0))


def drop_pages(path: Path) -> None:
    """Ask Linux to forget the pages of a file."""
    if not hasattr(os, "posix_fadvise"):
        return
    handle = os.open(path, os.O_RDONLY)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def rates_of(batches: Iterable[object]) -> tuple[float, float]:
    """Rows per second of wall time and of processor time; making the order is part of the epoch."""
    start, start_cpu, rows = time.perf_counter(), time.process_time(), 0
    for batch in batches:
        rows += len(batch[2]) if isinstance(batch, list) else batch.size  # type: ignore[attr-defined]
    return rows / (time.perf_counter() - start), rows / (time.process_time() - start_cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        mapped = build(options.rows, Path(scratch) / "log")
        memory = Dataset.open(mapped.folder, in_memory=True)
        every = Impressions(memory, "train").gather(torch.arange(options.rows))
        row_by_row = PerRow(every.ids.contiguous(), every.numbers.contiguous(), every.label.contiguous())

        def loader() -> DataLoader[tuple[Tensor, Tensor, Tensor]]:
            return DataLoader(row_by_row, BATCH, sampler=RandomSampler(row_by_row, num_samples=6 * BATCH))

        def epoch(data: Dataset, block: int | None, number: int) -> Iterable[object]:
            return Batches(Impressions(data, "train"), BATCH, shuffle=True, block=block).epoch(number)

        def cold(number: int) -> Iterable[object]:
            drop_pages(mapped.folder / "facts.npy")
            return epoch(Dataset.open(mapped.folder, verify=False), BLOCK, number)

        variants: dict[str, Callable[[int], Iterable[object]]] = {
            "DataLoader, a row at a time": lambda _: loader(),
            "in memory": lambda n: epoch(memory, None, n),
            "in memory, by blocks": lambda n: epoch(memory, BLOCK, n),
            "memory map": lambda n: epoch(mapped, None, n),
            "memory map, by blocks": lambda n: epoch(mapped, BLOCK, n),
            "memory map, by blocks, cold": cold,
        }
        rates: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
        for number in range(options.rounds + 1):
            for name, make in variants.items():
                measured = rates_of(make(number))
                if number:  # one round to warm up
                    rates[name].append(measured)
    table: dict[str, dict[str, float]] = {name: {} for name in variants}
    for place, clock in enumerate(("wall", "cpu")):
        for name, row in table.items():
            row[f"{clock}_median_rows_per_second"] = round(statistics.median(r[place] for r in rates[name]))
            row[f"{clock}_best_rows_per_second"] = round(max(r[place] for r in rates[name]))
        base = table["DataLoader, a row at a time"]
        for row in table.values():
            for what in ("median", "best"):
                name = f"{clock}_{what}_rows_per_second"
                row[f"{clock}_{what}_ratio"] = round(row[name] / base[name], 1)
    sys.stdout.write(f"{'variant':30s} {'rows/s':>12s} {'x wall':>8s} {'x best':>8s} {'x cpu':>8s}\n")
    for name, row in table.items():
        sys.stdout.write(
            f"{name:30s} {row['wall_median_rows_per_second']:12,.0f} {row['wall_median_ratio']:8.1f} "
            f"{row['wall_best_ratio']:8.1f} {row['cpu_median_ratio']:8.1f}\n"
        )
    result = {
        "command": " ".join(["python", *sys.argv]),
        "threads": options.threads,
        "rounds": options.rounds,
        "rows": options.rows,
        "batch": BATCH,
        "block": BLOCK,
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "load_average": os.getloadavg()[0],
        "variants": table,
    }
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
