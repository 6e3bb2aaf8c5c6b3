"""Wide & Deep: how many weights of the wide part L1 sets to exactly zero, and what that costs in AUC.

Run:      python recipes/rank/wide_deep.py adult FOLDER_OF_ADULT_CSV [--seeds 0 1 2 3 4] [--l1 0 1 3 10 30 1000]
          python recipes/rank/wide_deep.py frappe FOLDER_OF_THE_LIBFM_FILES [--seeds 0]
Hardware: 1 CPU core, 1 GB; adult 5 seconds a run, frappe 1 to 2 minutes
Expected: the share of exact zeros grows with l1, and at 80 % zeros and more the test AUC is within .002 of l1 = 0.
          adult, 5 seeds: l1 = 0, 0 % zeros, .9173; l1 = 3, 47 %, .9177; l1 = 30, 90 %, .9178 (paired +.0005 ± .0003);
          the deep part alone has .9170

The wide part (the values of all fields and the declared crosses, trained by FTRL-proximal) and the deep part (AdamW,
tables by lazy Adam, a cosine schedule) learn from one loss in one `fit`. Zeros are counted among the weights whose
value or combination occurs in the training rows: the others were never anything but zero. The weights of the epoch with
the best validation AUC are kept; the difference to the first l1 is paired, on the same test rows. The last l1 leaves
a few weights in a thousand: it is the deep part alone.

adult:  48,842 people of the US census of 1994 (Kohavi 1996, UCI; CC BY 4.0), 80 / 10 / 10 % at random by the seed; does
        one earn more than 50,000 dollars a year? Ages, hours and gains are numbers for the deep part and bands for the
        wide one. frappe: the published split (data/sources/frappe.py).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch

from funnelrec import Dataset
from funnelrec.core.schema import Category, Number, Schema
from funnelrec.data.batches import Batches
from funnelrec.data.examples import Impressions
from funnelrec.data.sources import csv, frappe
from funnelrec.data.split import Ratio
from funnelrec.evaluate.protocol import RankResult, evaluate_ranker
from funnelrec.evaluate.significance import paired_auc_difference
from funnelrec.learn.fit import fit
from funnelrec.learn.losses import BCE
from funnelrec.learn.schedules import Cosine
from funnelrec.rank.wide_deep import WideDeep

WORDS = ("workclass", "education", "marital-status", "occupation", "relationship", "race", "gender", "native-country")
NUMBERS = ("age", "educational-num", "capital-gain", "capital-loss", "hours-per-week")
BANDS = {
    "age": (20, 25, 30, 35, 40, 45, 50, 55, 60, 65),
    "hours-per-week": (20, 30, 40, 41, 50, 60),
    "capital-gain": (1, 3000, 5000, 7000, 10000),
    "capital-loss": (1, 1500, 1800, 2000),
}


def adult(folder: Path, seed: int, to: Path) -> Dataset:
    """adult.csv or adult.csv.gz of `folder`, split by `seed`; the census's sampling weight is left out."""
    file = next((f for name in ("adult.csv", "adult.csv.gz") if (f := folder / name).exists()), None)
    if file is None:
        raise ValueError(f"there is no adult.csv in {folder}; pass the folder that holds it, plain or as .gz")
    raw = pl.read_csv(file, null_values="?")
    bands = [
        pl.sum_horizontal((pl.col(name) >= edge).cast(pl.Int64) for edge in edges).alias(f"{name} band")
        for name, edges in BANDS.items()
    ]
    label = (pl.col("income") == ">50K").cast(pl.Float64).alias("label")
    frame = raw.select(*WORDS, *NUMBERS, *bands, label)
    words = tuple(Category(name) for name in (*WORDS, *(f"{name} band" for name in BANDS)))
    schema = Schema(label="label", context=(*words, *(Number(name) for name in NUMBERS)))
    return Dataset.build(csv.load(frame, schema=schema), to, split=Ratio(seed=seed))


@dataclass(frozen=True)
class Source:
    """Where rows come from, what is crossed, and how the model is made and trained."""

    load: Callable[[Path, int, Path], Dataset]  #: folder of the files, seed, folder to write to
    crosses: tuple[tuple[str, ...], ...]
    model: Mapping[str, Any]
    batch: int
    lr: float
    epochs: int
    table_l2: float
    bf16: bool


SOURCES = {
    "adult": Source(
        load=adult,
        crosses=(
            ("education", "occupation"),
            ("native-country", "occupation"),
            ("age band", "education", "occupation"),
            ("relationship", "occupation"),
            ("age band", "hours-per-week band"),
            ("workclass", "occupation", "hours-per-week band"),
        ),
        model={"embedding_dim": 8, "hidden": (100, 50), "dropout": 0.2},
        batch=256,
        lr=2e-3,
        epochs=8,
        table_l2=0.001,
        bf16=False,
    ),
    "frappe": Source(
        load=lambda folder, seed, to: Dataset.build(frappe.load(folder), to),
        crosses=(("user", "item"), ("item", "daytime"), ("item", "weekday"), ("item", "city"), ("user", "daytime")),
        model={"embedding_dim": 10, "hidden": (400, 400, 400), "dropout": 0.2, "batch_norm": True},
        batch=4096,
        lr=4e-3,
        epochs=10,
        table_l2=0.01,
        bf16=True,
    ),
}


