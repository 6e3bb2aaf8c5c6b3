"""Indexes side by side: build time, size, recall and users a second, for K vectors a user and the best 100 of N items.

    python benchmarks/index.py [--items 1000000] [--only exact ivf …] [--target .96] [-o benchmarks/results/index.json]

The items are drawn as trained ones lie: 40 topics of 50 groups each; an item is 0.6 · its topic + 0.6 · its group +
0.5 · noise (each N(0, 1) a number), times a length exp(0.3 · N(0, 1)); groups have sizes ∝ 1/rank^0.7. A user's K
interests are the mean of 5 items of one group each, plus 0.2 · noise. Uniform noise would have no neighbourhoods.

Each index tunes itself on 256 users to the recall `--target` and then answers 256 others, with 1 thread. Recall is the
share of the exact 100 that come back. All indexes are built first; then they take turns, and users/s is the median of
the rounds, × exact the median of the ratios within a round. "bare" is what exact search cannot do without: product,
maximum over the K vectors, topk, block by block. Figures are added to those in the output file, so that indexes may be
measured one by one; those of "exact" and "bare" are of the last run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from funnelrec.match.index.annoy import AnnoyIndex
from funnelrec.match.index.exact import ITEMS_AT_ONCE, ExactIndex
from funnelrec.match.index.faiss import FaissIndex

WIDTH, INTERESTS, USERS, TOP = 64, 4, 256, 100
TOPICS, GROUPS = 40, 50


def world(items: int) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors [items + 2, 64], queries [256, 4, 64] of users and those of others, to tune on."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    groups = 0.6 * normal(TOPICS, 1, WIDTH) + 0.6 * normal(TOPICS, GROUPS, WIDTH)
    groups = groups.flatten(0, 1)[torch.randperm(TOPICS * GROUPS, generator=generator)]
    share = torch.arange(1, len(groups) + 1) ** -0.7
    group = torch.multinomial(share, items + 2, replacement=True, generator=generator)
    vectors = (groups[group] + 0.5 * normal(items + 2, WIDTH)) * (0.3 * normal(items + 2, 1)).exp()
    order = group.argsort(stable=True)
    start = torch.searchsorted(group[order].contiguous(), torch.arange(len(groups)))
    size = torch.bincount(group, minlength=len(groups))
    taken = []
    for _ in range(2):
        own = torch.multinomial(share, USERS * INTERESTS, replacement=True, generator=generator)  # a group an interest
        place = (torch.rand(len(own), 5, generator=generator) * size[own].unsqueeze(1)).long()
        queries = vectors[order[start[own].unsqueeze(1) + place]].mean(1) + 0.2 * normal(len(own), WIDTH)
        taken.append(queries.view(USERS, INTERESTS, WIDTH))
    return vectors, taken[0], taken[1]


def bare(vectors: Tensor, queries: Tensor) -> Tensor:
    """Rows of the best 100 by a product and topk of each block of items, and topk of those."""
    found, values = [], []
    for part in torch.split(queries, 64):
        rows, best = [], []
        for start in range(0, len(vectors), ITEMS_AT_ONCE):
            scores = (part.flatten(0, 1) @ vectors[start : start + ITEMS_AT_ONCE].T).view(len(part), INTERESTS, -1)
            value, column = scores.amax(1).topk(TOP, dim=1)
            rows.append(column + start)
            best.append(value)
        value, place = torch.cat(best, 1).topk(TOP, dim=1)
        found.append(torch.cat(rows, 1).gather(1, place))
        values.append(value)
    return torch.cat(found)


def take_turns(answers: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, dict[str, float]]:
    """Users a second by the wall clock and by processor time, and the ratio of the latter to that of exact search."""
    walls: dict[str, list[float]] = {name: [] for name in answers}
    processor: dict[str, list[float]] = {name: [] for name in answers}
    for _ in range(rounds):
        for name, answer in answers.items():
            wall, cpu = time.perf_counter(), time.process_time()
            answer()
            walls[name].append(time.perf_counter() - wall)
            processor[name].append(time.process_time() - cpu)
    return {
        name: {
            "users_a_second": USERS / statistics.median(walls[name]),
            "users_a_processor_second": USERS / statistics.median(processor[name]),
            "times_exact": statistics.median(
                exact / own for exact, own in zip(processor["exact"], processor[name], strict=True)
            ),
        }
        for name in answers
    }


def make(name: str, vectors: Tensor, others: Tensor, target: float) -> Any:
    """The index of a name."""
    if name == "exact":
        return ExactIndex(vectors)
    if name == "annoy":
        return AnnoyIndex(vectors, queries=others, target=target)
    return FaissIndex(vectors, kind=name, queries=others, target=target)


def main() -> None:
    names = ("bare", "exact", "flat", "ivf", "hnsw", "annoy")
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--target", type=float, default=0.96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    vectors, queries, others = world(options.items)
    valid = torch.ones(queries.shape[:2], dtype=torch.bool)
    figures: dict[str, dict[str, Any]] = {}
    answers: dict[str, Callable[[], Tensor]] = {}
    for name in dict.fromkeys(("exact", *options.only)):
        if name == "bare":
            figures[name], answers[name] = {}, lambda: bare(vectors, queries)
            continue
        wall, cpu = time.perf_counter(), time.process_time()
        index = make(name, vectors, others, options.target)
        figures[name] = {"build_s": time.perf_counter() - wall, "build_processor_s": time.process_time() - cpu}
        answers[name] = lambda index=index: index.search(queries, valid, TOP)[0]  # type: ignore[misc]
        if name != "exact":
            size = len(index._content()) / 2**20
            figures[name] |= {"effort": index.effort, "recall_by_itself": index.recall, "mb": size}
        sys.stdout.write(f"{name} {figures[name]}\n")
        sys.stdout.flush()
    found = {name: answer() for name, answer in answers.items()}  # and a first round that is not timed
    for name, speed in take_turns(answers, options.rounds).items():
        recall = float((found["exact"].unsqueeze(2) == found[name].unsqueeze(1)).any(2).float().mean())
        figures[name] |= {"recall": recall} | speed
        sys.stdout.write(f"{name}: {figures[name]}\n")
    if options.output is not None:
        report = json.loads(options.output.read_text()) if options.output.exists() else {}
        report |= {
            "machine": platform.machine(),
            "torch": torch.__version__,
            "width, vectors a user, top": (64, 4, TOP),
        }
        measured = report.setdefault(f"{options.items} items", {})
        measured["command"] = f"python benchmarks/index.py --items {options.items} --target {options.target}"
        measured.update(figures)
        options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
