"""Frappe: every ranker that reads plain rows, on the published split (202,005 / 57,722 / 28,860 rows, 10 fields).

Run:      python recipes/rank/frappe.py FOLDER_OF_THE_LIBFM_FILES [--models lr fm …] [--seeds 0 1] [--out FOLDER]
Hardware: 1 CPU core, 2 GB; 10 seconds (lr, fm, ffm) to 4 minutes (autoint, xdeepfm) a model and seed
Expected: the bands of SETTINGS; the measured table is docs/ranking.md

What is measured: test AUC of the weights of the best validation epoch; settings were chosen on the validation rows,
the test rows are scored once a run. A run that is finished (a line of OUT/results.json) is not repeated. Where the
published training file is missing, `frappe.train.REBUILT.libfm` serves: the same positives, negatives drawn anew by
the same rule. Tuned references on the published one (BARS leaderboard, Frappe_x1): LR .9356, FM .9671, FFM .9786, best
network .985.

What decides on so small a set is how the tables are held, as they over-fit before anything else has learnt:
- networks: an L2 pull on each distinct row of a batch (`table_l2`), however often it is used, with batch norm. DeepFM
  reaches a validation AUC of .984 so, .972 to .974 with L2 on each use;
- FM, FFM and AFM: L2 on each use of a row, since they cannot make up for rows that are all held short: FM .976 so, .914
  with L2 on each distinct row;
- width: NFM of width 64 gets to .987 where width 10 gets networks to .984; DeepFM of width 40 has .9866;
- a short cosine schedule at a high rate does in 10 epochs what a small constant rate does in 24, and ends higher.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from funnelrec import Dataset, zoo
from funnelrec.core.batch import Batch
from funnelrec.core.nn.embedding import FieldEmbedding
from funnelrec.data.batches import Batches
from funnelrec.data.examples import Impressions
from funnelrec.data.sources import frappe
from funnelrec.evaluate.protocol import RankResult, evaluate_ranker
from funnelrec.evaluate.significance import auc_interval, paired_auc_difference
from funnelrec.learn.fit import fit
from funnelrec.learn.losses import BCE
from funnelrec.learn.schedules import Cosine

BATCH = 4096
LADDER = ("lr", "fm", "ffm")  #: each must beat the one before, and the best network must beat the last


@dataclass(frozen=True)
class L2OnUse:
    """Binary cross-entropy plus strength / 2 · Σ share_r ‖row r‖², share_r the part of the examples that use row r.

    So a value is held more the more often it occurs. Rows outside the batch receive no gradient.
    """

    strength: float

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        rows, uses = torch.unique(batch.ids, return_counts=True)
        loss = BCE()(model, batch)
        for part in model.modules():
            if isinstance(part, FieldEmbedding):
                loss = loss + self.strength / 2 * (uses / batch.size * part.table(rows).square().sum(1)).sum()
        return loss


@dataclass(frozen=True)
class Setting:
    """How one model is trained, and the test AUC that it must reach.

    `row_l2` holds each distinct row of a batch, `use_l2` each use of a row.
    """

    model: str
    arguments: Mapping[str, Any]
    at_least: float
    lr: float = 4e-3
    epochs: int = 10
    row_l2: float = 0.0
    use_l2: float = 0.0
    bf16: bool = True
    label: str = ""


NETWORK = {"embedding_dim": 10, "hidden": (400, 400, 400), "dropout": 0.2, "batch_norm": True}


def _network(name: str, at_least: float = 0.980, **changes: Any) -> Setting:
    return Setting(f"rank/{name}", {**NETWORK, **changes}, at_least, row_l2=0.01)


SETTINGS = {
    "lr": Setting("rank/logistic_regression", {}, 0.930, lr=1e-2, bf16=False, label="LR"),
    "fm": Setting("rank/fm", {"embedding_dim": 10}, 0.964, lr=2e-2, epochs=20, use_l2=0.006, bf16=False, label="FM"),
    "ffm": Setting(
        "rank/ffm",
        {"embedding_dim": 10, "normalise": False},
        0.974,
        lr=1e-2,
        epochs=15,
        use_l2=0.004,
        bf16=False,
        label="FFM",
    ),
    "afm": Setting(
        "rank/afm", {"embedding_dim": 32, "dropout": 0.2}, 0.964, lr=3e-2, epochs=6, use_l2=0.0005, label="AFM"
    ),
    "nfm": Setting("rank/nfm", {"embedding_dim": 64, "hidden": (400,)}, 0.985, epochs=20, row_l2=0.01, label="NFM"),
    "pnn": _network("pnn"),
    "wide_deep": _network("wide_deep"),
    "dcn": _network("dcn"),
    "dcn_v2": _network("dcn_v2"),
    "deepfm": _network("deepfm"),
    "xdeepfm": _network("xdeepfm", feature_maps=(50, 50)),
    "autoint": _network("autoint"),
    "fibinet": _network("fibinet", 0.978),
}


@dataclass(frozen=True)
class Outcome:
    """What one run came to; `row` is what results.json keeps of it."""

    test: RankResult
    row: dict[str, Any] = field(default_factory=dict)


def dataset(files: Path, folder: Path) -> Dataset:
    """The published split as a Dataset in `folder`."""
    return Dataset.build(frappe.load(files), folder)


def run(name: str, data: Dataset, *, seed: int = 0, progress: bool = True) -> Outcome:
    """Train for the setting's epochs, keep the best of them on the validation rows, score the test rows once."""
    setting = SETTINGS[name]
    parts = {part: Impressions(data, part) for part in ("train", "valid", "test")}
    train = Batches(parts["train"], BATCH, shuffle=True, seed=seed)
    valid, test = Batches(parts["valid"], 8192), Batches(parts["test"], 8192)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = zoo.load(setting.model)(data.spec, **setting.arguments)
    steps = len(train) * setting.epochs
    result = fit(
        model,
        train,
        L2OnUse(setting.use_l2) if setting.use_l2 else BCE(),
        epochs=setting.epochs,
        lr=setting.lr,
        table_l2=setting.row_l2,
        schedule=Cosine(steps, warmup=steps // 10),
        validate=lambda: {"auc": evaluate_ranker(model, valid).means["auc"]},
        metric="auc",
        seed=seed,
        bf16=setting.bf16,
        progress=progress,
    )
    scored = evaluate_ranker(model, test)
    interval = auc_interval(scored.labels, scored.logits)
    row = {
        "model": name,
        "seed": seed,
        "test_auc": scored.means["auc"],
        "low": interval.low,
        "high": interval.high,
        "log_loss": scored.means["log_loss"],
        "valid_auc": result.best_metric,
        "best_epoch": result.best_epoch,
        "minutes": round(result.seconds / 60, 2),
    }
    return Outcome(scored, row)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: one line a model, mean ± standard deviation over its seeds, in the order of SETTINGS."""
    lines = [
        "| model | test AUC | seeds | 95 % of seed 0 | log loss | asked for | minutes |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, setting in SETTINGS.items():
        own = [row for row in rows if row["model"] == name]
        if not own:
            continue
        areas = [row["test_auc"] for row in own]
        spread = f" ± {statistics.stdev(areas):.4f}" if len(areas) > 1 else ""
        missed = "" if statistics.mean(areas) >= setting.at_least else " (missed)"
        label = setting.label or zoo.load(setting.model).__name__
        lines.append(
            f"| {label} | {statistics.mean(areas):.4f}{spread} | {len(own)} "
            f"| {own[0]['low']:.4f}–{own[0]['high']:.4f} | {statistics.mean(r['log_loss'] for r in own):.4f} "
            f"| {setting.at_least:.3f}{missed} | {statistics.mean(r['minutes'] for r in own):.1f} |"
        )
    return "\n".join(lines)


def ladder(rows: Sequence[Mapping[str, Any]], logits: Mapping[str, np.ndarray], labels: np.ndarray) -> list[str]:
    """LR < FM < FFM < the best network (by validation AUC): the paired differences of seed 0 on the test rows."""
    valid = {row["model"]: row["valid_auc"] for row in rows if row["seed"] == 0 and row["model"] in logits}
    networks = [name for name in valid if name not in (*LADDER, "afm")]
    rungs = [name for name in LADDER if name in logits]
    rungs += [max(networks, key=valid.__getitem__)] if networks else []
    lines = []
    for lower, upper in pairwise(rungs):
        test = paired_auc_difference(labels, logits[upper], logits[lower])
        difference = test.interval
        lines.append(
            f"{upper} − {lower}: {test.difference:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}], "
            f"{'p < 0.001' if test.p < 0.001 else f'p = {test.p:.3f}'}"
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, train what is missing, write the table to standard output."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", type=Path, help="folder of frappe.train.libfm (or .REBUILT.), .validation., .test.")
    parser.add_argument("--models", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--out", type=Path, default=Path("frappe_runs"), help="results.json and the logits of each run")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    (options.out / "logits").mkdir(parents=True, exist_ok=True)
    file = options.out / "results.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    done = {(row["model"], row["seed"]) for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        data = dataset(options.files, Path(folder) / "frappe")
        for seed in options.seeds:
            for name in options.models:
                if (name, seed) in done:
                    continue
                outcome = run(name, data, seed=seed, progress=sys.stderr.isatty())
                np.save(options.out / "logits" / f"{name}.{seed}.npy", outcome.test.logits)
                np.save(options.out / "logits" / "labels.npy", outcome.test.labels)
                rows.append(outcome.row)
                text = {"command": "python recipes/rank/frappe.py FOLDER --seeds …", "rows": rows}
                file.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
    stored = {p.name.removesuffix(".0.npy"): np.load(p) for p in (options.out / "logits").glob("*.0.npy")}
    sys.stdout.write(table(rows) + "\n\n")
    sys.stdout.write("\n".join(ladder(rows, stored, np.load(options.out / "logits" / "labels.npy"))) + "\n")


if __name__ == "__main__":
    main()
