"""ComiRec's protocol: several interests a user against one, for people whom training never saw.

Run:      python recipes/match/comirec.py FOLDER [--models mind …] [--seeds 0 1 2] [--out OUT]
          FOLDER holds MovieLens-1M, or interactions.tsv (user, item, timestamp; .gz too)
Hardware: 1 CPU core, 2 GB; .2 to 10 minutes of processor time a model and seed
Expected: Recall@50, %, seeds 0 to 2. Films: popularity 14.4, MGNM 14.5, item-CF 20.9, ComiRec-DR 24.0, MIND 24.6,
          YouTubeDNN 26.9, mind+best 27.1, mgnm+best 27.1, ComiRec-SA 28.8, comirec_dr+best 29.8, comirec_sa+best 32.8,
          comirec_sa:1 32.9, SASRec 33.7, GRU4Rec 34.2; books: popularity 4.4, YouTubeDNN 6.9, MGNM 7.6, mgnm+best
          7.8, ComiRec-DR 8.2, MIND 10.6, ComiRec-SA 11.9, comirec_sa+best 12.3, GRU4Rec 12.5, comirec_sa:1 13.0,
          SASRec 14.2, item-CF 15.1. Intervals: docs/matching.md

Users are split 8:1:1. The first 80 % of what a test user took give the interests, the last 20 % are to be found among
the whole catalogue without what was read; events of one day, whose order in the Amazon files is that of the item ids,
are shuffled by a fixed seed. Recall@50 on the validation users chooses the epoch. Models that read one random cut of
each history a pass (YouTubeDNN, MIND, ComiRec, MGNM) and those that learn at every position (GRU4Rec, SASRec) have
passes of their own; softmax over all items, sampled where there are more than LARGEST.

`NAME:K` is a model with K interests, e.g. comirec_sa:1; `NAME+best` is trained by the best of the interests for every
item, as it is served (learn/interests.py), and not as in its paper. A run that is finished (a file in OUT) is kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Int
from torch import Tensor

from funnelrec import Dataset, Schema
from funnelrec.core.batch import Batch
from funnelrec.core.schema import Category
from funnelrec.data.batches import Batches
from funnelrec.data.examples import NextItem, Queries
from funnelrec.data.ingest import read_table
from funnelrec.data.sources import movielens
from funnelrec.data.split import HeldOutUsers
from funnelrec.data.tables import Tables
from funnelrec.evaluate.protocol import MatchResult
from funnelrec.evaluate.significance import paired_test
from funnelrec.learn.fit import fit
from funnelrec.learn.interests import BestInterestSoftmax
from funnelrec.learn.losses import Loss, SampledSoftmax
from funnelrec.learn.schedules import Cosine
from funnelrec.workflow import Choice, evaluate_matchers, match_loss, validation_metrics

KS = (20, 50)
METRICS = tuple(f"{name}@{k}" for k in KS for name in ("recall", "ndcg", "hit_rate"))
LARGEST = 10_000  #: items; above it the softmax is over a sample
VALIDATIONS = 3
SINGLE = "youtube_dnn"  #: what the models with several interests are compared with
BEST = "+best"
MAX_LEN = {"films": 50, "books": 20}


@dataclass(frozen=True)
class Setting:
    """How one model is trained: `passes` over the people, with VALIDATIONS on the way."""

    config: str = ""
    passes: int = 0
    lr: float = 4e-3
    batch: int = 256
    every: bool = False  #: learns at every position of a history
    temperature: float = 1.0  #: of the softmax; a small one where products start or stay small

    def of(self, name: str, max_len: int) -> Choice:
        """The model; a number behind the name is that of its interests."""
        model, _, interests = name.replace(BEST, "").partition(":")
        choice = Choice.parse(f"{model}({self.config})", "match")
        more = {"num_interests": int(interests)} if interests else {}
        return Choice(choice.name, {**choice.config, **more, **({"max_len": max_len} if self.passes else {})})


SETTINGS: dict[str, dict[str, Setting]] = {
    "films": {
        "popularity": Setting(),
        "item_cf": Setting(),
        "youtube_dnn": Setting("hidden=(128,)", 99, lr=1e-2, temperature=0.1),
        "gru4rec": Setting("dropout=0.2, embedding_dropout=0.2", 60, batch=128, every=True),
        "sasrec": Setting("dropout=0.2", 20, batch=128, every=True),
        "mind": Setting("", 99, lr=1e-2, temperature=0.1),
        "comirec_dr": Setting("", 99, lr=1e-2, temperature=0.1),
        "comirec_sa": Setting("", 99, lr=1e-2, temperature=0.1),
        "mgnm": Setting("num_layers=1", 48, lr=1e-2, temperature=0.1),
    },
    "books": {
        "popularity": Setting(),
        "item_cf": Setting(),
        "youtube_dnn": Setting("hidden=(128,)", 15, lr=1e-2),
        "gru4rec": Setting("dropout=0.2, embedding_dropout=0.2", 40, every=True),
        "sasrec": Setting("dropout=0.2", 9, every=True),
        "mind": Setting("", 15, lr=1e-2, temperature=0.1),
        "comirec_dr": Setting("", 15, lr=1e-2, temperature=0.1),
        "comirec_sa": Setting("", 15, lr=1e-2),
        "mgnm": Setting("num_layers=1", 48, lr=1e-2, temperature=0.1),
    },
}


class Rounds:
    """Examples several times over, so that a validation comes after several passes."""

    def __init__(self, examples: NextItem, rounds: int) -> None:
        self.examples = examples
        self.rounds = rounds

    def __len__(self) -> int:
        return len(self.examples) * self.rounds

    def gather(self, index: Int[Tensor, "B"], generator: torch.Generator | None = None) -> Batch:
        return self.examples.gather(index % len(self.examples), generator)


def tables(folder: Path) -> tuple[str, Tables]:
    """("films" or "books", who took what when), rows in random order: those of one time stay so."""
    file = next((f for f in (folder / "interactions.tsv", folder / "interactions.tsv.gz") if f.exists()), None)
    if file is None:
        loaded = movielens.load(folder)
        events, items = loaded.events.select("user", "item", "time"), loaded.items
        assert items is not None
        catalogue = items.select("item", "genres")
    else:
        events = read_table(file)[0].rename({"timestamp": "time"})
        catalogue = events.select(pl.col("item").unique().sort())
    schema = Schema(
        user="user",
        item="item",
        time="time",
        items=(Category("genres", many=True),) if file is None else (),
    )
    events = events.sample(fraction=1.0, shuffle=True, seed=0)
    return ("films" if file is None else "books"), Tables(events=events, schema=schema, items=catalogue)


def loss_of(name: str, model: Any, data: Dataset, temperature: float) -> Loss:
    """A softmax over all items, or over a sample where there are more than LARGEST."""
    loss: Any = match_loss(model, data, LARGEST)
    if BEST not in name:
        return replace(loss, temperature=temperature)
    if isinstance(loss, SampledSoftmax):
        return BestInterestSoftmax(loss.num_negatives, loss.sampler, temperature)
    return BestInterestSoftmax(temperature=temperature)


def run(data: Dataset, name: str, setting: Setting, max_len: int, seed: int) -> tuple[Any, dict[str, Any]]:
    """Train one model. Returns it and what the run came to."""
    model = setting.of(name, max_len).build(data.spec, seed=seed)
    began = time.process_time()
    if not setting.passes:
        return model.fit(*data.taken("train")), {"minutes": round((time.process_time() - began) / 60, 2)}
    rounds = max(1, setting.passes // VALIDATIONS)
    examples = Rounds(NextItem(data, "train", max_len=max_len, mode="all" if setting.every else "cut"), rounds)
    batches = Batches(examples, setting.batch, shuffle=True, seed=seed)
    epochs = setting.passes // rounds
    steps = len(batches) * epochs
    result = fit(
        model,
        batches,
        loss_of(name, model, data, setting.temperature),
        epochs=epochs,
        lr=setting.lr,
        clip_norm=5.0,
        schedule=Cosine(steps, warmup=steps // 20, floor=0.02),
        validate=lambda: validation_metrics(model, data, max_len),
        metric="recall@50",
        seed=seed,
        bf16=True,
        progress=False,
    )
    return model, {
        "valid_recall@50": [round(epoch["recall@50"], 4) for epoch in result.history],
        "minutes": round((time.process_time() - began) / 60, 2),
    }


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation over the seeds, in per cent."""
    more = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.2f}{more}"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a line a model, per cent, mean ± standard deviation over its seeds."""
    lines = [f"| model | {' | '.join(METRICS)} | seeds | minutes |", "|---|" + "---:|" * (len(METRICS) + 2)]
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        cells = " | ".join(spread([row[metric] for row in own]) for metric in METRICS)
        lines.append(f"| {name} | {cells} | {len(own)} | {statistics.mean(r['minutes'] for r in own):.1f} |")
    return "\n".join(lines)


