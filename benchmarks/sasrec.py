"""SASRec with the full softmax beside RecTools and RePlay on MovieLens-1M: speed, memory, and what was learnt.

    python benchmarks/sasrec.py FOLDER_OF_ML_1M [--rectools PYTHON] [--replay PYTHON] [--epochs 2] [--users N]
           [--threads 1] [--output benchmarks/results/sasrec.json]

PYTHON is the interpreter of an environment with the peer and torch; without it that side is left out. Length 200, width
64, 2 blocks, 1 head, dropout .2, batch 128, Adam at 1e-3, the same epochs. The last film of each person is held out;
sequences/s are counted over the epochs alone, and the evaluation is the 10 best unseen films of the whole catalogue
for every person, as each library answers it. NDCG@10 is computed from those lists by one function for all sides. Each
side is a process of its own, one after the other; times by the wall clock and by the processor's. `--users` keeps the
first N people: for a quick look.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

LENGTH, WIDTH, BLOCKS, DROPOUT, BATCH, RATE = 200, 64, 2, 0.2, 128, 1e-3
Sequences = list[npt.NDArray[np.int64]]


def prepare(folder: Path, users: int | None, file: Path) -> None:
    """Write films 1, 2, … of each person in the order of time; of equal times in that of the file."""
    from funnelrec.data.sources import movielens

    log = movielens.load(folder).events
    person, film = (np.unique(log[column].to_numpy(), return_inverse=True)[1] for column in ("user", "item"))
    order = np.lexsort((log["time"].to_numpy(), person))
    counts = np.bincount(person)[:users]
    np.savez(file, counts=counts, films=film[order][: counts.sum()] + 1)


def read(file: Path) -> Sequences:
    """What `prepare` wrote, person by person."""
    saved = np.load(file)
    return np.split(saved["films"], saved["counts"].cumsum()[:-1])


class Clock:
    """Seconds by the wall and by the processor."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        return {"seconds": time.perf_counter() - self.wall, "cpu_seconds": time.process_time() - self.cpu}


def ours(train: Sequences, epochs: int) -> tuple[npt.NDArray[np.int64], dict[str, Any]]:
    """`fit` and an exact index."""
    import polars as pl
    import torch

    from funnelrec import Dataset
    from funnelrec.core.batch import Batch
    from funnelrec.core.schema import Schema
    from funnelrec.data.batches import Batches
    from funnelrec.data.examples import NextItem
    from funnelrec.data.split import Given
    from funnelrec.data.tables import Tables
    from funnelrec.learn.fit import fit
    from funnelrec.learn.losses import FullSoftmax
    from funnelrec.match.index.exact import ExactIndex
    from funnelrec.match.retriever import VectorRetriever, item_vectors
    from funnelrec.match.sasrec import SASRec

    lengths = [len(s) for s in train]
    events = pl.DataFrame(
        {
            "user": np.repeat(np.arange(len(train)), lengths),
            "item": np.concatenate(train),
            "time": np.concatenate([np.arange(n) for n in lengths]),
        }
    )
    tables = Tables(events=events, schema=Schema(user="user", item="item", time="time"))
    with tempfile.TemporaryDirectory() as folder:
        data = Dataset.build(tables, folder, split=Given(np.zeros(events.height, dtype=np.uint8)))
        torch.manual_seed(0)
        model = SASRec(data.spec, embedding_dim=WIDTH, max_len=LENGTH, num_layers=BLOCKS, dropout=DROPOUT)
        model.items.dense = True
        batches = Batches(NextItem(data, "train", max_len=LENGTH), BATCH, shuffle=True)
        clock = Clock()
        fit(model, batches, FullSoftmax(), epochs=epochs, lr=RATE, bf16=True, progress=False)
        result = {"train": clock.read()}
        clock = Clock()
        retriever = VectorRetriever(model, ExactIndex(item_vectors(model, data.spec.num_items)))
        people = torch.from_numpy(data.user_vocabulary.encode(pl.Series(range(len(train)))).astype(np.int64))
        end = torch.full_like(people, LENGTH * 1000)
        found = []
        for rows in torch.split(people, 512):
            history, when, mask = data.histories.before(rows, end[: len(rows)], LENGTH)
            batch = Batch(history=history, mask=mask, history_times=when)
            found.append(retriever.recommend(batch, 10, data.histories.seen(rows, end[: len(rows)]))[0])
        result["evaluate"] = clock.read()
        names = np.zeros(data.spec.num_items, dtype=np.int64)
        names[data.item_vocabulary.encode(pl.Series(np.unique(events["item"])))] = np.unique(events["item"])
        return names[torch.cat(found).numpy()], result


