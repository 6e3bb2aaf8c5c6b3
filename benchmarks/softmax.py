"""Full softmax over the catalogue: time and peak memory of `linear_cross_entropy` against plain `F.cross_entropy`.

    python benchmarks/softmax.py [--threads 2] [--rounds 5] [-o benchmarks/results/softmax.json]

Both get the same user vectors, items and targets, forward and backward to both gradients. Time: the two alternate
within one process; the median and the least over the rounds, wall clock and processor time. Memory: a fresh process for
each, in which the kernel's high-water mark of resident memory is reset (/proc/self/clear_refs) after the inputs exist
and a tiny warm-up ran; "peak extra" is the mark after one forward and backward, less the resident memory before. It
counts everything, gradients and library buffers included. Linux only.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from funnelrec.learn.losses import linear_cross_entropy

CASES = {"50k items": (6_400, 50_000, 64), "MovieLens-1M": (15_000, 3_418, 64)}


def plain(users: Tensor, items: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(users @ items[2:].T, target - 2)


METHODS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"plain": plain, "chunked": linear_cross_entropy}


def inputs(pairs: int, items: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    users = torch.randn(pairs, width, generator=generator).mul_(0.5).requires_grad_()
    table = torch.randn(items, width, generator=generator).mul_(0.5).requires_grad_()
    return users, table, torch.randint(2, items, (pairs,), generator=generator)


def run(method: str, users: Tensor, items: Tensor, target: Tensor) -> None:
    users.grad = items.grad = None
    METHODS[method](users, items, target).backward()  # type: ignore[no-untyped-call]


def resident(field: str) -> float:
    """VmRSS (now) or VmHWM (high-water mark) of this process, MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def peak_extra(method: str, shape: tuple[int, int, int]) -> float:
    """Peak resident memory beyond what was there before, MB; meant for a fresh process."""
    run(method, *inputs(8, 16, shape[2]))
    tensors = inputs(*shape)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    run(method, *tensors)
    return resident("VmHWM") - before


def seconds(shape: tuple[int, int, int], rounds: int) -> dict[str, dict[str, float]]:
    tensors = inputs(*shape)
    walls: dict[str, list[float]] = {name: [] for name in METHODS}
    cpus: dict[str, list[float]] = {name: [] for name in METHODS}
    for _ in range(rounds + 1):
        for name in METHODS:
            wall, cpu = time.perf_counter(), time.process_time()
            run(name, *tensors)
            walls[name].append(time.perf_counter() - wall)
            cpus[name].append(time.process_time() - cpu)
    return {
        name: {
            "median_s": statistics.median(walls[name][1:]),
            "least_s": min(walls[name][1:]),
            "least_processor_s": min(cpus[name][1:]),
        }
        for name in METHODS
    }


def gradient_error(shape: tuple[int, int, int]) -> float:
    """The larger relative difference (L2) of the two gradients, chunked against plain."""
    tensors = inputs(*shape)
    run("plain", *tensors)
    expected = [tensor.grad.clone() for tensor in tensors[:2] if tensor.grad is not None]
    run("chunked", *tensors)
    found = [tensor.grad for tensor in tensors[:2] if tensor.grad is not None]
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--peak", nargs=2, metavar=("METHOD", "CASE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        sys.stdout.write(str(peak_extra(arguments.peak[0], CASES[arguments.peak[1]])))
        return
    report: dict[str, object] = {
        "command": f"python benchmarks/softmax.py --threads {arguments.threads} --rounds {arguments.rounds}",
        "machine": platform.machine(), "torch": torch.__version__, "threads": arguments.threads,
    }  # fmt: skip
    for case, shape in CASES.items():
        times = seconds(shape, arguments.rounds)
        memory = {}
        for name in METHODS:
            command = [sys.executable, __file__, "--threads", str(arguments.threads), "--peak", name, case]
            memory[name] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        report[case] = {
            "pairs, items, width": shape,
            **{name: {**times[name], "peak_extra_mb": memory[name]} for name in METHODS},
            "times_as_fast": times["plain"]["median_s"] / times["chunked"]["median_s"],
            "times_as_fast_least": times["plain"]["least_s"] / times["chunked"]["least_s"],
            "memory_ratio": memory["plain"] / memory["chunked"],
            "gradient_error": gradient_error(shape),
        }
    text = json.dumps(report, indent=2) + "\n"
    sys.stdout.write(text)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
