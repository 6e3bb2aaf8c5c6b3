"""GRU4Rec beside its authors' PyTorch code: the same sessions, the same hyper-parameters, one thread, one run.

    python benchmarks/gru4rec.py DATA --official FOLDER [--data yoochoose diginetica] [--epochs 5]
           [--output benchmarks/results/gru4rec.json]

DATA holds session-yoochoose100k and session-diginetica; FOLDER is a copy of GRU4Rec_PyTorch_Official (needs pandas),
which is used as it is. Per set, its `fit` and ours train one after the other, then each model is measured by its own
side's code: Recall@20 and MRR@20 over all next events of the test sessions, ties against the model. Settings are those
of recipes/match/gru4rec_sessions.py, and our items start with the variance of theirs, 2 / (items + width); the side
"own_start" leaves ours, which learns faster in the first epochs of a large catalogue. Events/s are counted over the
whole of both `fit`s, the drawing of negatives included, by the wall clock and by the processor's: on a machine that
others use too, trust the second.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "match"))

import gru4rec_sessions as recipe

from funnelrec import Dataset
from funnelrec.data.histories import Histories
from funnelrec.data.sources import sessions
from funnelrec.evaluate.sessions import evaluate_sessions

SIDES = {"bf16": {"bf16": True}, "float32": {"bf16": False}, "own_start": {"bf16": True, "own_start": True}}
FOLDERS = {"yoochoose": "session-yoochoose100k", "diginetica": "session-diginetica"}


@contextlib.contextmanager
def timed(into: dict[str, Any], events: int) -> Iterator[None]:
    """Note how long the body took, and its events a second."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    into |= {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    into |= {"events_per_second": events / into["seconds"], "events_per_cpu_second": events / into["cpu_seconds"]}


def frame(histories: Histories) -> Any:
    """Sessions as the table that the authors' code reads; items are numbers in the order in which they appear."""
    import pandas

    owner = np.repeat(np.arange(histories.num_users), np.diff(histories.offsets.numpy()))
    items = histories.items.numpy().astype(np.int64)
    return pandas.DataFrame({"SessionId": owner, "ItemId": items, "Time": histories.times.numpy()})


def official(folder: Path, data: Dataset, epochs: int, events: int) -> dict[str, Any]:
    """The authors' code on the same events."""
    sys.path.insert(0, str(folder))
    theirs, evaluation = importlib.import_module("gru4rec_pytorch"), importlib.import_module("evaluation")
    setting = recipe.SETTINGS[data_name(data)]
    train, test = frame(data.train_histories), frame(recipe.held_out(data))
    rows = {row: number for number, row in enumerate(train.ItemId.unique())}  # its P0 needs them in this order
    train["ItemId"] = train.ItemId.map(rows).astype("int64")
    test = test[test.ItemId.isin(rows)].assign(ItemId=lambda t: t.ItemId.map(rows).astype("int64"))
    torch.manual_seed(0)
    model = theirs.GRU4Rec(
        layers=[setting.width], loss="cross-entropy" if setting.softmax else "bpr-max", batch_size=setting.lanes,
        dropout_p_embed=setting.embedding_dropout, dropout_p_hidden=setting.dropout, learning_rate=setting.lr,
        momentum=setting.momentum, sample_alpha=setting.alpha, n_sample=setting.negatives, n_epochs=epochs,
        bpreg=setting.penalty, elu_param=setting.elu or 0, logq=setting.log_q, device=torch.device("cpu"),
    )  # fmt: skip
    result: dict[str, Any] = {}
    drawn = min(10_000_000, int(1.1 * events / setting.lanes) * setting.negatives)  # no more than it will use
    with contextlib.redirect_stdout(sys.stderr):
        with timed(result, events):  # the mode compatible with Theano does not run under numpy 2
            model.fit(train, sample_cache_max_size=drawn, compatibility_mode=False)
        recall, mrr = evaluation.batch_eval(model, test, [20], 512)
    return result | {"recall@20": float(recall[20]), "mrr@20": float(mrr[20])}


def ours(data: Dataset, epochs: int, events: int, *, bf16: bool, own_start: bool = False) -> dict[str, Any]:
    """`fit` on lanes."""
    result: dict[str, Any] = {}
    setting = recipe.SETTINGS[data_name(data)]
    item_std = None if own_start else math.sqrt(2 / (data.spec.num_items + setting.width))
    with timed(result, events):
        model = recipe.train(data, setting, epochs=epochs, bf16=bf16, item_std=item_std)
    model.eval()
    return result | evaluate_sessions(model, recipe.held_out(data), data.spec.num_items, max_len=model.max_len)


def data_name(data: Dataset) -> str:
    """Which of the two sets it is."""
    return "yoochoose" if data.spec.num_items < 10_000 else "diginetica"


def main() -> None:
    """Read the command line, run both sides, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--official", type=Path, required=True)
    parser.add_argument("--data", nargs="+", choices=sorted(FOLDERS), default=sorted(FOLDERS, reverse=True))
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for name in options.data:
        with tempfile.TemporaryDirectory() as folder:
            data = Dataset.build(sessions.load(options.folder / FOLDERS[name], variant=name), Path(folder) / "data")
            sizes = np.diff(data.train_histories.offsets.numpy())
            events = int((sizes[sizes > 1] - 1).sum()) * options.epochs
            found = {"official": official(options.official, data, options.epochs, events)}
            sys.stderr.write(f"{name} official {found['official']}\n")
            for side, how in SIDES.items():
                found[side] = ours(data, options.epochs, events, **how)
                sys.stderr.write(f"{name} {side} {found[side]}\n")
        base = found["official"]
        ratios = {
            side: {key: found[side][key] / base[key] for key in base if key not in ("seconds", "cpu_seconds")}
            for side in SIDES
        }
        results.append({"data": name, "setting": vars(recipe.SETTINGS[name]), **found, "ratio": ratios})
        report = {
            "command": "python benchmarks/gru4rec.py DATA --official FOLDER "
            f"--data {' '.join(options.data)} --epochs {options.epochs}",
            "machine": platform.machine(), "threads": 1, "torch": torch.__version__, "epochs": options.epochs,
            "results": results,
        }  # fmt: skip
        if options.output is not None:
            options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps([{"data": r["data"], **r["ratio"]} for r in results], indent=1) + "\n")


if __name__ == "__main__":
    main()
