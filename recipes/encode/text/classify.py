"""Sentence polarity (MR): averaging, recurrence and convolution over words, each beside a linear model of word pairs.

Run:      python recipes/encode/text/classify.py DATA [--folds 10] [--vectors FOLDER] [--models average lstm ...]
Hardware: 1 CPU core; 1 to 20 processor seconds a model and fold
Expected: fold 0 (--folds 1), no vectors: NB logistic .7826, average .7779, lstm .7638, bilstm .7713, textcnn .7591,
          student alone .7769, distilled .7713 (with .094 of the teacher's parameters). No network that begins at
          random passes the linear model; the differences between them are within the error of one fold. Folds 0 to 3,
          vectors of 74,996 reviews: textcnn .762, textcnn + vectors .786, NB logistic .783, distilled .772

DATA holds mr-rt-polarity/rt-polarity.{pos,neg}.gz: 5,331 good and 5,331 bad sentences. There is no official test part,
so there are ten folds, drawn once; a fold is tested by models of the rest, of which a tenth chooses the epoch. The
vocabulary is that of the training sentences alone. One fold has a standard error of 1.2 points.
--vectors: what word_vectors.py wrote; the rows marked "+ vectors" begin from them.
"distilled" is averaging with a tenth of the width, taught by the convolution (with vectors, if there are any) beside
the labels. "NB logistic" is Wang and Manning (ACL 2012) without the SVM: words and pairs of neighbours, each present or
not, times the log of the ratio of its shares in the two classes, into a logistic regression.
"""

from __future__ import annotations

import argparse
import gzip
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funnelrec.data.batches import Batches
from funnelrec.encode.text.average import WordAverage
from funnelrec.encode.text.classifier import TextClassifier, begin_from
from funnelrec.encode.text.rnn import TextRNN
from funnelrec.encode.text.textcnn import TextCNN
from funnelrec.encode.text.tokens import TextExamples, Tokens
from funnelrec.encode.text.word2vec import Words
from funnelrec.learn.distil import Distillation
from funnelrec.learn.fit import fit
from funnelrec.learn.losses import CrossEntropy, Loss
from funnelrec.learn.schedules import Cosine

FOLDS = 10


@dataclass(frozen=True)
class Setting:
    """A network, and how it is trained."""

    network: type[nn.Module]
    options: dict[str, object]
    lr: float
    epochs: int


SETTINGS = {
    "average": Setting(WordAverage, {"embedding_dim": 100}, lr=5e-3, epochs=5),
    "lstm": Setting(TextRNN, {"merge": "forward"}, lr=2e-3, epochs=4),
    "bilstm": Setting(TextRNN, {}, lr=2e-3, epochs=4),
    "textcnn": Setting(TextCNN, {}, lr=1e-3, epochs=6),
}
TEACHER = "textcnn"
STUDENT = Setting(WordAverage, {"embedding_dim": 10}, lr=2e-2, epochs=6)


def sentences(data: Path) -> tuple[list[str], Tensor]:
    """The texts and their classes, 1 for good."""
    texts, labels = [], []
    for label, name in enumerate(("neg", "pos")):
        with gzip.open(data / "mr-rt-polarity" / f"rt-polarity.{name}.gz", "rb") as file:
            lines = [line for line in file.read().decode("latin-1").split("\n") if line.strip()]
        texts += lines
        labels += [label] * len(lines)
    return texts, torch.tensor(labels)