def against(users: Mapping[str, Mapping[str, np.ndarray]], base: str, metric: str) -> list[str]:
    """Each model minus `base`, on the same people; a person's figure is its mean over the model's seeds."""
    if base not in users:
        return []
    lines = []
    for name, measured in users.items():
        if name != base:
            test = paired_test(measured[metric], users[base][metric])
            low, high = 100 * test.interval.low, 100 * test.interval.high
            lines.append(f"{metric}: {name} − {base}: {100 * test.difference:+.2f} [{low:+.2f}, {high:+.2f}]")
    return lines


def genre_entropy(data: Dataset, max_len: int) -> np.ndarray:
    """How spread the genres of each test person's newest items are, in nats; the order is that of the figures."""
    queries = Queries(data, "test", max_len=max_len)
    genres = torch.from_numpy(data.item_attribute("genres"))[queries.gather(torch.arange(len(queries))).history]
    counts = torch.zeros(len(queries), int(genres.max()) + 1).scatter_add_(
        1, genres.flatten(1), (genres > 0).flatten(1).float()
    )
    share = counts / counts.sum(1, keepdim=True)
    return torch.special.entr(share).sum(1).numpy()


def by_entropy(users: Mapping[str, Mapping[str, np.ndarray]], entropy: np.ndarray, metric: str) -> list[str]:
    """What several interests add to one of the same model, for people of narrow, middling and wide taste."""
    part = np.searchsorted(np.quantile(entropy, [1 / 3, 2 / 3]), entropy)
    lines = []
    for single in (name for name in users if name.endswith(":1") and name[:-2] in users):
        for number, taste in enumerate(("narrow", "middling", "wide")):
            own = part == number
            test = paired_test(users[single[:-2]][metric][own], users[single][metric][own])
            low, high = 100 * test.interval.low, 100 * test.interval.high
            lines.append(
                f"{metric}, {taste} taste ({own.sum()} people): {single[:-2]} − {single}: "
                f"{100 * test.difference:+.2f} [{low:+.2f}, {high:+.2f}]"
            )
    return lines


