"""Rankers that read histories, each against the same network with mean pooling, on real logs and made-up worlds.

Run:      python recipes/rank/sequence.py world|narrow|films|amazon [FOLDER] [--models NAME …] [--ablations] [--seed 0]
Hardware: 1 CPU core, 1 GB; all rows of world half an hour, the four main rows of the others 10 to 20 minutes
Expected: test AUC above mean pooling with a 95 % interval by users, seed 0 (docs/ranking.md has the tables)
          amazon  DIN +.0218 ± .0042, DIEN +.0417 ± .0044, DSIN +.0214 ± .0045
          films   DIN +.0030 ± .0013, DIEN +.0054 ± .0014, DSIN +.0253 ± .0025
          world   DIN +.0003 ± .0035, DIEN +.0065 ± .0047, DSIN +.0396 ± .0071
          narrow  DIN +.0062 ± .0047, DIEN +.0097 ± .0058, DSIN +.0505 ± .0078

world:  sessions of one intent, three interests a user, vectors of width 8: their mean still tells all three apart, so
        DIN adds nothing, while what reads order (DIEN) and sessions (DSIN) does.
narrow: four interests in vectors of width 4: a mean no longer holds them, and DIN is better than it.
films:  MovieLens-1M, ratings from 4 up. amazon: reviews with category and brand. Both: one negative a positive, drawn
        uniformly.
Histories end strictly before each event; the split is by global time; all rows of a table are trained alike.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import polars as pl
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from funnelrec import Dataset, zoo
from funnelrec.core.nn.pooling import masked_mean
from funnelrec.core.schema import Category, Schema
from funnelrec.data.batches import Batches
from funnelrec.data.examples import Impressions
from funnelrec.data.sources import movielens, simulate
from funnelrec.data.split import PARTS, Part
from funnelrec.data.tables import Tables
from funnelrec.evaluate.protocol import RankResult, evaluate_ranker
from funnelrec.evaluate.significance import paired_auc_difference
from funnelrec.learn.fit import fit
from funnelrec.learn.losses import BCE
from funnelrec.learn.regularise import RowL2

BATCH = 1024
HEAD = ("network", "test AUC", "GAUC", "- mean pooling (95 %)", "- DIN (95 %)", "valid AUC", "epoch", "minutes")


class MeanPooling(nn.Module):
    """In the place of DIN's attention: every item of the history counts the same, whatever the candidate."""

    def forward(
        self, query: Float[Tensor, "B D"], keys: Float[Tensor, "B L D"], mask: Bool[Tensor, "B L"]
    ) -> Float[Tensor, "B D"]:
        return masked_mean(keys, mask)


@dataclass(frozen=True)
class Source:
    """A data set, how it is asked, and how all networks are trained on it.

    `negatives` 0: the log says itself what was passed over. `newest`: training events, from the end of the part.
    `penalty`: strength of the mini-batch-aware regularisation.
    """

    load: Callable[[Path | None], Tables]
    max_len: int
    embedding_dim: int = 16
    negatives: int = 0
    newest: int | None = None
    penalty: float = 1.0
    epochs: int = 10
    sessions: Mapping[str, int] = field(default_factory=dict)


def world(path: Path | None) -> Tables:
    """Everybody has three interests, and each session is about one of them, mostly that of the session before."""
    return simulate.load(users=3000, items=1000, interests=3, session_intent=1.0).tables


def narrow(path: Path | None) -> Tables:
    """The same with four interests, which have to share a vector of four numbers."""
    return simulate.load(users=3000, items=1000, interests=4, session_intent=1.0).tables


def films(path: Path | None) -> Tables:
    """MovieLens-1M: films rated 4 or 5; other ratings are left out."""
    tables = movielens.load(path)
    schema = replace(tables.schema, label=None, click=None)
    return replace(tables, events=tables.events.filter(pl.col("rating") >= 4), schema=schema)


def amazon(path: Path | None) -> Tables:
    """Reviews with the categories and the brand of each product; times are days, so a session is a day."""
    if path is None:
        raise ValueError("amazon needs the folder of user_item.dat.gz, item_category.dat and item_brand.dat")

    def read(name: str, separator: str, *columns: str) -> pl.DataFrame:
        return pl.read_csv(path / name, separator=separator, has_header=False, new_columns=list(columns))

    events = read("user_item.dat.gz", "\t", "user", "item", "rating", "time").drop("rating")
    brand = read("item_brand.dat", ",", "item", "brand").unique("item", keep="first")
    category = read("item_category.dat", ",", "item", "category").group_by("item").agg(pl.col("category").sort())
    items = category.join(brand, on="item", how="full", coalesce=True).sort("item")
    schema = Schema(user="user", item="item", time="time", items=(Category("category", many=True), Category("brand")))
    return Tables(events, schema, items=items, name="amazon")


