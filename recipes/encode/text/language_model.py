"""Language models: what an LSTM foretells of Tiny Shakespeare and of the Penn Treebank, beside counts of the same text.

Run:      python recipes/encode/text/language_model.py DATA [--corpus characters|words] [--cell lstm]
Hardware: 1 CPU core; characters 10.3 minutes on a core shared with twenty other processes, words 13 of processor time
Expected: characters: 1.5076 nats (one seed; 5-gram counts 1.6688), on the part that also chose the epoch, as there is
          no other. Words: test perplexity 107.2 (one seed; 3-gram counts 188.7)

DATA holds tinyshakespeare/input.txt.gz (its last tenth is the validation part) and ptb/ptb.{train,valid,test}.txt.gz.
"""

from __future__ import annotations

import argparse
import gzip
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from funnelrec.data.batches import Batches
from funnelrec.encode.text.count_model import CountModel
from funnelrec.encode.text.language_model import Carried, LanguageModel, StreamExamples
from funnelrec.encode.text.tokens import Tokens
from funnelrec.learn.fit import fit
from funnelrec.learn.losses import CrossEntropy, Loss, SampledSoftmax
from funnelrec.learn.samplers import Popularity
from funnelrec.learn.schedules import Cosine


@dataclass(frozen=True)
class Corpus:
    """Three streams of token rows; `test` is the validation part where there is no other."""

    tokens: Tokens
    train: Tensor
    valid: Tensor
    test: Tensor
    order: int  #: of the best counts


@dataclass(frozen=True)
class Setting:
    """A model's size and how it is trained."""

    embedding_dim: int
    hidden_dim: int
    num_layers: int
    dropout: float
    token_dropout: float
    tied: bool
    lr: float
    columns: int
    window: int
    epochs: int
    negatives: int | None = None  #: tokens in the softmax of training; absent: all


SETTINGS = {
    "characters": Setting(64, 512, 1, 0.1, 0.0, False, 2e-3, 32, 64, 6),
    "words": Setting(256, 256, 2, 0.3, 0.1, True, 4e-3, 64, 35, 20, 1024),
}


def characters(data: Path) -> Corpus:
    """Tiny Shakespeare, letter by letter; the last tenth is kept for validation."""
    with gzip.open(data / "tinyshakespeare" / "input.txt.gz", "rt", encoding="utf-8") as file:
        text = file.read()
    cut = int(len(text) * 0.9)
    tokens = Tokens.learn([text[:cut]], kind="characters")
    train, valid = tokens.stream(text[:cut]), tokens.stream(text[cut:])
    return Corpus(tokens, train, valid, valid, order=5)


def words(data: Path) -> Corpus:
    """The Penn Treebank as Mikolov prepared it: 10,000 words, ends of sentences and <unk> (<rare>) too."""
    parts = []
    for part in ("train", "valid", "test"):
        with gzip.open(data / "ptb" / f"ptb.{part}.txt.gz", "rt", encoding="utf-8") as file:
            parts.append(file.read().replace("\n", " <eos> ").replace("<unk>", "<rare>"))
    tokens = Tokens.learn([parts[0]], kind="spaces", lower=False)
    train, valid, test = (tokens.stream(part) for part in parts)
    return Corpus(tokens, train, valid, test, order=3)


def train(corpus: Corpus, setting: Setting, cell: str, seed: int) -> tuple[LanguageModel, float]:
    """The trained model and its minutes."""
    torch.manual_seed(seed)
    s = setting
    model = LanguageModel(
        num_tokens=len(corpus.tokens),
        cell=cell,
        embedding_dim=s.embedding_dim,
        hidden_dim=s.hidden_dim,
        num_layers=s.num_layers,
        dropout=s.dropout,
        token_dropout=s.token_dropout,
        tied=s.tied,
    )
    stream = StreamExamples(corpus.train, s.columns, s.window)

    def validate() -> dict[str, float]:
        nats = math.log(model.perplexity(corpus.valid, columns=10))
        sys.stdout.write(f"  {time.strftime('%H:%M:%S')} validation {nats:.4f} nats\n")
        sys.stdout.flush()
        return {"nats": nats}

    loss: Loss = CrossEntropy()
    if s.negatives is not None:
        counts = torch.bincount(corpus.train, minlength=len(corpus.tokens))
        loss = SampledSoftmax(s.negatives, sampler=Popularity(counts))
    batches = Batches(stream, s.columns)
    result = fit(
        Carried(model, s.columns),
        batches,
        loss,
        epochs=s.epochs,
        lr=s.lr,
        schedule=Cosine(len(batches) * s.epochs, warmup=len(batches) // 4, floor=0.02),
        clip_norm=1.0,
        validate=validate,
        metric="nats",
        minimise=True,
        bf16=True,
        seed=seed,
        progress=False,
    )
    return model, result.seconds / 60


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, train, write the figures to standard output."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--corpus", choices=sorted(SETTINGS), default="characters")
    parser.add_argument("--cell", choices=("rnn", "lstm", "gru"), default="lstm")
    parser.add_argument("--epochs", type=int, help="others than the setting's")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    say = sys.stdout.write
    corpus = {"characters": characters, "words": words}[options.corpus](options.data)
    say(
        f"{options.corpus}: {len(corpus.tokens)} tokens, {len(corpus.train):,} to train, {len(corpus.test):,} to test\n"
    )
    for order in range(1, corpus.order + 2):
        if len(corpus.tokens) ** order < 2**62:
            counts = CountModel(corpus.train, num_tokens=len(corpus.tokens), order=order)
            perplexity = counts.perplexity(corpus.test)
            say(f"{order}-gram counts (Witten-Bell): {math.log(perplexity):.4f} nats, perplexity {perplexity:.1f}\n")
    setting = SETTINGS[options.corpus]
    if options.epochs:
        setting = Setting(**{**setting.__dict__, "epochs": options.epochs})
    model, minutes = train(corpus, setting, options.cell, options.seed)
    perplexity = model.perplexity(corpus.test)
    size = sum(p.numel() for p in model.parameters())
    say(f"{options.cell}, {size:,} parameters, {minutes:.1f} minutes: ")
    say(f"{math.log(perplexity):.4f} nats, perplexity {perplexity:.2f}\n")
    written = model.sample(corpus.train[None, :50], 300, torch.Generator().manual_seed(0), temperature=0.8)
    say("\n".join(corpus.tokens.text(written)) + "\n")


if __name__ == "__main__":
    main()
