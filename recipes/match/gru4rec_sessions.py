"""GRU4Rec on click sessions, trained along session-parallel lanes as its authors do.

Run:      python recipes/match/gru4rec_sessions.py FOLDER --data yoochoose|diginetica [--epochs 5] [--seed 0]
Hardware: 1 CPU core: 9 s an epoch of Yoochoose, 11 s of Diginetica.
Expected: one seed, 5 epochs, Recall@20 and MRR@20: Yoochoose .642 and .310, Diginetica .506 and .165; the authors' code
          on the same sessions .640 and .307, .503 and .162 (benchmarks/results/gru4rec.json)
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from funnelrec import Dataset
from funnelrec.data.batches import Batches
from funnelrec.data.histories import Histories
from funnelrec.data.lanes import SessionParallel
from funnelrec.data.sources import sessions
from funnelrec.evaluate.sessions import evaluate_sessions
from funnelrec.learn.fit import fit
from funnelrec.learn.lanes import Lanes, SharedBPRMax, SharedSoftmax
from funnelrec.match.gru4rec import GRU4Rec


@dataclass(frozen=True)
class Setting:
    """Hyper-parameters, with the meaning they have in the authors' parameter files."""

    width: int
    lanes: int
    dropout: float
    embedding_dropout: float
    lr: float
    momentum: float
    negatives: int
    alpha: float
    softmax: bool  # else BPR-max
    log_q: float = 0.0
    penalty: float = 0.0
    elu: float | None = None


SETTINGS = {
    # as published for the full Yoochoose set
    "yoochoose": Setting(480, 48, 0.2, 0.0, 0.07, 0.0, 2048, 0.2, True, log_q=1.0),
    # as published for Diginetica, but for a narrower layer, fewer negatives and less dropout, which suit a CPU
    "diginetica": Setting(96, 256, 0.1, 0.2, 0.05, 0.15, 512, 0.3, False, penalty=0.9, elu=1.0),
}


def held_out(data: Dataset) -> Histories:
    """The sessions of the test part."""
    person, item, moment = data.positives("test")
    return Histories.build(person, item, moment, data.histories.num_users)


def train(
    data: Dataset, setting: Setting, *, epochs: int, seed: int = 0, bf16: bool = True, item_std: float | None = None
) -> GRU4Rec:
    """A model with the weights after `epochs`; `bf16`: matrix products in bfloat16; `item_std`: items start at
    N(0, item_std²), else as the model has it."""
    torch.manual_seed(seed)
    model = GRU4Rec(
        data.spec,
        embedding_dim=setting.width,
        dropout=setting.dropout,
        embedding_dropout=setting.embedding_dropout,
        item_bias=True,
    )
    if item_std is not None:
        with torch.no_grad():
            model.items.weight.mul_(item_std / model.items.std)
    counts = torch.from_numpy(data.train_item_counts).long()
    loss = (
        SharedSoftmax(setting.negatives, counts, setting.alpha, log_q=setting.log_q)
        if setting.softmax
        else SharedBPRMax(setting.negatives, counts, setting.alpha, penalty=setting.penalty, elu=setting.elu)
    )
    batches = Batches(SessionParallel(data, setting.lanes, least=1 if setting.negatives else 2), 1)
    fit(
        Lanes(model, setting.lanes), batches, loss, epochs=epochs, lr=setting.lr, table="adagrad",
        momentum=setting.momentum, seed=seed, bf16=bf16,
    )  # fmt: skip
    return model


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, train, write the figures to standard output."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", choices=sorted(SETTINGS), default="yoochoose")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = Dataset.build(sessions.load(options.folder, variant=options.data), Path(folder) / "data")
        start = time.perf_counter()
        model = train(data, SETTINGS[options.data], epochs=options.epochs, seed=options.seed)
        seconds = time.perf_counter() - start
        found = evaluate_sessions(model, held_out(data), data.spec.num_items, ks=(5, 20), max_len=model.max_len)
    figures = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
    sys.stdout.write(f"{options.data}, {options.epochs} epochs in {seconds:.0f} s: {figures}\n")


if __name__ == "__main__":
    main()