def rectools(train: Sequences, epochs: int) -> tuple[npt.NDArray[np.int64], dict[str, Any]]:
    """RecTools' SASRecModel."""
    import pandas as pd
    from pytorch_lightning import Callback, Trainer
    from rectools.dataset import Dataset
    from rectools.models import SASRecModel
    from rectools.models.nn.item_net import IdEmbeddingsItemNet

    lengths = [len(s) for s in train]
    begin = np.concatenate([np.arange(n) for n in lengths])
    log = pd.DataFrame(
        {
            "user_id": np.repeat(np.arange(len(train)), lengths),
            "item_id": np.concatenate(train),
            "weight": 1.0,
            "datetime": pd.Timestamp("2020-01-01") + pd.to_timedelta(begin, unit="s"),
        }
    )
    data, clocks = Dataset.construct(log), {}

    class Times(Callback):  # type: ignore[misc]
        def on_train_start(self, *_: Any) -> None:
            clocks["start"] = Clock()

        def on_train_end(self, *_: Any) -> None:
            clocks["train"] = clocks["start"].read()

    def trainer() -> Any:
        return Trainer(
            max_epochs=epochs, min_epochs=epochs, accelerator="cpu", callbacks=[Times()], logger=False,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        )  # fmt: skip

    model = SASRecModel(
        n_blocks=BLOCKS, n_heads=1, n_factors=WIDTH, session_max_len=LENGTH, dropout_rate=DROPOUT, loss="softmax",
        lr=RATE, batch_size=BATCH, epochs=epochs, item_net_block_types=(IdEmbeddingsItemNet,),
        get_trainer_func=trainer, recommend_torch_device="cpu",
    )  # fmt: skip
    model.fit(data)
    clock = Clock()
    answer = model.recommend(users=np.arange(len(train)), dataset=data, k=10, filter_viewed=True)
    seconds = clock.read()
    lists = np.zeros((len(train), 10), dtype=np.int64)
    lists[answer["user_id"], answer["rank"] - 1] = answer["item_id"]
    return lists, {"train": clocks["train"], "evaluate": seconds}


