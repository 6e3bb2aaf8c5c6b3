"""Word vectors from film reviews: word2vec beside the factors of a matrix of mutual information, on the same text.

Run:      python recipes/encode/text/word_vectors.py DATA [--out FOLDER] [--reviews 25000]
Hardware: 1 CPU core
Expected: WS-353 .540 by PPMI-SVD and .549 by word2vec, RG-65 .430 and .617, analogies .209 and .174; 145 s of processor
          time. --reviews 74996 --epochs 5: .579 and .571, .683 and .707, .324 and .389; 473 s

DATA holds imdb/train_{pos,neg,unsup}.tsv.zst and word-similarity/EN-{WS-353-ALL,RG-65}.txt, questions-words.txt. Both
kinds of vectors have the same words (those of the most frequent ones), the same window and the same width. The factors
are those of Levy, Goldberg, Dagan (TACL 2015): positive pointwise mutual information, near words counting more,
contexts smoothed by count^.75, and U S^½ of its singular value decomposition. Reviews have no labels here.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor

from funnelrec.core.nn.skipgram import SkipGram
from funnelrec.core.shapes import FIRST_KNOWN
from funnelrec.encode.text.tokens import Tokens
from funnelrec.encode.text.word2vec import Words, learn_words

TRAIN = SkipGram(
    embedding_dim=100,
    window=5,
    num_negatives=5,
    subsample=1e-4,
    ordered=True,
    shared=64,
    epochs=6,
    lr=1.0,
    batch_size=1024,
)


def reviews(folder: Path, most: int) -> list[str]:
    """Texts without markup; first those that have a rating, half of them good."""
    texts = []
    for part in ("pos", "neg", "unsup"):
        with pa.CompressedInputStream(pa.OSFile(str(folder / f"train_{part}.tsv.zst")), "zstd") as file:
            lines = file.read().decode("utf-8").split("\n")
        texts += [line.split("\t", 1)[1].replace("<br />", " ") for line in lines if line]
    return texts[:most]


def mutual_information_factors(texts: Tensor, rows: Tensor, width: int, window: int) -> Tensor:
    """U S^½ of the positive mutual information of words 0 … V - 1, [V, width]."""
    count = int(rows.max()) + 1
    together = torch.zeros(count * count)
    for apart in range(1, window + 1):
        same = texts[apart:] == texts[:-apart]
        pair = rows[apart:][same] * count + rows[:-apart][same]
        weight = torch.tensor((window + 1 - apart) / window)
        for part in torch.split(pair, 2**20):
            together.index_add_(0, part, weight.expand(len(part)))
    matrix = together.view(count, count)
    matrix = matrix + matrix.T
    context = matrix.sum(0) ** 0.75
    matrix.div_(matrix.sum(1, keepdim=True).clamp(min=1e-9)).div_(context / context.sum())
    matrix.log_().clamp_(min=0)
    u, s, _ = torch.svd_lowrank(matrix, q=width + 10, niter=3)
    return u[:, :width] * s[:width].sqrt()


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, learn both kinds, write the table to standard output."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, help="folder for the vectors of word2vec")
    parser.add_argument("--reviews", type=int, default=25_000, help="at most 74,996")
    parser.add_argument("--words", type=int, default=12_000, help="how many, the most frequent ones")
    parser.add_argument("--epochs", type=int, default=TRAIN.epochs)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    say = sys.stdout.write
    corpus = reviews(options.data / "imdb", options.reviews)
    tokens = Tokens.learn(corpus, size=options.words + FIRST_KNOWN)
    lists = tokens.lists(corpus)
    rows = torch.tensor([r for row in lists for r in row])
    texts = torch.repeat_interleave(torch.arange(len(lists)), torch.tensor([len(row) for row in lists]))
    known = rows >= FIRST_KNOWN
    say(f"{len(corpus):,} reviews, {len(rows):,} words, {float(known.float().mean()):.3f} of them known\n")
    began = time.process_time()
    factors = mutual_information_factors(texts[known], rows[known] - FIRST_KNOWN, TRAIN.embedding_dim, TRAIN.window)
    counts = torch.bincount(rows[known] - FIRST_KNOWN)
    found = {"PPMI-SVD": (Words(tuple(tokens.words[FIRST_KNOWN:]), factors, counts), time.process_time() - began)}
    began = time.process_time()
    train = SkipGram(**{**TRAIN.__dict__, "epochs": options.epochs})
    found["word2vec"] = (learn_words(tokens, texts, rows, train), time.process_time() - began)
    if options.out is not None:
        found["word2vec"][0].save(options.out)
    folder = options.data / "word-similarity"
    pairs = {}
    for name in ("WS-353-ALL", "RG-65"):
        lines = (folder / f"EN-{name}.txt").read_text(encoding="utf-8").split("\n")
        pairs[name] = [(a.lower(), b.lower(), float(s)) for a, b, s in (line.split() for line in lines if line.strip())]
    lines = (folder / "questions-words.txt").read_text(encoding="utf-8").lower().split("\n")
    questions = [(a, b, c, d) for a, b, c, d in (line.split() for line in lines if line and line[0] != ":")]
    say("| vectors | WS-353 | pairs | RG-65 | pairs | analogies | questions | CPU s |\n")
    say("|---|---|---|---|---|---|---|---|\n")
    for name, (words, seconds) in found.items():
        cells = [f"{value:.3f}" for p in pairs.values() for value in words.similarity(p)]
        cells += [f"{value:.3f}" for value in words.analogies(questions)]
        say(f"| {name} | {' | '.join(cells)} | {seconds:.0f} |\n")
    for word in ("good", "actor", "car", "king"):
        near = ", ".join(f"{w} {c:.2f}" for w, c in found["word2vec"][0].neighbours(word, 6))
        say(f"{word}: {near}\n")


if __name__ == "__main__":
    main()
