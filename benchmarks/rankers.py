"""Training speed of the rankers beside DeepCTR-Torch: the same arrays, the same network, alternating in one run.

    python benchmarks/rankers.py --peer PYTHON [--threads 2] [--output benchmarks/results/rankers.json]

PYTHON is the interpreter of an environment with torch, deepctr-torch and the requests that it imports; without it only
our side runs. 39 categorical fields of geometric sizes, 1 M rows in all (AUC after one epoch of 327,680 rows on 65,536
others) or 10 M (speed alone, 24 steps: the first ones touch memory for the first time), width 16, batch 4,096, MLP
400-400-400, Adam at 1e-3. Labels come from a planted model of single values, pairs and, for DIN and DIEN, of what the
history of 50 items has to do with the item.

Ours is `fit` itself, batches included, in float32 and with bf16=True. The peer runs in a tight loop of its own model
and dense Adam, without its penalties, which is faster than its `fit`. Each side is a process of its own; they take
turns, a round of steps each, while the others wait, so that a busy machine slows all of them; a round is long enough
that what the others left in the caches does not count. Read the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FIELDS, WIDTH, BATCH, LENGTH, HIDDEN = 39, 16, 4096, 50, (400, 400, 400)
TEST = 65_536
PLANS = {1_000_000: (80, 20), 10_000_000: (24, 8)}  #: rows of vocabulary -> steps in all, steps of a round
MODELS = ("deepfm", "dcn", "xdeepfm", "autoint", "fibinet", "din", "dien")
READS_HISTORY = ("din", "dien")


def sizes_of(rows: int) -> list[int]:
    """Values of 39 fields, growing geometrically from 4, that add up to about `rows`."""
    low, high = 1.0, 4.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(4 * middle**k for k in range(FIELDS)) < rows else (low, middle)
    return [int(4 * low**k) for k in range(FIELDS)]


def arrays(rows: int, examples: int, folder: Path) -> None:
    """Write values [n, 39] from 1 on, history [n, 50] of the largest field (0 = nothing) and labels for both kinds."""
    rng = np.random.default_rng(0)
    sizes = sizes_of(rows)

    def draw(size: int, shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
        return np.minimum(np.exp(rng.random(shape) * np.log(size + 1)).astype(np.int64), size)  # log-uniform, from 1

    values = np.stack([draw(size, (examples,)) for size in sizes], axis=1)
    history = draw(sizes[-1], (examples, LENGTH))
    history[np.arange(LENGTH) >= rng.integers(0, LENGTH + 1, examples)[:, None]] = 0
    logit = np.full(examples, -1.0)
    latent = []
    for k, size in enumerate(sizes):
        logit += 0.25 * rng.standard_normal(size + 1)[values[:, k]]
        latent.append(rng.standard_normal((size + 1, 2))[values[:, k]])
    for left in range(0, FIELDS - 1, 2):
        logit += 0.3 * (latent[left] * latent[left + 1]).sum(1)
    topic = rng.integers(0, 20, sizes[-1] + 1)
    met = (topic[history] == topic[values[:, -1:]]) & (history > 0)
    for name, value in (("plain", logit), ("history", logit + 0.5 * met.sum(1) - 0.5)):
        np.save(folder / f"label_{name}.npy", (rng.random(examples) < 1 / (1 + np.exp(-value))).astype(np.float32))
    np.save(folder / "values.npy", values.astype(np.int32))
    np.save(folder / "history.npy", history.astype(np.int32))


class Turns:
    """One side's part of the protocol: wait for "go", work, answer with JSON. What else is printed goes elsewhere."""

    def __init__(self) -> None:
        self.began = 0.0
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def wait(self) -> None:
        if sys.stdin.readline().strip() != "go":
            raise SystemExit(0)
        self.began = time.perf_counter()

    def report(self, **what: float) -> None:
        self.answers.write(json.dumps({"seconds": time.perf_counter() - self.began, **what}) + "\n")
        self.answers.flush()


def auc(labels: npt.NDArray[np.float32], scores: npt.NDArray[np.float32]) -> float:
    """Area under the ROC curve; scores hardly ever tie here."""
    rank = np.empty(len(scores))
    rank[np.argsort(scores, kind="stable")] = np.arange(1, len(scores) + 1)
    positives = labels.sum()
    return float((rank[labels == 1].sum() - positives * (positives + 1) / 2) / positives / (len(labels) - positives))