class Fold:
    """One split: train, choose the epoch, test."""

    def __init__(self, texts: list[str], labels: Tensor, number: int) -> None:
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
        test, rest = order[number::FOLDS], torch.cat([order[i::FOLDS] for i in range(FOLDS) if i != number])
        parts = {"train": rest[len(rest) // 10 :], "valid": rest[: len(rest) // 10], "test": test}
        self.texts = {name: [texts[i] for i in rows.tolist()] for name, rows in parts.items()}
        self.labels = {name: labels[rows] for name, rows in parts.items()}
        self.number = number
        self.tokens = Tokens.learn(self.texts["train"], kind="spaces", size=100_000)
        self.examples = {n: TextExamples(self.tokens, self.texts[n], self.labels[n]) for n in parts}

    @torch.no_grad()
    def accuracy(self, model: nn.Module, part: str) -> float:
        """The share of sentences that get their class."""
        model.eval()
        batches = Batches(self.examples[part], 256).epoch(0)
        return sum(int((model(b).argmax(1) == b.label).sum()) for b in batches) / len(self.examples[part])

    def train(self, setting: Setting, vectors: Words | None = None, loss: Loss | None = None) -> nn.Module:
        """The network after its best epoch."""
        torch.manual_seed(self.number)
        network: nn.Module = setting.network(num_tokens=len(self.tokens), **setting.options)
        if vectors is not None:
            begin_from(network.get_submodule("table"), *vectors.rows_in(self.tokens))  # type: ignore[arg-type]
        model = TextClassifier(network)
        batches = Batches(self.examples["train"], 50, shuffle=True, seed=self.number)
        fit(
            model,
            batches,
            CrossEntropy() if loss is None else loss,
            epochs=setting.epochs,
            lr=setting.lr,
            schedule=Cosine(len(batches) * setting.epochs),
            clip_norm=5.0,
            validate=lambda: {"accuracy": self.accuracy(model, "valid")},
            metric="accuracy",
            bf16=True,
            seed=self.number,
            progress=False,
        )
        return model

    def linear(self) -> float:
        """The accuracy of the logistic regression over words and pairs."""
        grams: dict[str, int] = {}
        lists = {}
        for part in ("train", "test"):
            lists[part] = []
            for text in self.texts[part]:
                words = text.split()
                found = {*words, *(f"{a} {b}" for a, b in pairwise(words))}
                if part == "train":
                    found = {grams.setdefault(gram, len(grams)) for gram in found}
                lists[part].append(sorted(found if part == "train" else {grams[g] for g in found if g in grams}))
        flat = {p: torch.tensor([g for row in rows for g in row]) for p, rows in lists.items()}
        starts = {p: torch.tensor([0, *np.cumsum([len(r) for r in rows[:-1]])]) for p, rows in lists.items()}
        good = torch.repeat_interleave(self.labels["train"], torch.tensor([len(r) for r in lists["train"]])) == 1
        shares = [1 + torch.bincount(flat["train"][rows], minlength=len(grams)).float() for rows in (good, ~good)]
        ratio = (shares[0] / shares[0].sum()).log() - (shares[1] / shares[1].sum()).log()
        weight, bias = torch.ones(len(grams), requires_grad=True), torch.zeros((), requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=40, history_size=10, line_search_fn="strong_wolfe")

        def logits(part: str) -> Tensor:
            return (
                F.embedding_bag(flat[part], (weight * ratio).unsqueeze(1), starts[part], mode="sum").squeeze(1) + bias
            )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.binary_cross_entropy_with_logits(logits("train"), self.labels["train"].float(), reduction="sum")
            loss = loss + weight.square().sum() / 2
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
        with torch.no_grad():
            return float(((logits("test") > 0) == (self.labels["test"] == 1)).float().mean())


def parameters(model: nn.Module) -> int:
    """How many numbers a model learns."""
    return sum(p.numel() for p in model.parameters())


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, train, write the table to standard output."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--folds", type=int, default=FOLDS, help="of the ten, the first so many")
    parser.add_argument("--vectors", type=Path, help="folder that word_vectors.py --out wrote")
    parser.add_argument("--models", nargs="+", choices=sorted(SETTINGS), default=list(SETTINGS))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    texts, labels = sentences(options.data)
    vectors = None if options.vectors is None else Words.open(options.vectors)
    found: dict[str, list[float]] = {}
    spent: dict[str, float] = {}
    size: dict[str, int] = {}

    def note(name: str, value: float, began: float, model: nn.Module | None = None) -> None:
        found.setdefault(name, []).append(value)
        spent[name] = spent.get(name, 0.0) + time.process_time() - began
        size[name] = 0 if model is None else parameters(model)

    for number in range(options.folds):
        fold = Fold(texts, labels, number)
        began = time.process_time()
        note("NB logistic", fold.linear(), began)
        teacher = None
        for name in options.models:
            for begin in [None] if vectors is None else [None, vectors]:
                began = time.process_time()
                model = fold.train(SETTINGS[name], begin)
                label = name if begin is None else f"{name} + vectors"
                note(label, fold.accuracy(model, "test"), began, model)
                teacher = model if name == TEACHER else teacher
        if teacher is not None:
            began = time.process_time()
            loss = Distillation(teacher, temperature=2.0, soft=0.7, hard=CrossEntropy())
            for name, taught in (("student alone", None), ("distilled", loss)):
                model = fold.train(STUDENT, None, taught)
                note(name, fold.accuracy(model, "test"), began, model)
        sys.stdout.write(f"fold {number}: {', '.join(f'{n} {v[-1]:.4f}' for n, v in found.items())}\n")
        sys.stdout.flush()
    sys.stdout.write("| model | accuracy | parameters | CPU s a fold |\n|---|---|---|---|\n")
    for name, values in found.items():
        spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
        sys.stdout.write(
            f"| {name} | {np.mean(values):.4f}{spread} | {size[name]:,} | {spent[name] / len(values):.0f} |\n"
        )


if __name__ == "__main__":
    main()