SOURCES = {
    "world": Source(world, max_len=20, embedding_dim=8, epochs=8, sessions={"num_sessions": 6, "session_length": 4}),
    "narrow": Source(narrow, max_len=20, embedding_dim=4, epochs=8, sessions={"num_sessions": 6, "session_length": 4}),
    "films": Source(films, max_len=50, negatives=1, newest=200_000, epochs=8),
    "amazon": Source(
        amazon,
        max_len=20,
        negatives=1,
        newest=100_000,
        penalty=2.0,
        epochs=14,
        sessions={"num_sessions": 10, "session_length": 4},
    ),
}
DIN = {"softmax": True, "attention_hidden": (36,)}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mean pooling": ("rank/din", {}),
    "DIN": ("rank/din", DIN),
    "DIEN": ("rank/dien", {}),
    "DSIN": ("rank/dsin", {"dropout": 0.1}),
    "DIN, weights that need not sum to 1": ("rank/din", DIN | {"softmax": False}),
    "DIN without Dice": ("rank/din", DIN | {"activation": "prelu"}),
    "DIN without regularisation": ("rank/din", DIN),
    "DIEN without auxiliary loss": ("rank/dien", {"penalty": 0.0}),
    "DIEN, AGRU for AUGRU": ("rank/dien", {"evolution": "agru"}),
    "DIEN, AIGRU for AUGRU": ("rank/dien", {"evolution": "aigru"}),
    "DSIN without sessions": ("rank/dsin", {"dropout": 0.1, "num_sessions": 1, "session_gap": 10**10}),
}
MAIN = list(MODELS)[:4]


def build(name: str, data: Dataset, source: Source, seed: int) -> nn.Module:
    """The network of a row of the table."""
    kind, arguments = MODELS[name]
    common = {"embedding_dim": source.embedding_dim, "hidden": (80, 40), "dropout": 0.3}
    if kind == "rank/dsin":
        common |= source.sessions
    if name == "DSIN without sessions":
        common["session_length"] = source.max_len
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: nn.Module = zoo.load(kind)(data.spec, **(common | arguments))
        if name == "mean pooling":
            model.attention = MeanPooling()
    return model


def batches(data: Dataset, part: Part, source: Source, seed: int) -> Batches:
    """Rows of a part with their histories; each positive is followed by its negatives, drawn uniformly."""
    examples = Impressions(
        data,
        part,
        max_len=source.max_len,
        negatives=source.negatives,
        newest={"train": source.newest, "valid": 20_000, "test": None}[part],
    )
    size = (BATCH if part == "train" else 4096) // (1 + source.negatives)
    return Batches(examples, size, shuffle=part == "train", seed=seed)


@dataclass(frozen=True)
class Outcome:
    """What one network came to."""

    test: RankResult
    epoch: int
    valid: float
    minutes: float


def run(name: str, data: Dataset, source: Source, seed: int) -> Outcome:
    """Train with early stopping on the validation part, then score the test rows once."""
    model = build(name, data, source, seed)
    train, valid, test = (batches(data, part, source, seed) for part in PARTS)
    held = RowL2.mini_batch_aware(source.penalty, train, data.spec.table_rows)
    result = fit(
        model,
        train,
        BCE(),
        epochs=source.epochs,
        lr=2e-3,
        table_l2=0.0 if name == "DIN without regularisation" else held,
        validate=lambda: evaluate_ranker(model, valid).means,
        metric="auc",
        patience=2,
        seed=seed,
        progress=False,
    )
    assert result.best_epoch is not None and result.best_metric is not None
    return Outcome(evaluate_ranker(model, test), result.best_epoch, result.best_metric, result.seconds / 60)


def line(name: str, outcome: Outcome, others: Mapping[str, Outcome]) -> str:
    """A row: test AUC, GAUC, and how far the AUC is from that of mean pooling and of DIN, with 95 % intervals."""
    test = outcome.test
    cells = [f"{name:<36}", f"{test.means['auc']:.4f}", f"{test.means['gauc']:.4f}"]
    for other in ("mean pooling", "DIN"):
        if other in others and other != name:
            pair = paired_auc_difference(test.labels, test.logits, others[other].test.logits, test.user)
            cells.append(f"{pair.difference:+.4f} ({pair.interval.low:+.4f} to {pair.interval.high:+.4f})")
        else:
            cells.append("")
    cells += [f"{outcome.valid:.4f}", f"{outcome.epoch}", f"{outcome.minutes:.1f}"]
    return f"| {' | '.join(cells)} |\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, train, write the table to standard output."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", choices=SOURCES)
    parser.add_argument("folder", type=Path, nargs="?", help="of the files of films (ml-1m) or amazon")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MAIN, metavar="NAME")
    parser.add_argument("--ablations", action="store_true", help="all rows of the table")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    source, outcomes = SOURCES[options.source], {}
    with tempfile.TemporaryDirectory() as folder:
        data = Dataset.build(source.load(options.folder), Path(folder) / "data")
        sys.stdout.write(f"{data.counts}\n\n| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}\n")
        for name in MODELS if options.ablations else options.models:
            outcomes[name] = run(name, data, source, options.seed)
            sys.stdout.write(line(name, outcomes[name], outcomes))
            sys.stdout.flush()


if __name__ == "__main__":
    main()
