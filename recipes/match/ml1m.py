"""MovieLens-1M: SASRec, GRU4Rec and BERT4Rec against popularity and item-CF, leaving the last out and by time.

`taught` is SASRec once more, taught by SASRec and GRU4Rec side by side.

Run:      python recipes/match/ml1m.py FOLDER_OF_ML_1M [--split legacy time] [--models sasrec …] [--seeds 0] [--out OUT]
Hardware: 1 CPU core, 3 GB; SASRec 25, GRU4Rec 20, BERT4Rec 11, taught 50 seconds of processor time a pass
Expected: legacy, seed 0, NDCG@10 and HR@10 (± .008 and ± .012): popularity .0180, .0369; item-CF .0376, .0758; SASRec
          .1877, .3195 (of width 64, 40 passes: .1782, .3075); GRU4Rec .1793, .3104 (of width 64 on 100 films, 25
          passes: .1511, .2666); both side by side .1946, .3278; taught by both .1919, .3260;
          BERT4Rec .1686, .3010 (45 passes: .1517, .2727)

Both protocols rank the whole catalogue and leave out what the user has seen; ties count against the model.
- legacy: the last film of each of the 6,040 people tests, the one before it validates. The order is that of the file
  published with SASRec, person by person. Published there: SASRec with the full softmax .1821 / .3152 (NDCG@10, HR@10),
  BERT4Rec .1537 / .2843; GRU4Rec .1648 / .2811.
- time: the youngest tenth of all ratings tests, the tenth before it validates; who was never seen gets what is popular.

A finished run (a file in OUT) is not repeated; one that was cut off goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from funnelrec import Dataset
from funnelrec.core.batch import Batch
from funnelrec.data.batches import Batches
from funnelrec.data.examples import NextItem
from funnelrec.data.sources import movielens
from funnelrec.data.split import GlobalTime, LeaveLastOut
from funnelrec.evaluate.protocol import MatchResult
from funnelrec.evaluate.significance import bootstrap_interval, paired_test
from funnelrec.learn.distil import CatalogueDistillation
from funnelrec.learn.fit import fit
from funnelrec.learn.schedules import Cosine
from funnelrec.workflow import Choice, evaluate_matchers, match_loss, validation_metrics

KS = (10, 50)
BASELINES = ("popularity", "item_cf")


@dataclass(frozen=True)
class Setting:
    """How one model is trained: `passes` over the people, of which `rounds` between two validations."""

    model: str
    passes: int
    lr: float = 2e-3
    batch: int = 64
    max_len: int = 200
    rounds: int = 5
    soft: float = 0.0  #: share of what the teacher, TOGETHER, says in the loss


TOGETHER = "sasrec+gru4rec"  #: both side by side, once each is trained
TAUGHT = "taught"  #: SASRec again, taught by both side by side
SETTINGS = {
    "popularity": Setting("popularity", 0),
    "item_cf": Setting("item_cf", 0),
    "sasrec": Setting("sasrec(embedding_dim=128, max_len=200, dropout=0.3, num_heads=2)", 60, rounds=10),
    "gru4rec": Setting("gru4rec(embedding_dim=128, max_len=200, dropout=0.2, embedding_dropout=0.2)", 40, lr=3e-3),
    "bert4rec": Setting("bert4rec(max_len=100, num_heads=2, dropout=0.1)", 90, lr=3e-3, max_len=100, rounds=10),
    TAUGHT: Setting("sasrec(embedding_dim=128, max_len=200, dropout=0.2, num_heads=2)", 60, rounds=10, soft=0.9),
}
SECOND = (0.25, 0.5, 1.0, 2.0)  #: weights of the second score; the validation part chooses
#: by time most people of the test part are new, and a long training only over-fits those who were there
BY_TIME = {
    "sasrec": Setting("sasrec(max_len=50, dropout=0.2)", 9, lr=4e-3, max_len=50, rounds=3),
    "gru4rec": Setting("gru4rec(max_len=50, dropout=0.2, embedding_dropout=0.2)", 9, lr=4e-3, max_len=50, rounds=3),
    "bert4rec": Setting("bert4rec(max_len=50, num_heads=2, dropout=0.1)", 15, lr=4e-3, max_len=50, rounds=5),
    TAUGHT: Setting("sasrec(max_len=50, dropout=0.2)", 9, lr=4e-3, max_len=50, rounds=3, soft=0.9),
}


class Windows:
    """Each person's training sequence `rounds` times: half of the time its newest items, else a window at random.

    Sequences that fit into `max_len` are always whole. Without this, what lies before the newest `max_len` items (a
    third of all ratings at 200) is never learnt from.
    """

    def __init__(self, dataset: Dataset, max_len: int, rounds: int) -> None:
        self.newest = NextItem(dataset, "train", max_len=max_len, mode="all")
        self.train = dataset.train_histories
        self.max_len = max_len
        self.rounds = rounds

    def __len__(self) -> int:
        return len(self.newest) * self.rounds

    def gather(self, index: Int[Tensor, "B"], generator: torch.Generator | None = None) -> Batch:
        """The batch of `NextItem` of mode "all", histories cut at a random place."""
        batch = self.newest.gather(index % len(self.newest))
        if generator is None:
            raise ValueError("windows are drawn at random: give gather a torch.Generator")
        start, stop = self.train.offsets[batch.user], self.train.offsets[batch.user + 1]
        room = (stop - start - self.max_len - 1).clamp(min=0)  # events before the newest window
        draw = torch.rand(2, len(index), generator=generator, dtype=torch.float64)
        back = torch.where(draw[0] < 0.5, 0, (draw[1] * (room + 1)).long())
        items, times, mask = self.train.take(start, stop - back, self.max_len + 1)
        later = mask[:, :-1] & (times[:, 1:] > times[:, :-1])
        return Batch(
            history=items[:, :-1],
            mask=mask[:, :-1],
            user=batch.user,
            target=items[:, 1:].masked_fill(~later, 0),
        )


class SideBySide(nn.Module):
    """Matchers of one vector a user as one: vectors end to end, so that its score is the weighed sum of theirs."""

    def __init__(self, parts: Sequence[Any], weights: Sequence[float]) -> None:
        super().__init__()
        self.parts: Any = nn.ModuleList(parts)
        self.weights: Tensor
        self.register_buffer("weights", torch.tensor(weights))  # a checkpoint names a teacher by its state
        self.max_len = max(part.max_len for part in parts)  # the evaluation reads so much of each history

    def encode_users(self, batch: Batch) -> tuple[Float[Tensor, "B 1 D"], Bool[Tensor, "B 1"]]:
        """Valid where the first part's is: all read the same history."""
        users = [part.encode_users(batch) for part in self.parts]
        return self._weighed([user for user, _ in users]), users[0][1]

    def encode_positions(self, batch: Batch) -> Float[Tensor, "B L D"]:
        """What a student is taught by: after each item of the history."""
        return self._weighed([part.encode_positions(batch) for part in self.parts])

    def encode_items(self, rows: Int[Tensor, "N"]) -> Float[Tensor, "N D"]:
        return torch.cat([part.encode_items(rows) for part in self.parts], dim=1)

    def _weighed(self, users: Sequence[Tensor]) -> Tensor:
        return torch.cat([weight * user for weight, user in zip(self.weights, users, strict=True)], dim=2)

    def user_for_target(
        self, interests: Float[Tensor, "B 1 D"], valid: Bool[Tensor, "B 1"], target: Float[Tensor, "B D"]
    ) -> Float[Tensor, "B D"]:
        return interests[:, 0]