def kept(result: MatchResult) -> dict[str, np.ndarray]:
    """Per-person figures, as they are stored."""
    return {name: result.metrics[name] for name in METRICS} | {"length": result.history_length}


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, train what is missing, write the tables to standard output."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", nargs="+", default=list(SETTINGS["films"]))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--lr", type=float, help="another one than the setting's; so with the next two")
    parser.add_argument("--passes", type=int)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--out", type=Path, default=Path("comirec_runs"), help="a file a run, and results.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    kind, read = tables(options.folder)
    out = options.out / kind
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        data = Dataset.build(read, Path(folder) / "data", split=HeldOutUsers())
        spread_of_taste = genre_entropy(data, MAX_LEN[kind]) if kind == "films" else np.empty(0)
        for seed, name in product(options.seeds, options.models):
            file = out / f"{name.replace(':', '-')}.{seed}.json"
            setting = SETTINGS[kind][name.replace(BEST, "").partition(":")[0]]
            if setting.passes:
                given = {k: getattr(options, k) for k in ("lr", "passes", "temperature")}
                setting = replace(setting, **{k: v for k, v in given.items() if v is not None})
            if file.exists() or (seed > 0 and not setting.passes):
                continue
            model, row = run(data, name, setting, MAX_LEN[kind], seed)
            result = evaluate_matchers({name: model}, data, ks=KS)[name]
            np.savez_compressed(file.with_suffix(".npz"), **kept(result))
            row = {"model": name, "seed": seed, **{m: round(result.means[m], 5) for m in METRICS}, **row}
            file.write_text(json.dumps(row) + "\n", encoding="utf-8")
            sys.stdout.write(f"{row}\n")
            sys.stdout.flush()
    rows = [json.loads(f.read_text(encoding="utf-8")) for f in sorted(out.glob("*.json")) if f.stem != "results"]
    users: dict[str, dict[str, np.ndarray]] = {}
    for name in dict.fromkeys(row["model"] for row in rows):
        runs = [np.load(f) for f in sorted(out.glob(f"{name.replace(':', '-')}.*.npz"))]
        users[name] = {metric: np.mean([r[metric] for r in runs], axis=0) for metric in METRICS}
    tests = [line for metric in ("recall@50", "hit_rate@50") for line in against(users, SINGLE, metric)]
    for base in (name for name in users if name.endswith(":1")):
        own = (base, base[:-2], base[:-2] + BEST)
        tests += against({n: users[n] for n in own if n in users}, base, "recall@50")
    if kind == "films":
        tests += by_entropy(users, spread_of_taste, "recall@50")
    facts = {
        "people": len(next(iter(users.values()))["recall@50"]),
        "command": "python recipes/match/comirec.py FOLDER",
    }
    text = json.dumps({**facts, "rows": rows, "paired": tests}, indent=1)
    (out / "results.json").write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(table(rows) + "\n\n" + "\n".join(tests) + "\n")


if __name__ == "__main__":
    main()