# --------------------------------------------------------------------------------------------------------------- ours
def ours(model: str, folder: Path, rows: int, bf16: bool) -> None:
    """Train by `fit`; the batches stop at the end of each round."""
    turns = Turns()
    from collections.abc import Iterator

    import torch
    from torch import Tensor

    from funnelrec import zoo
    from funnelrec.core.batch import Batch
    from funnelrec.core.schema import CategorySpec, Spec
    from funnelrec.data.batches import Batches
    from funnelrec.learn.fit import fit
    from funnelrec.learn.losses import BCE

    reads = model in READS_HISTORY
    sizes, (steps, turn) = sizes_of(rows), PLANS[rows]
    order = [*range(FIELDS - 1), FIELDS - 1]
    offsets = np.cumsum([1] + [s + 1 for s in sizes])[:-1]  # a field owns its unknown row and its values
    side = ["context"] * FIELDS
    if reads:  # sides stand in the order user, item, context: the largest field is the item and comes first
        order, side[0] = [FIELDS - 1, *range(FIELDS - 1)], "item"
        offsets = np.cumsum([1] + [sizes[k] + 1 for k in order])[:-1]
    fields = tuple(
        CategorySpec(f"f{k}", side[n], sizes[k] + 2, int(offsets[n]), n, n + 1)  # type: ignore[arg-type]
        for n, k in enumerate(order)
    )
    spec = Spec(categories=fields, num_items=sizes[-1] + 2 if reads else 0)
    values = torch.from_numpy(np.load(folder / "values.npy"))[:, order]
    ids = values + torch.from_numpy(offsets).int()
    history = torch.from_numpy(np.load(folder / "history.npy"))
    label = torch.from_numpy(np.load(folder / f"label_{'history' if reads else 'plain'}.npy"))

    class Rows:
        """Examples by whole-tensor gathers, as Impressions makes them."""

        def __init__(self, start: int, stop: int) -> None:
            self.start, self.stop = start, stop

        def __len__(self) -> int:
            return self.stop - self.start

        def gather(self, index: Tensor, generator: torch.Generator | None) -> Batch:
            index = index + self.start
            more = {}
            if reads:
                read = history.index_select(0, index).flip(1)  # the newest stands last
                more = {
                    "history_ids": torch.where(read > 0, read + int(offsets[0]), 0).unsqueeze(2),
                    "history": torch.where(read > 0, read + 1, 0).long(),
                    "mask": read > 0,
                    "history_times": torch.zeros(read.shape, dtype=torch.int64),
                }
            numbers = torch.zeros(len(index), 0)
            return Batch(ids=ids.index_select(0, index), numbers=numbers, label=label.index_select(0, index), **more)

    class Stopping(Batches):
        """Hands over after every round."""

        def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
            turns.wait()
            for position, batch in enumerate(super().epoch(number, start)):
                if position and position % turn == 0:
                    turns.report()
                    turns.wait()
                yield batch

    arguments: dict[str, Any] = {"embedding_dim": WIDTH, "hidden": HIDDEN, "dropout": 0.0}
    arguments |= {
        "xdeepfm": {"feature_maps": (256, 128), "split_half": True},
        "autoint": {"head_dim": WIDTH // 2, "first_order": True},  # as the peer has it
        "din": {"attention_hidden": (64, 16), "activation": "relu"},
        "dien": {"activation": "relu", "penalty": 0.0},  # the peer has no auxiliary loss without its own negatives
    }.get(model, {})
    torch.manual_seed(0)
    network = zoo.load(f"rank/{model}")(spec, **arguments)
    train = Stopping(Rows(0, steps * BATCH), BATCH, shuffle=True)
    fit(network, train, BCE(), epochs=1, lr=1e-3, bf16=bf16, progress=False)
    turns.report()
    turns.wait()
    test = Rows(steps * BATCH, len(ids))
    with torch.no_grad():
        scores = [network(b).numpy() for b in Batches(test, 8192).epoch(0)]
    turns.report(auc=auc(label[steps * BATCH :].numpy(), np.concatenate(scores)))


# --------------------------------------------------------------------------------------------------------------- peer
def peer(model: str, folder: Path, rows: int) -> None:
    """Train DeepCTR-Torch's model of the same name in a tight loop. Imports nothing of ours."""
    turns = Turns()
    import torch
    import torch.nn.functional as F
    from deepctr_torch import models
    from deepctr_torch.inputs import SparseFeat, VarLenSparseFeat

    reads = model in READS_HISTORY
    sizes, (steps, turn) = sizes_of(rows), PLANS[rows]
    columns = [SparseFeat(f"f{k}", size + 1, WIDTH) for k, size in enumerate(sizes)]
    item = f"f{FIELDS - 1}"
    parts = [torch.from_numpy(np.load(folder / "values.npy"))]
    if reads:
        past = SparseFeat(f"hist_{item}", sizes[-1] + 1, WIDTH, embedding_name=item)
        columns.append(VarLenSparseFeat(past, LENGTH, length_name="seq_length"))
        history = torch.from_numpy(np.load(folder / "history.npy"))
        parts += [history, (history > 0).sum(1, keepdim=True).clamp(min=1)]
    x = torch.cat(parts, dim=1).float()
    label = torch.from_numpy(np.load(folder / f"label_{'history' if reads else 'plain'}.npy"))
    common = {"dnn_hidden_units": HIDDEN, "dnn_dropout": 0.0, "l2_reg_embedding": 0.0, "device": "cpu", "seed": 0}
    if model == "din":
        network = models.DIN(columns, [item], att_hidden_size=(64, 16), att_activation="relu", **common)
    elif model == "dien":
        network = models.DIEN(columns, [item], gru_type="AUGRU", use_negsampling=False, **common)
    else:
        kind = {"deepfm": "DeepFM", "dcn": "DCN", "xdeepfm": "xDeepFM", "autoint": "AutoInt", "fibinet": "FiBiNET"}
        more = {"dcn": {"cross_num": 3}, "xdeepfm": {"cin_layer_size": (256, 128)}}.get(model, {})
        network = getattr(models, kind[model])(columns, columns, **common, **more)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    order = torch.randperm(steps * BATCH, generator=torch.Generator().manual_seed(0))
    network.train()
    for position, index in enumerate(order.split(BATCH)):
        if position % turn == 0:
            if position:
                turns.report()
            turns.wait()
        optimizer.zero_grad()
        found = network(x.index_select(0, index)).squeeze(1)
        F.binary_cross_entropy(found, label.index_select(0, index)).backward()
        optimizer.step()
    turns.report()
    turns.wait()
    network.eval()
    with torch.no_grad():
        scores = [network(part).squeeze(1).numpy() for part in x[steps * BATCH :].split(8192)]
    turns.report(auc=auc(label[steps * BATCH :].numpy(), np.concatenate(scores)))


# ---------------------------------------------------------------------------------------------------------- the match
def match(model: str, rows: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Let all sides take turns on one model; rows/s of each side and its AUC."""
    steps, turn = PLANS[rows]
    commands = {name: [sys.executable, __file__, "--side", name] for name in ("float32", "bf16")}
    if options.peer:
        commands["peer"] = [options.peer, __file__, "--side", "peer"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    sides = {
        name: subprocess.Popen(
            [*command, model, str(folder), str(rows)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for name, command in commands.items()
    }
    rounds: dict[str, list[float]] = {name: [] for name in sides}
    areas: dict[str, float] = {}
    for _ in range(steps // turn + 1):
        for name, process in sides.items():
            line = go(process)
            if not line:
                raise RuntimeError(f"{model}: the side '{name}' ended early; run it alone to see why")
            answer = json.loads(line)
            if "auc" in answer:
                areas[name] = answer["auc"]
            else:
                rounds[name].append(answer["seconds"])
    for process in sides.values():
        process.wait(60)
    # the first round holds the warm-up of each side
    speed = {name: turn * BATCH / statistics.median(times[1:] or times) for name, times in rounds.items()}
    result: dict[str, Any] = {"model": model, "rows": rows, "rows_per_second": speed, "auc": areas}
    if "peer" in speed:
        result["ratio"] = {name: speed[name] / speed["peer"] for name in ("float32", "bf16")}
    return result


def go(process: subprocess.Popen[str]) -> str:
    """Let one side work; its answer, nothing if it has ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write("go\n")
        process.stdin.flush()
    except BrokenPipeError:
        return ""
    return process.stdout.readline()


def main() -> None:
    """Run every model at 1 M and at 10 M rows, write JSON."""
    if len(sys.argv) > 2 and sys.argv[1] == "--side":
        side, model, folder, size = sys.argv[2:]
        if side == "peer":
            peer(model, Path(folder), int(size))
        else:
            ours(model, Path(folder), int(size), bf16=side == "bf16")
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--peer", help="python of an environment with deepctr-torch")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rows", nargs="+", type=int, choices=PLANS, default=list(PLANS))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    import torch

    processor = torch.cpu.get_capabilities().get("cpu_name", "")
    results = []
    for rows in options.rows:
        with tempfile.TemporaryDirectory() as folder:
            arrays(rows, PLANS[rows][0] * BATCH + TEST, Path(folder))
            for model in options.models:
                result = match(model, rows, options, Path(folder))
                results.append(result)
                shown = ", ".join(f"{n} {v:,.0f} rows/s" for n, v in result["rows_per_second"].items())
                ratio = ", ".join(f"{n} {v:.2f} x" for n, v in result.get("ratio", {}).items())
                areas = ", ".join(f"{n} {v:.4f}" for n, v in result["auc"].items())
                sys.stdout.write(f"{model} at {rows:,}: {shown}; {ratio}; AUC {areas}\n")
                sys.stdout.flush()
                if options.output:
                    facts = {"command": " ".join(["python", *sys.argv]), "processor": processor}
                    text = {**facts, "cores": os.cpu_count(), "threads": options.threads, "results": results}
                    options.output.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