def setting_of(split: str, name: str) -> Setting:
    """How a model is trained under one of the two protocols."""
    return SETTINGS[name] if split == "legacy" else BY_TIME.get(name, SETTINGS[name])


def together(data: Dataset, split: str, seed: int, out: Path) -> tuple[Any, dict[str, Any]]:
    """The best weights of both parts (a finished training is only read), joined as the validation part likes best."""
    models, minutes = [], 0.0
    for name in TOGETHER.split("+"):
        work = out / f"work-{split}-{name}-{seed}"
        model, row = run(data, setting_of(split, name), seed, work, progress=sys.stderr.isatty())
        file = out / f"{split}.{name}.{seed}.json"
        models.append(model)
        minutes += (json.loads(file.read_text(encoding="utf-8")) if file.exists() else row)["minutes"]
    length = max(model.max_len for model in models)
    found = {w: validation_metrics(SideBySide(models, (1.0, w)), data, length)["ndcg@10"] for w in SECOND}
    best = max(found, key=lambda w: found[w])
    return SideBySide(models, (1.0, best)), {"valid_ndcg@10": found[best], "weight": best, "minutes": round(minutes, 1)}


def run(
    data: Dataset, setting: Setting, seed: int, work: Path, *, teacher: Any = None, progress: bool
) -> tuple[Any, dict[str, Any]]:
    """Train; NDCG@10 on the validation part chooses the epoch. Returns the model and what the run came to."""
    choice = Choice.parse(setting.model, "match")
    model = choice.build(data.spec, seed=seed)
    began = time.process_time()
    if not setting.passes:
        return model.fit(*data.taken("train")), {"minutes": round((time.process_time() - began) / 60, 2)}
    batches = Batches(Windows(data, setting.max_len, setting.rounds), setting.batch, shuffle=True, seed=seed)
    epochs = setting.passes // setting.rounds
    steps = len(batches) * epochs
    loss = match_loss(model, data)  # it also makes the tables dense, for either loss touches every row
    if teacher is not None:
        loss = CatalogueDistillation(teacher, soft=setting.soft)
    result = fit(
        model,
        batches,
        loss,
        epochs=epochs,
        lr=setting.lr,
        clip_norm=1.0,
        schedule=Cosine(steps, warmup=steps // 20, floor=0.02),
        validate=lambda: validation_metrics(model, data, setting.max_len),
        metric="ndcg@10",
        folder=work,
        seed=seed,
        bf16=True,
        progress=progress,
    )
    return model, {
        "valid_ndcg@10": result.best_metric,
        "passes": setting.rounds * ((result.best_epoch or 0) + 1),
        "valid": [round(epoch["ndcg@10"], 4) for epoch in result.history],
        "minutes": round((time.process_time() - began) / 60, 1),
    }


def measured(result: MatchResult) -> dict[str, Any]:
    """NDCG@10 and the hit rate with their 95 % intervals over the people, and the rest of the means."""
    row: dict[str, Any] = {}
    for name in ("ndcg@10", "hit_rate@10", "recall@50"):
        interval = bootstrap_interval(result.metrics[name])
        row[name], row[f"{name} ±"] = round(interval.mean, 4), round(interval.half, 4)
    for part, values in result.slices().items():
        row[f"ndcg@10, {part}"] = [round(float(values["ndcg@10"].mean()), 4), len(values["ndcg@10"])]
    return row


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a line a run."""
    lines = ["| split | model | seed | NDCG@10 | HR@10 | validation | minutes |", "|---|---|---:|---:|---:|---:|---:|"]
    lines += [
        f"| {r['split']} | {r['model']} | {r['seed']} | {r['ndcg@10']:.4f} ± {r['ndcg@10 ±']:.4f} "
        f"| {r['hit_rate@10']:.4f} ± {r['hit_rate@10 ±']:.4f} | {r.get('valid_ndcg@10') or 0:.4f} | {r['minutes']} |"
        for r in rows
    ]
    return "\n".join(lines)


def paired(users: Mapping[str, np.ndarray], split: str) -> list[str]:
    """NDCG@10 of each trained model of seed 0 minus that of the best baseline, on the same people."""
    own = {name.split(".")[1]: v for name, v in users.items() if name.startswith(split) and name.endswith(".0")}
    best = max((b for b in BASELINES if b in own), key=lambda b: own[b].mean(), default=None)
    lines = []
    for name, values in own.items():
        if best is not None and name not in BASELINES:
            test = paired_test(values, own[best])
            low, high = test.interval.low, test.interval.high
            lines.append(f"{split}: {name} − {best}: {test.difference:+.4f} [{low:+.4f}, {high:+.4f}]")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, train what is missing, write the table to standard output."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", nargs="+", choices=("legacy", "time"), default=["legacy", "time"])
    parser.add_argument("--models", nargs="+", choices=[*SETTINGS, TOGETHER], default=[*SETTINGS, TOGETHER])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--out", type=Path, default=Path("ml1m_runs"), help="results.json, per-person figures, work")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    for split, seed, name in product(options.split, options.seeds, options.models):
        file = options.out / f"{split}.{name}.{seed}.json"
        if file.exists():
            continue
        place = options.out / f"data-{split}"
        rule = LeaveLastOut() if split == "legacy" else GlobalTime()
        ready = (place / "dataset.json").exists()
        data = Dataset.open(place) if ready else Dataset.build(movielens.load(options.folder), place, split=rule)
        if name == TOGETHER:
            model, row = together(data, split, seed, options.out)
        else:
            work = options.out / f"work-{split}-{name}-{seed}"
            setting = setting_of(split, name)
            teacher, before = together(data, split, seed, options.out) if setting.soft else (None, {"minutes": 0})
            model, row = run(data, setting, seed, work, teacher=teacher, progress=sys.stderr.isatty())
            row["minutes"] = round(row["minutes"] + before["minutes"], 1)
            row["setting"], row["soft"] = setting.model, setting.soft
        result = evaluate_matchers({name: model}, data, ks=KS)[name]
        np.save(options.out / f"{split}.{name}.{seed}.npy", result.metrics["ndcg@10"])
        row = {"split": split, "model": name, "seed": seed, **measured(result), **row}
        file.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
        sys.stdout.write(f"{row}\n")
        sys.stdout.flush()
    rows = [json.loads(f.read_text(encoding="utf-8")) for f in sorted(options.out.glob("*.*.*.json"))]
    users = {f.stem: np.load(f) for f in sorted(options.out.glob("*.npy"))}
    tests = [line for split in ("legacy", "time") for line in paired(users, split)]
    text = {"command": "python recipes/match/ml1m.py FOLDER", "rows": rows, "paired": tests}
    (options.out / "results.json").write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(table(rows) + "\n" + "\n".join(tests) + "\n")


if __name__ == "__main__":
    main()
