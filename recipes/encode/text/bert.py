"""A small BERT trained here on reviews of IMDB, then on MR, against the same network from scratch.

Run:      python recipes/encode/text/bert.py FOLDER_OF_IMDB FOLDER_OF_MR --out FOLDER
Hardware: 1 CPU core with AMX, 2 GB
Expected: 18 minutes of processor time to read, 7 to compare; .331 of the hidden tokens of held-out reviews are right,
          the most frequent piece everywhere .040. With --tuned-lrs 1e-3 5e-4 --scratch-lrs 1e-3 5e-4 MR over four folds
          is .7507 fine-tuned, .7371 from scratch; with a lower rate the rival is better (docs/text.md). One seed
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
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save_file
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


def sentences(folder: Path) -> tuple[list[str], Tensor, Tensor]:
    """MR: sentences, labels, and the fold of each, as many of both labels in every fold."""
    texts, labels, folds = [], [], []
    for label, side in enumerate(("neg", "pos")):
        lines = gzip.decompress((folder / f"rt-polarity.{side}.gz").read_bytes()).decode("latin-1").splitlines()
        order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(label))
        texts += lines
        labels += [label] * len(lines)
        folds += [int(place) % FOLDS for place in order.argsort()]
    return texts, torch.tensor(labels), torch.tensor(folds)


def network(args: argparse.Namespace, tokens: Tokens, dropout: float, classes: int = 0) -> Bert:
    """The same body for all tasks."""
    return Bert(
        num_tokens=len(tokens), num_classes=classes, embedding_dim=args.dim, num_layers=args.layers,
        num_heads=args.heads, ff_dim=4 * args.dim, dropout=dropout, max_len=args.length, pooling="mean",
    )  # fmt: skip


def pretrain(args: argparse.Namespace, tokens: Tokens, texts: Sequence[str]) -> tuple[Bert, dict[str, float]]:
    """Guess hidden words; the network and its figures on held-out reviews."""
    held = MaskedTexts(tokens, texts[:500], max_len=args.length)
    # most of the text is seen once, so that nothing can be learnt by heart
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


def tuned(
    args: argparse.Namespace, tokens: Tokens, begin: Bert | None, texts: Sequence[str], labels: Tensor, folds: Tensor,
    test: int, lr: float, seed: int,
) -> Tensor:  # fmt: skip
    """Train a network for classes on the other folds; whether each sentence of fold `test` is told rightly."""
    torch.manual_seed(seed)
    model = network(args, tokens, dropout=0.1, classes=2)
    if begin is not None:
        load_weights(model, {**weights_of(model), **weights_of(begin)})
    parts = {}
    for name, chosen in (("train", folds != test), ("test", folds == test)):
        rows = chosen.nonzero().squeeze(1)
        part = TextExamples(tokens, wrapped([texts[i] for i in rows.tolist()]), labels[rows], max_len=args.length)
        parts[name] = TokenBatches(part, 1536, part.lengths.unsqueeze(1), shuffle=name == "train", seed=seed)
    classifier, steps = TextClassifier(model), args.epochs * len(parts["train"])
    fit(
        classifier, parts["train"], CrossEntropy(), epochs=args.epochs, lr=lr, weight_decay=0.01, clip_norm=1.0,
        schedule=Cosine(steps, warmup=steps // 10), seed=seed, bf16=True, progress=False,
    )  # fmt: skip
    with torch.no_grad():
        return torch.cat([classifier(batch).argmax(1) == batch.label for batch in parts["test"].epoch(0)])


def compare(args: argparse.Namespace, tokens: Tokens, pretrained: Bert, folder: Path) -> dict[str, Any]:
    """Accuracy on MR with and without what was learnt, each at its best rate, and the interval of the difference."""
    texts, labels, folds = sentences(folder)
    inner = torch.where(folds == 0, -1, folds)  # rates are chosen without fold 0, on fold 1
    keep = (inner >= 0).nonzero().squeeze(1)
    best: dict[str, float] = {}
    for name, begin, rates in (("pretrained", pretrained, args.tuned_lrs), ("scratch", None, args.scratch_lrs)):
        if len(rates) == 1:
            best[name] = rates[0]
            continue
        found = {
            lr: float(
                tuned(args, tokens, begin, [texts[i] for i in keep.tolist()], labels[keep], folds[keep], 1, lr, 0)
                .double()
                .mean()
            )
            for lr in rates
        }
        best[name] = max(found, key=lambda lr: found[lr])
        say(network=name, accuracy_of_rates=found)
    right: dict[str, list[Tensor]] = {"pretrained": [], "scratch": []}
    for test in [0, 2, 3, 4][: args.folds]:  # fold 1 chose the rates
        for name, begin in (("pretrained", pretrained), ("scratch", None)):
            right[name].append(tuned(args, tokens, begin, texts, labels, folds, test, best[name], test).double())
        say(fold=test, **{name: round(float(parts[-1].mean()), 4) for name, parts in right.items()})
    together = {name: torch.cat(parts).numpy() for name, parts in right.items()}
    difference = paired_test(together["pretrained"].astype(np.float64), together["scratch"].astype(np.float64))
    return {
        **{name: round(float(values.mean()), 4) for name, values in together.items()},
        **{f"{name}_lr": lr for name, lr in best.items()},
        "spread_of_folds": round(statistics.stdev(float(p.mean()) for p in right["pretrained"]), 4),
        "sentences": len(together["scratch"]),
        "difference": str(difference),
    }


def main() -> None:
    """Learn the vocabulary, train, tune, and write the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("imdb", type=Path)
    parser.add_argument("mr", type=Path)
    parser.add_argument("--size", type=int, default=4000, help="pieces of the vocabulary")
    parser.add_argument("--texts", type=int, default=70_000, help="reviews to train on")
    parser.add_argument("--steps", type=int, default=1, help="at least so many; always whole epochs")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--length", type=int, default=48)
    parser.add_argument("--batch", type=int, default=32, help="pieces of a batch")
    parser.add_argument("--share", type=float, default=0.3, help="of the tokens that are hidden in training")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=500, help="steps")
    parser.add_argument("--epochs", type=int, default=3, help="of fine-tuning")
    parser.add_argument("--folds", type=int, default=4, help="of MR that are tested, up to 4")
    parser.add_argument("--tuned-lrs", type=float, nargs="+", default=[1e-3, 5e-4, 3e-4])
    parser.add_argument("--scratch-lrs", type=float, nargs="+", default=[1e-3, 5e-4, 3e-4])
    parser.add_argument("--out", type=Path, required=True, help="where vocabulary, weights and figures go")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    texts = reviews(args.imdb)
    tokens = Tokens.learn(texts[500:6_500], kind="wordpiece", size=args.size, min_count=2, special=SPECIAL)
    tokens.save(args.out / "tokens.json")
    model, figures = pretrain(args, tokens, texts)
    say(**figures)
    save_file(weights_of(model), args.out / "weights.safetensors")
    figures |= compare(args, tokens, model, args.mr)
    (args.out / "result.json").write_text(json.dumps(figures) + "\n", encoding="utf-8")
    say(**figures)


if __name__ == "__main__":
    main()
