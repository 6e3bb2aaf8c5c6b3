"""Distillation on MNIST: a small network, 500 labels, 7,500 pictures without, and a teacher that has seen more.

Run:      python recipes/encode/image/distil.py FOLDER_OF_THE_IDX_FILES [--seeds 0 1 2 3 4] [--out FOLDER]
Hardware: 1 CPU core, 2 GB
Expected: with the teacher at least 3 points above the labels alone; the measured table is docs/images.md

Teacher: LeNet-5 on 8,000 labelled digits. Student: an MLP 784-30-10 on 500 of them, the other 7,500 without a label:
| student        | learns from                                                                              |
|----------------|------------------------------------------------------------------------------------------|
| labels         | the 500 labels                                                                           |
| hard           | the 500 labels, and the teacher's likeliest class of the 7,500                           |
| soft           | the 500 labels, and the teacher's probabilities at T = 4 of all 8,000, share 0.9         |
| hard, no 3     | as `hard`, all pictures of a 3 taken away                                                |
| soft, no 3     | as `soft`, all pictures of a 3 taken away                                                |
In the last two the bias of class 3 is raised until as many of 1,000 validation digits are called a 3 as are one: what
is then seen of the 3s comes from the wrong probabilities, which say which 8s look like a 3.
All have the same number of steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.data.augment import Augment
from funnelrec.data.batches import Batches
from funnelrec.data.images import ImageExamples, Images
from funnelrec.data.sources import images as sources
from funnelrec.encode.image.classifier import Classifier, pixel_statistics
from funnelrec.encode.image.lenet import LeNet
from funnelrec.evaluate.significance import paired_test
from funnelrec.learn.distil import Distillation
from funnelrec.learn.fit import fit
from funnelrec.learn.losses import CrossEntropy, Loss
from funnelrec.learn.schedules import Cosine
from funnelrec.learn.transfer import Training, predict, train

STUDENTS = ("labels", "hard", "soft", "hard, no 3", "soft, no 3")
STEPS, BATCH, LABELLED, ALL = 800, 100, 500, 8000


class Student(nn.Module):
    """784-30-10."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(784, 30), nn.ReLU(), nn.Linear(30, 10))

    def forward(self, batch: Batch) -> Tensor:
        """Logits [B, 10]."""
        logits: Tensor = self.layers(batch.image.float() / 255)
        return logits


def learn(images: Images, rows: Tensor, labels: Tensor, loss: Loss, seed: int) -> Student:
    """A student after STEPS steps on some rows with these labels."""
    given = images.labels.clone()
    given[rows] = labels
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Student()
    examples = ImageExamples(Images(images.pixels, given, images.classes), rows)
    batches = Batches(examples, BATCH, shuffle=True, seed=seed, drop_last=True)
    epochs = STEPS // len(batches)
    schedule = Cosine(epochs * len(batches), warmup=100)
    fit(model, batches, loss, epochs=epochs, lr=5e-3, weight_decay=1e-3, schedule=schedule, seed=seed, progress=False)
    return model


@torch.no_grad()
def guesses(model: Student, images: Images, rows: Tensor, raised: float = 0.0) -> Tensor:
    """The likeliest class of each row; `raised` is added to the logit of class 3."""
    logits = model(Batch(image=images.pixels[rows]))
    logits[:, 3] += raised
    return torch.argmax(logits, 1)


def run(images: Images, seed: int, students: Sequence[str] = STUDENTS) -> dict[str, float]:
    """Test accuracy of the teacher and of these students; for those without 3s also the share of the 3s they see."""
    order = images.rows(0)[torch.randperm(60_000, generator=torch.Generator().manual_seed(seed))]
    rows, valid, test = order[:ALL], order[ALL : ALL + 1000], images.rows(2)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        teacher = Classifier(LeNet(), *pixel_statistics(images.pixels))
    train(teacher, images, rows, Training(6, 3e-3, augment=Augment(crop=2), bf16=False, seed=seed))
    truth = images.labels[test]
    found = {"teacher": float((predict(teacher, images, test).argmax(1) == truth).double().mean())}
    called = predict(teacher, images, rows).argmax(1)
    known = torch.arange(ALL) < LABELLED
    labels = images.labels[rows]
    soft = Distillation(teacher, temperature=4.0, soft=0.9, hard=CrossEntropy())
    pseudo, partly = torch.where(known, labels, called), torch.where(known, labels, -1)
    no3 = labels != 3
    setups: dict[str, tuple[Any, Tensor, Loss]] = {
        "labels": (rows[known], labels[known], CrossEntropy()),
        "hard": (rows, pseudo, CrossEntropy()),
        "soft": (rows, partly, soft),
        "hard, no 3": (rows[no3], pseudo[no3], CrossEntropy()),
        "soft, no 3": (rows[no3], partly[no3], soft),
    }
    for name in students:
        own, given, loss = setups[name]
        student = learn(images, own, given, loss, seed)
        raised = _raise(student, images, valid) if name.endswith("no 3") else 0.0
        guess = guesses(student, images, test, raised)
        found[name] = float((guess == truth).double().mean())
        if name.endswith("no 3"):
            found[f"3s seen, {name}"] = float((guess[truth == 3] == 3).double().mean())
    return found


def _raise(student: Student, images: Images, valid: Tensor) -> float:
    """What to add to the logit of class 3 so that as many validation digits are called a 3 as are one."""
    wanted = int((images.labels[valid] == 3).sum())
    low, high = 0.0, 50.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if int((guesses(student, images, valid, middle) == 3).sum()) < wanted else (low, middle)
        )
    return high


def table(rows: Sequence[dict[str, float]]) -> str:
    """Markdown: mean ± deviation over seeds, and the paired difference from the labels alone."""
    lines = ["| network | test accuracy | test 3s seen | against the labels alone |", "|---|---:|---:|---:|"]
    base = torch.tensor([row["labels"] for row in rows], dtype=torch.float64).numpy()
    for name in ("teacher", *STUDENTS):
        values = [row[name] for row in rows if name in row]
        if not values:
            continue
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        threes = [row[f"3s seen, {name}"] for row in rows if name in row] if name.endswith("no 3") else []
        seen = f"{statistics.mean(threes):.3f}" if threes else ""
        gain = ""
        if name in ("hard", "soft") and len(rows) > 1:
            test = paired_test(torch.tensor(values, dtype=torch.float64).numpy(), base)
            gain = f"{test.difference:+.4f} [{test.interval.low:+.4f}, {test.interval.high:+.4f}]"
        lines.append(f"| {name} | {statistics.mean(values):.4f}{spread} | {seen} | {gain} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, train everything, write the table to standard output."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", type=Path, help="folder of the four idx files")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    parser.add_argument("--out", type=Path, default=Path("distil_runs"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    images = sources.mnist(options.source)
    file = options.out / "results.json"
    rows: dict[str, dict[str, float]] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for seed in options.seeds:
        if str(seed) not in rows:
            rows[str(seed)] = run(images, seed, options.students)
            file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(table(list(rows.values())) + "\n")


if __name__ == "__main__":
    main()
