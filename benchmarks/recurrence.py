"""DIEN's recurrence (AUGRU) against a loop over torch's GRUCell that computes the same, forward and backward.

    OMP_WAIT_POLICY=passive python benchmarks/recurrence.py [--threads 2] [--output benchmarks/results/recurrence.json]

AUGRU is h + a (GRU(x, h) - h), so a loop over `nn.GRUCell` with the same weights gives the same states; that is checked
first. Shapes: the authors' (batch 128, 100 steps, width 36), and batches of 512 and 4,096 over 50 steps; each with
histories as long as the batch is wide, and with padded ones of every length from 0 on, where the loop computes padding
too. The two alternate in one process; read the ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from funnelrec.core.nn.recurrent import GRU

CASES = ((128, 100, 36), (512, 50, 16), (4096, 50, 16), (4096, 50, 48))  #: batch, steps, width; the authors' first


def as_cell(gru: GRU, dim: int) -> nn.GRUCell:
    """torch's cell with the same weights; its z keeps the state where our u replaces it, so that gate changes sign."""
    cell = nn.GRUCell(dim, dim)
    with torch.no_grad():
        sign = torch.ones(3 * dim, 1)
        sign[dim : 2 * dim] = -1
        cell.weight_ih.copy_(gru.input.weight * sign)
        cell.weight_hh.copy_(gru.recurrent * sign)
        cell.bias_ih.zero_()
        cell.bias_hh.zero_()
    return cell


def loop(cell: nn.GRUCell, x: Tensor, attention: Tensor) -> Tensor:
    """All states [B, L, D], one cell a step."""
    state, states = x.new_zeros(len(x), cell.hidden_size), []
    for t in range(x.shape[1]):
        state = state + attention[:, t : t + 1] * (cell(x[:, t], state) - state)
        states.append(state)
    return torch.stack(states, dim=1)


def seconds(work: Callable[[], Tensor]) -> float:
    started = time.perf_counter()
    work().sum().backward()  # type: ignore[no-untyped-call]
    return time.perf_counter() - started


def main() -> None:
    """Time every case, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    results = []
    for (size, steps, dim), padded in product(CASES, (False, True)):
        gru = GRU(dim, dim, kind="augru")
        cell = as_cell(gru, dim)
        x, attention = torch.randn(size, steps, dim, requires_grad=True), torch.rand(size, steps)
        lengths = torch.randint(0, steps + 1, (size, 1)) if padded else torch.full((size, 1), steps)
        mask = torch.arange(steps) >= steps - lengths
        attention = attention * mask  # so that the loop keeps its state at padding
        torch.testing.assert_close(gru(x, mask, attention), loop(cell, x, attention), rtol=1e-4, atol=1e-5)
        sides = {
            "ours": lambda g=gru, x=x, m=mask, a=attention: g(x, m, a),
            "loop": lambda c=cell, x=x, a=attention: loop(c, x, a),
        }
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(options.rounds + 1):
            for name, work in sides.items():
                times[name].append(seconds(work))
        median = {name: statistics.median(own[1:]) for name, own in times.items()}  # the first round warms up
        ratio = median["loop"] / median["ours"]
        results.append(
            {
                "batch": size,
                "steps": steps,
                "width": dim,
                "padded": padded,
                "milliseconds": {n: 1e3 * v for n, v in median.items()},
                "ratio": ratio,
            }
        )
        kind = "of every length" if padded else "full"
        shape = f"batch {size}, {steps} steps, width {dim}"
        sys.stdout.write(f"{shape}, histories {kind}: {ratio:.2f} x a loop over GRUCell\n")
        sys.stdout.flush()
    if options.output:
        facts = {"command": " ".join(["python", *sys.argv]), "cores": os.cpu_count(), "threads": options.threads}
        options.output.write_text(json.dumps({**facts, "results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
