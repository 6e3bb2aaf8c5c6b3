"""Float32 products x Wᵀ on CPU: `core.nn.linear` beside torch's own.

    python benchmarks/linear.py [--threads 1] [--rounds 30] [--output benchmarks/results/linear.json]

Both sides take turns; times are the fastest of all rounds, as another process can only add to a time. What is asked for
is more than 1: on a processor that is not Intel's (where `linear` leaves MKL) and nothing is lost elsewhere.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from funnelrec.core.nn.linear import linear

#: what it is, rows, columns of x, rows of W, and whether its gradients are wanted too
SHAPES = (
    ("first layer of a ranker's network, a step", 4096, 624, 400, True),
    ("second layer, a step", 4096, 400, 400, True),
    ("attention of a small transformer, a step", 64 * 50, 64, 64, True),
    ("500 candidates of one request", 500, 144, 400, False),
    ("256 users against 20,000 items", 256, 64, 20_000, False),
    ("4 interests against 100,000 items", 4, 64, 100_000, False),
)


def seconds(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, trained: bool) -> float:
    """Of one product, and of its two gradients."""
    began = time.perf_counter()
    with torch.set_grad_enabled(trained):
        y = product(x, weight)
    if trained:
        y.backward(y.detach())
        x.grad = weight.grad = None
    return time.perf_counter() - began


def main() -> None:
    """Read the command line, measure, write a table and JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    processor = torch.cpu.get_capabilities().get("cpu_name", "")
    lines = [
        f"| {processor}, {options.threads} thread(s) | torch, GFLOP/s | ours, GFLOP/s | ratio |",
        "|---|---:|---:|---:|",
    ]
    results = []
    for name, rows, before, after, trained in SHAPES:
        x, weight = torch.randn(rows, before, requires_grad=trained), torch.randn(after, before, requires_grad=trained)
        times = [
            (seconds(F.linear, x, weight, trained), seconds(linear, x, weight, trained)) for _ in range(options.rounds)
        ]
        theirs, mine = (min(t) for t in zip(*times, strict=True))
        work = 2e-9 * rows * before * after * (3 if trained else 1)
        lines.append(f"| {name} | {work / theirs:.0f} | {work / mine:.0f} | {theirs / mine:.2f} |")
        results.append({"what": name, "torch": work / theirs, "ours": work / mine, "ratio": theirs / mine})
    sys.stdout.write("\n".join(lines) + "\n")
    if options.output:
        command = f"python benchmarks/linear.py --threads {options.threads} --rounds {options.rounds}"
        text = {"command": command, "processor": processor, "torch": torch.__version__, "gflops": results}
        options.output.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
