"""YouTubeDNN ranking: predicted watch seconds against the true expected watch seconds of the simulated world.

Run:      python recipes/rank/watch_time.py [--users 3000] [--seed 0]
Hardware: 1 CPU core, 1 GB; 2.3 minutes on a core shared with other work
Expected: slope of the truth on the prediction 1 ± .1 and rank correlation above .88 for the last two rows, where
          logistic regression has .78. Seed 0, test part:

| watch seconds predicted by                     | slope | sum / true sum | rank correlation |
|------------------------------------------------|-------|----------------|------------------|
| logistic regression: P · mean of a click       | 1.004 | 1.055          | .7766            |
| weighted, in seconds: e^s                      | 0.258 | 3.179          | .8893            |
| weighted, in hours: e^s                        | 0.354 | 2.403          | .8924            |
| weighted, in hours: e^s (1 - P)                | 0.964 | 1.064          | .8922            |
| every impression counts against, in hours: e^s | 1.019 | 1.044          | .8982            |

All rows are one network with one setting, and read the time since, and the number of, earlier clicks and impressions of
the item's category, style and brand. Two things decide whether e^s is watch time:
- Clicks are not rare here (27 %). The odds of the paper's loss are E[T] / (1 - P), so e^s alone is far too high;
  times 1 - P of the plain network it is right, and so it is when every impression counts 1 against a click.
- The unit. Where the odds are far above 1 (seconds) the loss asks that T / e^s be 1 on average: relative errors, and
  e^s overshoots wherever s is uncertain. Far below 1 (hours) it asks that the sum of e^s be the sum of T.
Settings were chosen on the validation part.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funnelrec import Dataset
from funnelrec.core.batch import Batch
from funnelrec.core.schema import Number, Past
from funnelrec.data.batches import Batches
from funnelrec.data.examples import Impressions
from funnelrec.data.sources.simulate import World
from funnelrec.data.tables import Tables
from funnelrec.evaluate.metrics import sigmoid
from funnelrec.learn.fit import fit
from funnelrec.learn.losses import Loss, WeightedLogistic
from funnelrec.learn.schedules import Cosine
from funnelrec.rank.youtube_dnn import YouTubeDNN

MAX_LEN, EPOCHS, TABLE_L2 = 30, 3, 0.01
SECOND, HOUR = 1.0, 3600.0
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PlainLogistic:
    """Clicks alone: every impression weighs 1, whatever the column of weights holds."""

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(batch), batch.label)


@dataclass(frozen=True)
class EveryImpression:
    """A click weighs its watch time T as in WeightedLogistic, and *every* impression counts 1 against it.

    Then the odds are Σ T / N = E[T] whatever the click rate; in the paper's form they are Σ T / (N - k).
    """

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        s = model(batch)
        return (batch.weight * batch.label * F.softplus(-s) + F.softplus(s)).mean()


def with_past(tables: Tables, unit: float) -> Tables:
    """The watch time in `unit` seconds as weight, powers of every number, and what came before of like items."""
    past = [
        Past(f"{what}_{kind}_{of}", of, what, shown=kind == "shown")
        for of in ("category", "style", "brand")
        for what in ("since", "count")
        for kind in ("watched", "shown")
    ]
    items = tuple(Number(f.name, "powers") if isinstance(f, Number) else f for f in tables.schema.items)
    schema = replace(tables.schema, weight="watched", items=items, past=tuple(past))
    return replace(tables, events=tables.events.with_columns(watched=pl.col("watch_seconds") / unit), schema=schema)


def scores(model: nn.Module, batches: Batches) -> Floats:
    """Logits of all rows, in order."""
    model.eval()
    with torch.inference_mode():
        return np.concatenate([model(b).double().numpy() for b in batches.epoch(0)])


def train(data: Dataset, loss: Loss, seed: int) -> YouTubeDNN:
    """The network of Section 4, smaller. The learning rate falls to 0: e^s follows every wobble of the last steps."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = YouTubeDNN(data.spec, embedding_dim=8, hidden=(128, 64), dropout=0.1)
    batches = Batches(Impressions(data, "train", max_len=MAX_LEN), 1024, shuffle=True, seed=seed)
    schedule = Cosine(EPOCHS * len(batches), warmup=100)
    fit(model, batches, loss, epochs=EPOCHS, lr=2e-3, schedule=schedule, table_l2=TABLE_L2, seed=seed, progress=False)
    return model


def ranks(values: Floats) -> Floats:
    """Ranks from 0, equal values at the mean of their places."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    middle = np.cumsum(count) - (count + 1) / 2.0
    found: Floats = middle[place]
    return found


def line(name: str, seconds: Floats, truth: Floats) -> str:
    """Slope of the truth on the prediction (1 = calibrated), mean against mean, correlation of the ranks."""
    slope = np.cov(truth, seconds)[0, 1] / np.var(seconds, ddof=1)
    correlation = np.corrcoef(ranks(seconds), ranks(truth))[0, 1]
    return f"| {name:<46} | {slope:.3f} | {seconds.mean() / truth.mean():.3f} | {correlation:.4f} |\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, train, write the table to standard output."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--users", type=int, default=3000)
    parser.add_argument("--part", choices=("valid", "test"), default="test")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    began = time.monotonic()
    world = World.build(users=options.users, seed=options.seed)
    settings: dict[str, tuple[float, Loss]] = {
        "clicks": (HOUR, PlainLogistic()),
        "paper": (HOUR, WeightedLogistic()),
        "paper, seconds": (SECOND, WeightedLogistic()),
        "every": (HOUR, EveryImpression()),
    }
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        data = {u: Dataset.build(with_past(world.tables, u), Path(folder) / f"{u:g}") for u in (SECOND, HOUR)}
        rows = data[SECOND].rows(options.part)
        weight = data[SECOND].events.weight[data[SECOND].rows("train")]
        for name, (unit, loss) in settings.items():
            asked = Batches(Impressions(data[unit], options.part, max_len=MAX_LEN), 8192)
            found[name] = scores(train(data[unit], loss, options.seed), asked)
    truth, chance = world.expected_watch[rows], sigmoid(found["clicks"])
    predicted = {
        "logistic regression: P · mean of a click": chance * float(weight[weight > 0].mean()),
        "weighted, in seconds: e^s": np.exp(found["paper, seconds"]),
        "weighted, in hours: e^s": HOUR * np.exp(found["paper"]),
        "weighted, in hours: e^s (1 − P)": HOUR * np.exp(found["paper"]) * (1.0 - chance),
        "every impression counts against, in hours: e^s": HOUR * np.exp(found["every"]),
    }
    sys.stdout.write(f"{len(truth):,} impressions, clicked {chance.mean():.3f}, {truth.mean():.0f} s expected\n\n")
    sys.stdout.write("| watch seconds predicted by | slope | sum / true sum | rank correlation |\n|---|---|---|---|\n")
    for name, seconds in predicted.items():
        sys.stdout.write(line(name, seconds, truth))
    sys.stdout.write(f"{time.monotonic() - began:.0f} s\n")


if __name__ == "__main__":
    main()