@dataclass(frozen=True)
class Outcome:
    """What one run came to."""

    l1: float
    zeros: int
    weights: int
    valid_auc: float
    test: RankResult
    seconds: float

    @property
    def share(self) -> float:
        return self.zeros / self.weights


def zeros(model: WideDeep, batches: Batches) -> tuple[int, int]:
    """Weights of the wide part that are exactly 0, and all of them, among those that occur in `batches`."""
    wide = model.wide
    assert wide.combinations is not None
    used = [torch.zeros(len(t.weight), dtype=torch.bool) for t in (wide.values.table, wide.combinations)]
    for batch in batches.epoch(0):
        used[0][batch.ids.flatten().long()] = True
        used[1][wide.cross_rows(batch.ids).flatten()] = True
    counts = []
    for occurs, table in zip(used, (wide.values.table, wide.combinations), strict=True):
        occurs[0] = False  # padding
        counts.append((int((table.weight[occurs] == 0).sum()), int(occurs.sum())))
    return sum(zero for zero, _ in counts), sum(total for _, total in counts)


def run(source: Source, data: Dataset, l1: float, *, seed: int = 0) -> Outcome:
    """Train both parts, keep the best epoch on the validation rows, score the test rows once."""
    parts = {part: Impressions(data, part) for part in ("train", "valid", "test")}
    train = Batches(parts["train"], source.batch, shuffle=True, seed=seed)
    valid, test = Batches(parts["valid"], 8192), Batches(parts["test"], 8192)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = WideDeep(data.spec, crosses=source.crosses, buckets=1_000_000, **source.model)
    steps = len(train) * source.epochs
    result = fit(
        model,
        train,
        BCE(),
        epochs=source.epochs,
        lr=source.lr,
        table_l2=source.table_l2,
        ftrl={"wide": {"alpha": 0.05, "l1": l1, "scale": source.batch}},
        schedule=Cosine(steps, warmup=steps // 10),
        validate=lambda: {"auc": evaluate_ranker(model, valid).means["auc"]},
        metric="auc",
        seed=seed,
        bf16=source.bf16,
        progress=sys.stderr.isatty(),
    )
    assert result.best_metric is not None
    return Outcome(l1, *zeros(model, train), result.best_metric, evaluate_ranker(model, test), result.seconds)


def line(outcome: Outcome, first: Outcome, seed: int) -> str:
    """One row of the table; the difference is that of the test AUC to the run with the first l1."""
    difference = "–"
    if outcome is not first:
        paired = paired_auc_difference(outcome.test.labels, outcome.test.logits, first.test.logits)
        difference = f"{paired.difference:+.4f} [{paired.interval.low:+.4f}, {paired.interval.high:+.4f}]"
    return (
        f"| {seed} | {outcome.l1:g} | {outcome.share:.1%} of {outcome.weights:,} | {outcome.valid_auc:.4f} "
        f"| {outcome.test.means['auc']:.4f} | {difference} | {outcome.seconds:.0f} |"
    )


def mean_line(outcomes: Sequence[Outcome], first: Sequence[Outcome]) -> str:
    """The mean over the seeds of one l1."""
    areas = [o.test.means["auc"] for o in outcomes]
    apart = [area - f.test.means["auc"] for area, f in zip(areas, first, strict=True)]
    spread = f" ± {statistics.stdev(apart):.4f}" if len(apart) > 1 else ""
    return (
        f"| all | {outcomes[0].l1:g} | {statistics.mean(o.share for o in outcomes):.1%} "
        f"| {statistics.mean(o.valid_auc for o in outcomes):.4f} | {statistics.mean(areas):.4f} "
        f"| {statistics.mean(apart):+.4f}{spread} | {statistics.mean(o.seconds for o in outcomes):.0f} |"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, train once for each seed and strength, write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", choices=SOURCES)
    parser.add_argument("files", type=Path, help="folder of adult.csv, or of Frappe's libfm files; plain or .gz")
    parser.add_argument("--l1", nargs="+", type=float, default=[0.0, 1.0, 3.0, 10.0, 30.0, 1000.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    source, outcomes = SOURCES[options.source], dict[float, list[Outcome]]()
    sys.stdout.write("| seed | l1 | exact zeros | valid AUC | test AUC | difference to the first l1 | seconds |\n")
    sys.stdout.write("|---|---:|---:|---:|---:|---:|---:|\n")
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            data = source.load(options.files, seed, Path(folder) / "data")
            for l1 in options.l1:
                outcomes.setdefault(l1, []).append(run(source, data, l1, seed=seed))
                sys.stdout.write(line(outcomes[l1][-1], outcomes[options.l1[0]][-1], seed) + "\n")
                sys.stdout.flush()
    for each in outcomes.values():
        sys.stdout.write(mean_line(each, outcomes[options.l1[0]]) + "\n")


if __name__ == "__main__":
    main()
