"""Wide & Deep on Frappe: how many weights of the wide part L1 sets to exactly zero, and what that costs.

Run:      python recipes/rank/wide_deep.py FOLDER_OF_THE_LIBFM_FILES [--l1 0 1 3 10 30] [--seed 0]
Hardware: 1 CPU core with AMX, 1 GB; 1.2 minutes a value of l1 on a core shared with other work
Expected: the share of exact zeros grows with l1, and at 80 % zeros and more the test AUC is within .002 of l1 = 0.
          Seed 0: 0 % zeros, .9821 (l1 = 0); 84.1 %, .9817 (3); 99.7 %, .9811 (30)

The wide part (the values of all fields and the crosses of CROSSES, trained by FTRL-proximal) and the deep part (AdamW,
tables by lazy Adam) learn from one loss in one `fit`. Zeros are counted among the weights whose value or combination
occurs in the training rows: the others were never anything but zero.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from funnelrec import Dataset
from funnelrec.data.batches import Batches
from funnelrec.data.examples import Impressions
from funnelrec.data.sources import frappe
from funnelrec.evaluate.protocol import evaluate_ranker
from funnelrec.learn.fit import fit
from funnelrec.learn.losses import BCE
from funnelrec.rank.wide_deep import WideDeep

BATCH = 4096
CROSSES = (("user", "item"), ("item", "daytime"), ("item", "weekday"), ("item", "city"), ("user", "daytime"))


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


def run(data: Dataset, l1: float, *, seed: int = 0, epochs: int = 8) -> str:
    """One row of the table."""
    parts = {part: Impressions(data, part) for part in ("train", "valid", "test")}
    train = Batches(parts["train"], BATCH, shuffle=True, seed=seed)
    valid, test = Batches(parts["valid"], 8192), Batches(parts["test"], 8192)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = WideDeep(
            data.spec,
            embedding_dim=10,
            crosses=CROSSES,
            buckets=1_000_000,
            hidden=(400, 400, 400),
            dropout=0.2,
            batch_norm=True,
        )
    result = fit(
        model,
        train,
        BCE(),
        epochs=epochs,
        lr=2e-3,
        table_l2=0.01,
        ftrl={"wide": {"alpha": 0.05, "l1": l1, "scale": BATCH}},
        validate=lambda: {"auc": evaluate_ranker(model, valid).means["auc"]},
        metric="auc",
        seed=seed,
        bf16=True,
        progress=sys.stderr.isatty(),
    )
    zero, total = zeros(model, train)
    area = evaluate_ranker(model, test).means["auc"]
    share = f"{zero / total:>6.1%} of {total:,}"
    return f"| {l1:>6g} | {share} | {result.best_metric:.4f} | {area:.4f} | {result.seconds:>4.0f} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, train once for each strength, write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", type=Path, help="folder of frappe.train.libfm (or .REBUILT.), .validation., .test.")
    parser.add_argument("--l1", nargs="+", type=float, default=[0.0, 1.0, 3.0, 10.0, 30.0])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = Dataset.build(frappe.load(options.files), Path(folder) / "frappe")
        sys.stdout.write("| l1     | exact zeros      | valid AUC | test AUC | seconds |\n|---|---|---|---|---|\n")
        for l1 in options.l1:
            sys.stdout.write(run(data, l1, seed=options.seed) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