def replay(train: Sequences, epochs: int) -> tuple[npt.NDArray[np.int64], dict[str, Any]]:
    """RePlay's SasRec under Lightning."""
    import lightning
    import pandas as pd
    from replay.data import FeatureHint, FeatureSource, FeatureType
    from replay.data.nn import PandasSequentialDataset, TensorFeatureInfo, TensorFeatureSource, TensorSchema
    from replay.models.nn.optimizer_utils import FatOptimizerFactory
    from replay.models.nn.sequential import SasRec
    from replay.models.nn.sequential.callbacks import PandasPredictionCallback
    from replay.models.nn.sequential.postprocessors import RemoveSeenItems
    from replay.models.nn.sequential.sasrec import SasRecPredictionDataset, SasRecTrainingDataset
    from torch.utils.data import DataLoader

    films = int(max(s.max() for s in train))
    schema = TensorSchema(
        TensorFeatureInfo(
            name="item_id", is_seq=True, cardinality=films, padding_value=films, embedding_dim=WIDTH,
            feature_type=FeatureType.CATEGORICAL, feature_hint=FeatureHint.ITEM_ID,
            feature_sources=[TensorFeatureSource(FeatureSource.INTERACTIONS, "item_id")],
        )
    )  # fmt: skip
    frame = pd.DataFrame({"user_id": np.arange(len(train)), "item_id": [s - 1 for s in train]})
    data = PandasSequentialDataset(schema, "user_id", "item_id", frame)
    clocks = {}

    class Times(lightning.Callback):  # type: ignore[misc]
        def on_train_start(self, *_: Any) -> None:
            clocks["start"] = Clock()

        def on_train_end(self, *_: Any) -> None:
            clocks["train"] = clocks["start"].read()

    model = SasRec(
        schema, block_count=BLOCKS, head_count=1, hidden_size=WIDTH, max_seq_len=LENGTH, dropout_rate=DROPOUT,
        loss_type="CE", optimizer_factory=FatOptimizerFactory(learning_rate=RATE),
    )  # fmt: skip
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_epochs=epochs, callbacks=[Times()], enable_checkpointing=False, **quiet)
    trainer.fit(model, DataLoader(SasRecTrainingDataset(data, LENGTH), batch_size=BATCH, shuffle=True))
    clock = Clock()
    top = PandasPredictionCallback(10, "user_id", "item_id", postprocessors=[RemoveSeenItems(data)])
    trainer = lightning.Trainer(callbacks=[top], inference_mode=True, **quiet)
    trainer.predict(model, DataLoader(SasRecPredictionDataset(data, LENGTH), batch_size=512), return_predictions=False)
    answer = top.get_result()
    seconds = clock.read()
    answer = answer.astype({"user_id": int, "item_id": int, "rating": float})
    answer["place"] = answer.groupby("user_id")["rating"].rank(ascending=False, method="first").astype(int) - 1
    lists = np.zeros((len(train), 10), dtype=np.int64)
    lists[answer["user_id"], answer["place"]] = answer["item_id"] + 1
    return lists, {"train": clocks["train"], "evaluate": seconds}


SIDES = {"ours": ours, "rectools": rectools, "replay": replay}


def work(side: str, file: Path, epochs: int, threads: int) -> None:
    """One side, in its own process: writes a line of JSON."""
    import torch

    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    whole = read(file)
    lists, result = SIDES[side]([s[:-1] for s in whole], epochs)
    place = (lists == np.array([s[-1] for s in whole])[:, None]).argmax(1)
    hit = (lists == np.array([s[-1] for s in whole])[:, None]).any(1)
    for kind in ("seconds", "cpu_seconds"):
        result[f"sequences_per_{kind[:-1]}"] = len(whole) * epochs / result["train"][kind]
    result |= {"ndcg@10": float((hit / np.log2(place + 2)).mean()), "hit_rate@10": float(hit.mean())}
    result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    sys.stdout.write(json.dumps(result) + "\n")


def main() -> None:
    """Read the command line, run the sides one after the other, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rectools")
    parser.add_argument("--replay")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--users", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side is not None:
        work(options.side, options.folder, options.epochs, options.threads)
        return
    results = {}
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "films.npz"
        prepare(options.folder, options.users, file)
        for side, python in (("ours", sys.executable), ("replay", options.replay), ("rectools", options.rectools)):
            if python is None or side not in options.sides:
                continue
            command = [python, __file__, str(file), "--side", side, "--epochs", str(options.epochs)]
            done = subprocess.run(
                [*command, "--threads", str(options.threads)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise SystemExit(f"{side} failed:\n{done.stderr[-2000:]}")
            results[side] = json.loads(done.stdout.splitlines()[-1])
            sys.stderr.write(f"{side} {results[side]}\n")
    report = {
        "command": f"python benchmarks/sasrec.py FOLDER --rectools PYTHON --replay PYTHON --epochs {options.epochs}"
        + (f" --users {options.users}" if options.users else ""),
        "machine": platform.machine(), "threads": options.threads, "results": results,
    }  # fmt: skip
    text = json.dumps(report, indent=1) + "\n"
    sys.stdout.write(text)
    if options.output is not None:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
