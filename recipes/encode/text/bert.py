"""A small BERT trained here, then taught to name categories, against the same network from scratch.

Run:      python recipes/encode/text/bert.py TEXTS --out FOLDER
          TEXTS: the table of MIND's news (id, category, title), whose titles are read and then put in their category;
          or the folder of IMDB's reviews, which are read, with --mr FOLDER_OF_MR whose sentences are judged
Hardware: 1 CPU core, 2 GB
Expected: news, 11 minutes of processor time to read, 25 to compare; .317 of the hidden tokens of other titles right,
          the most frequent piece everywhere .015; with 4,000 labels .585 fine-tuned and .514 from scratch, +.072
          [.065, .078]; with all labels .695 and .690, +.005 [−.000, .009]
          Reviews, 18 minutes of processor time to read, 7 to compare; .331 of the hidden tokens of held-out reviews are
          right, the most frequent piece everywhere .040. With --lrs 1e-3 5e-4 MR over four folds is .7507 fine-tuned,
          .7371 from scratch; with a lower rate the rival is better (docs/text.md). One seed

Of five folds of what is labelled, fold 1 chooses each network's rate, by training on folds 2 to 4. News: fold 0 tests,
whose titles were not read either, with three seeds of fine-tuning. MR: folds 0, 2, 3 and 4 test in turn, of which the
choice of the rate has seen the last three. A finished reading (in FOLDER) is not repeated.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from funnelrec.data.batches import Batches
from funnelrec.encode.text.bert import Bert
from funnelrec.encode.text.classifier import TextClassifier
from funnelrec.encode.text.masking import SPECIAL, MaskedTexts, wrapped
from funnelrec.encode.text.pairs import TokenBatches
from funnelrec.encode.text.tokens import TextExamples, Tokens
from funnelrec.evaluate.significance import paired_test
from funnelrec.learn.checkpoint import load_weights, weights_of
from funnelrec.learn.fit import fit
from funnelrec.learn.losses import CrossEntropy
from funnelrec.learn.schedules import Cosine
from funnelrec.learn.text import NextToken, token_scores

FOLDS = 5


def say(**figures: Any) -> None:
    """A line of progress."""
    sys.stdout.write(json.dumps(figures) + "\n")
    sys.stdout.flush()


def reviews(folder: Path) -> list[str]:
    """The 75,000 reviews, those without a label among them, in a fixed random order."""
    texts = []
    for part in ("train_pos", "train_neg", "train_unsup"):
        path = folder / f"{part}.tsv.zst"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing; give the folder of train_pos, train_neg and train_unsup.tsv.zst"
            )
        with pa.input_stream(str(path), compression="zstd") as stream:
            lines = stream.read().decode("utf-8").splitlines()
        texts += [line.partition("\t")[2].replace("<br />", " ") for line in lines]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    return [texts[i] for i in order]


@dataclass(frozen=True)
class Task:
    """Texts with classes, the fold of each, and which (fold, seed) are tested."""

    texts: list[str]
    labels: Tensor  # (N,) below `classes`
    folds: Tensor  # (N,)
    classes: int
    trials: tuple[tuple[int, int], ...] = ()

    def among(self, keep: Tensor) -> Task:
        """The part where `keep` [N] is true."""
        texts = [self.texts[i] for i in keep.nonzero().squeeze(1).tolist()]
        return Task(texts, self.labels[keep], self.folds[keep], self.classes)


def opinions(folder: Path) -> Task:
    """MR: is the sentence of a good review or of a bad one? As many of both in every fold."""
    texts, labels, folds = [], [], []
    for label, side in enumerate(("neg", "pos")):
        lines = gzip.decompress((folder / f"rt-polarity.{side}.gz").read_bytes()).decode("latin-1").splitlines()
        order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(label))
        texts += lines
        labels += [label] * len(lines)
        folds += [int(place) % FOLDS for place in order.argsort()]
    return Task(texts, torch.tensor(labels), torch.tensor(folds), 2, ((0, 0), (2, 2), (3, 3), (4, 4)))


def news(file: Path) -> Task:
    """MIND: of which category is the piece of news with this title? Each title once, in random order."""
    lines = [line.split("\t") for line in gzip.decompress(file.read_bytes()).decode("utf-8").splitlines()]
    rows = list({title: (category, title) for _, category, title in lines}.values())  # else tests know some titles
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    names = sorted({category for category, _ in rows})
    labels = torch.tensor([names.index(rows[i][0]) for i in order])
    folds = torch.arange(len(rows)) * FOLDS // len(rows)
    return Task([rows[i][1] for i in order], labels, folds, len(names), ((0, 0), (0, 1), (0, 2)))


def network(args: argparse.Namespace, tokens: Tokens, dropout: float, classes: int = 0) -> Bert:
    """The same body for all tasks."""
    return Bert(
        num_tokens=len(tokens), num_classes=classes, embedding_dim=args.dim, num_layers=args.layers,
        num_heads=args.heads, ff_dim=4 * args.dim, dropout=dropout, max_len=args.length, pooling="mean",
    )  # fmt: skip


def pretrain(args: argparse.Namespace, tokens: Tokens, texts: Sequence[str]) -> tuple[Bert, dict[str, float]]:
    """Guess hidden words; the network and its figures on 500 texts that were kept apart."""
    held = MaskedTexts(tokens, texts[:500], max_len=args.length)
    # most of the reviews' text is seen once, so that nothing can be learnt by heart; titles are too few for that
    shown = MaskedTexts(tokens, texts[500 : 500 + args.texts], max_len=args.length, share=args.share)
    train = Batches(shown, args.batch, shuffle=True, drop_last=True)
    valid = TokenBatches(held, 8192, held.lengths.unsqueeze(1))
    torch.manual_seed(0)
    model = network(args, tokens, dropout=0.0)
    begun = time.monotonic()
    rounds = -(-args.steps // len(train))
    say(pieces=len(shown), tokens=int(shown.lengths.sum()), steps_an_epoch=len(train), epochs=rounds)
    fit(
        model, train, NextToken(), epochs=rounds, lr=args.lr, weight_decay=0.01, clip_norm=1.0, bf16=True,
        schedule=Cosine(rounds * len(train), warmup=args.warmup), progress=False,
    )  # fmt: skip
    seconds = time.monotonic() - begun
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        scores = token_scores(model, valid.epoch(0))
    usual = Counter(t for piece in shown.pieces for t in piece.tolist() if t > len(SPECIAL) + 1).most_common(1)[0][0]
    hidden = torch.cat([batch.hidden.flatten() for batch in valid.epoch(0)])
    unigram = float((hidden[hidden > 0] == usual).double().mean())
    figures = {f"masked_{name}": round(value, 4) for name, value in scores.items()}
    figures |= {"unigram_accuracy": round(unigram, 4), "usual": tokens.words[usual], "seconds": round(seconds)}
    figures |= {"tokens_a_second": round(rounds * int(shown.lengths.sum()) / seconds), "steps": rounds * len(train)}
    return model, figures


@dataclass(frozen=True)
class Tuning:
    """How a network is taught: its rate, and how often it goes over as much as all that is labelled."""

    lr: float
    epochs: int

    def __str__(self) -> str:
        return f"{self.lr:g}, {self.epochs} epochs"


def tuned(
    args: argparse.Namespace, tokens: Tokens, begin: Bert | None, task: Task, labelled: int, test: int, how: Tuning,
    seed: int,
) -> Tensor:  # fmt: skip
    """Train a network on `labelled` texts of the other folds; whether each text of fold `test` is told rightly."""
    torch.manual_seed(seed)
    model = network(args, tokens, dropout=0.1, classes=task.classes)
    if begin is not None:
        load_weights(model, {**weights_of(model), **weights_of(begin)})
    others = (task.folds != test).nonzero().squeeze(1)
    mixed = others[torch.randperm(len(others), generator=torch.Generator().manual_seed(0))]
    train = torch.zeros(len(task.texts), dtype=torch.bool).index_fill_(0, mixed[:labelled], True)
    parts = {}
    for name, chosen in (("train", train), ("test", task.folds == test)):
        own = task.among(chosen)
        part = TextExamples(tokens, wrapped(own.texts), own.labels, max_len=args.length)
        parts[name] = TokenBatches(part, 1536, part.lengths.unsqueeze(1), shuffle=name == "train", seed=seed)
    epochs = round(how.epochs * len(others) / int(train.sum()))  # the same number of steps, however few are labelled
    classifier, steps = TextClassifier(model), epochs * len(parts["train"])
    fit(
        classifier, parts["train"], CrossEntropy(), epochs=epochs, lr=how.lr, weight_decay=0.01, clip_norm=1.0,
        schedule=Cosine(steps, warmup=steps // 10), seed=seed, bf16=True, progress=False,
    )  # fmt: skip
    with torch.no_grad():
        return torch.cat([classifier(batch).argmax(1) == batch.label for batch in parts["test"].epoch(0)])


def compare(args: argparse.Namespace, tokens: Tokens, pretrained: Bert, task: Task, labelled: int) -> dict[str, Any]:
    """Accuracy with and without what was learnt, each taught as suits it best, and the interval of the difference."""
    networks = {"pretrained": pretrained, "scratch": None}
    others = task.among(task.folds != 0)
    best: dict[str, Tuning] = {}
    tried: dict[str, dict[str, float]] = {}
    for name, begin in networks.items():
        found = {
            how: float(tuned(args, tokens, begin, others, labelled, 1, how, 0).double().mean())
            for how in (Tuning(lr, epochs) for lr, epochs in product(args.lrs, args.epochs))
        }
        best[name] = max(found, key=lambda how: found[how])
        tried[name] = {str(how): round(accuracy, 4) for how, accuracy in found.items()}
        say(labelled=labelled, network=name, tried=tried[name])
    right: dict[str, dict[int, list[Tensor]]] = {name: {} for name in networks}
    for test, seed in task.trials:
        accuracy = {}
        for name, begin in networks.items():
            told = tuned(args, tokens, begin, task, labelled, test, best[name], seed).double()
            right[name].setdefault(test, []).append(told)
            accuracy[name] = round(float(told.mean()), 4)
        say(labelled=labelled, fold=test, seed=seed, **accuracy)
    # a text's figure is its mean over the seeds that were tested on it
    together = {name: torch.cat([torch.stack(f).mean(0) for f in of.values()]).numpy() for name, of in right.items()}
    difference = paired_test(together["pretrained"], together["scratch"])
    trials = {name: [float(told.mean()) for f in of.values() for told in f] for name, of in right.items()}
    return {
        "labelled": labelled,
        **{name: round(float(values.mean()), 4) for name, values in together.items()},
        **{f"{name}_taught": str(how) for name, how in best.items()},
        **{f"{name}_spread_of_trials": round(statistics.stdev(values), 4) for name, values in trials.items()},
        "tried": tried,
        "texts": len(together["scratch"]),
        "difference": str(difference),
    }


#: what differs between short titles and long reviews
NEWS = {
    "size": 8000,
    "lexicon": 50_000,
    "steps": 6000,
    "batch": 128,
    "share": 0.3,
    "warmup": 300,
    "epochs": [1, 5],
    "lrs": [1e-3, 5e-4],
    "labelled": [4000, 100_000],
}
REVIEWS = {
    "size": 4000,
    "lexicon": 6_000,
    "steps": 1,
    "batch": 32,
    "share": 0.3,
    "warmup": 500,
    "epochs": [3],
    "lrs": [1e-3, 5e-4, 3e-4],
    "labelled": [100_000],
}


def main() -> None:
    """Learn the vocabulary, read, compare, and write the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="table of news, or folder of reviews")
    parser.add_argument("--mr", type=Path, help="folder of MR, for the reviews")
    parser.add_argument("--size", type=int, help="pieces of the vocabulary")
    parser.add_argument("--lexicon", type=int, help="texts whose words make the vocabulary")
    parser.add_argument("--texts", type=int, default=70_000, help="texts to read at most")
    parser.add_argument("--steps", type=int, help="at least so many; always whole epochs")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--length", type=int, default=48)
    parser.add_argument("--batch", type=int, help="pieces of a batch")
    parser.add_argument("--share", type=float, help="of the tokens that are hidden in training")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, help="steps")
    parser.add_argument("--epochs", type=int, nargs="+", help="of fine-tuning, to choose from; the same for both")
    parser.add_argument("--lrs", type=float, nargs="+", help="rates of fine-tuning, likewise")
    parser.add_argument("--labelled", type=int, nargs="+", help="labelled texts to learn from, at most")
    parser.add_argument("--out", type=Path, required=True, help="where vocabulary, weights and figures go")
    source = parser.parse_known_args()[0].source
    if not source.exists():
        parser.error(f"{source} does not exist; give the table of news or the folder of reviews")
    of_news = source.is_file()
    parser.set_defaults(**(NEWS if of_news else REVIEWS))
    args = parser.parse_args()
    if of_news != (args.mr is None):
        parser.error(f"{source} is {'a file, so of news: leave --mr out' if of_news else 'a folder, so give --mr'}")
    task = news(args.source) if of_news else opinions(args.mr)
    texts = task.among(task.folds != 0).texts if of_news else reviews(args.source)
    args.out.mkdir(parents=True, exist_ok=True)
    words, weights, read = (args.out / name for name in ("tokens.json", "weights.safetensors", "reading.json"))
    if read.exists():  # a finished reading is not repeated
        tokens, figures = Tokens.open(words), json.loads(read.read_text(encoding="utf-8"))
        model = network(args, tokens, dropout=0.0)
        load_weights(model, load_file(weights))
    else:
        tokens = Tokens.learn(
            texts[500 : 500 + args.lexicon], kind="wordpiece", size=args.size, min_count=2, special=SPECIAL
        )
        tokens.save(words)
        model, figures = pretrain(args, tokens, texts)
        save_file(weights_of(model), weights)
        read.write_text(json.dumps(figures) + "\n", encoding="utf-8")
    say(**figures)
    told = []
    for labelled in args.labelled:
        told.append(compare(args, tokens, model, task, labelled))
        say(**told[-1])
    (args.out / "result.json").write_text(json.dumps({**figures, "told": told}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
