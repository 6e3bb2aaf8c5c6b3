"""MNIST: LeNet-5 and a small capsule network, 60,000 digits to learn from and 10,000 to test on.

Run:      python recipes/encode/image/mnist.py FOLDER_OF_THE_IDX_FILES [--models lenet capsnet capsnet_1] [--out FOLDER]
Hardware: 1 CPU core with AVX-512 and bfloat16, 2 GB
Expected: the bands of SETTINGS; the measured table is docs/images.md

capsnet is the paper's network with an eighth of the maps (32) and a quarter of the primary types (8, that is 288
capsules), three iterations of routing; capsnet_1 the same with one. Shifts of 1 pixel (LeNet 2), AdamW, one cycle of
the rate, the last epoch counts. The full network (8.2 million parameters; published errors .25 % with reconstruction,
.34 to .35 % without) is `--models capsnet_full`, for a GPU.
Pictures: OUT/reconstructions.png, digits and what their capsules draw; OUT/dimensions.png, one number of a capsule
changed at a time; OUT/confusion.png.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from funnelrec.data.augment import Augment
from funnelrec.data.batches import Batches
from funnelrec.data.images import ImageExamples, Images
from funnelrec.data.sources import images as sources
from funnelrec.encode.image.capsnet import CapsNet
from funnelrec.encode.image.classifier import Classifier, pixel_statistics
from funnelrec.encode.image.lenet import LeNet
from funnelrec.evaluate import pictures, plots
from funnelrec.evaluate.significance import bootstrap_interval
from funnelrec.learn.fit import fit
from funnelrec.learn.margin import MarginLoss, margin
from funnelrec.learn.schedules import Cosine
from funnelrec.learn.transfer import Training, predict, train

SHIFT = Augment(crop=2)


@dataclass(frozen=True)
class Setting:
    """How one network is built and trained, and the accuracy that it must reach."""

    label: str
    arguments: Mapping[str, Any]
    epochs: int
    lr: float
    at_least: float


SMALL = {"width": 32, "capsule_types": 8}
SETTINGS = {
    "lenet": Setting("LeNet-5", {}, 12, 3e-3, 0.990),
    "capsnet": Setting("CapsNet, small, 3 iterations", SMALL, 2, 2e-3, 0.990),
    "capsnet_1": Setting("CapsNet, small, 1 iteration", {**SMALL, "iterations": 1}, 2, 2e-3, 0.990),
    "capsnet_full": Setting("CapsNet, full, 3 iterations", {}, 30, 1e-3, 0.995),
}


def run(
    name: str, images: Images, *, seed: int = 0, folder: Path | None = None, progress: bool = False
) -> tuple[dict[str, Any], Any, np.ndarray]:
    """Train one network; its row of the table, the network, and its test logits or lengths. A stopped run goes on
    from `folder`."""
    setting = SETTINGS[name]
    rows, test = images.rows(0), images.rows(2)
    started = time.process_time()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = LeNet() if name == "lenet" else CapsNet(**setting.arguments)
    row: dict[str, Any] = {"name": name, "seed": seed, "parameters": sum(p.numel() for p in model.parameters())}
    if name == "lenet":
        model = Classifier(model, *pixel_statistics(images.pixels))
        how = Training(setting.epochs, setting.lr, augment=SHIFT, bf16=False, seed=seed, progress=progress)
        minutes = train(model, images, rows, how, folder=folder).seconds / 60
        scores = predict(model, images, test)
    else:
        batches = Batches(
            ImageExamples(images, rows, augment=Augment(crop=1)), 64, shuffle=True, seed=seed, drop_last=True
        )
        steps = setting.epochs * len(batches)
        schedule = Cosine(steps, warmup=steps // 10)
        minutes = (
            fit(
                model, batches, MarginLoss(), epochs=setting.epochs, lr=setting.lr, schedule=schedule, bf16=True,
                folder=folder, seed=seed, progress=progress,
            ).seconds
            / 60
        )  # fmt: skip
        scores, measures = inspect(model, images, test)
        row |= measures
    hits = (scores.argmax(1) == images.labels[test]).double().numpy()
    interval = bootstrap_interval(np.asarray(hits))
    row |= {
        "epochs": setting.epochs,
        "accuracy": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "cpu_minutes": round((time.process_time() - started) / 60, 1),
        "minutes": round(minutes, 1),
    }
    return row, model, scores.numpy()


@torch.no_grad()
def inspect(model: CapsNet, images: Images, rows: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Lengths [n, 10] of the test digits; margin loss, squared error a pixel of what the longest capsule draws, and
    that of the mean picture of the true class, which a decoder must beat."""
    lengths, error = [], 0.0
    content = images.pixels[rows].float() / 255
    for part in torch.split(content, 500):
        capsules = model.capsules(part)
        size = torch.linalg.vector_norm(capsules, dim=2)
        lengths.append(size)
        error += float((model.decode(capsules, size.argmax(1)) - part).square().sum())
    every, label = torch.cat(lengths), images.labels[rows]
    means = torch.stack([content[label == k].mean(0) for k in range(10)])
    return every, {
        "margin": float(margin(every, label).mean()),
        "drawn_mse": error / content.numel(),
        "class_mean_mse": float((means[label] - content).square().mean()),
    }


@torch.no_grad()
def draw(model: CapsNet, images: Images, scores: np.ndarray, out: Path) -> None:
    """The three pictures."""
    test = images.rows(2)
    label = images.labels[test]
    guess = torch.from_numpy(scores).argmax(1)
    right = [int(torch.nonzero((label == k) & (guess == k))[0]) for k in range(10)]
    wrong = torch.nonzero(label != guess).squeeze(1)[:10].tolist()
    content = images.pixels[test].float() / 255

    def drawn(rows: list[int], kinds: Tensor) -> np.ndarray:
        return _grey(model.decode(model.capsules(content[rows]), kinds))

    rows = [
        ("digit", _grey(content[right])),
        ("drawn from its capsule", drawn(right, label[right])),
    ]
    if wrong:
        rows += [
            ("mistaken digit", _grey(content[wrong])),
            ("drawn as what it is", drawn(wrong, label[wrong])),
            ("drawn as what it was taken for", drawn(wrong, guess[wrong])),
        ]
    subtitle = "test digits, and the pictures that 16 numbers of one capsule give back"
    plots.save(pictures.tiles("What a capsule knows", subtitle, rows), out, "reconstructions")

    steps = torch.arange(-5, 6) * 0.05
    lines = []
    for number, dimension in enumerate(range(16)):
        one = right[(2, 3, 4, 5, 6, 8)[number % 6]]
        capsules = model.capsules(content[[one]]).expand(len(steps), -1, -1).clone()
        capsules[:, int(label[one]), dimension] += steps
        lines.append((f"number {dimension + 1}", _grey(model.decode(capsules, label[[one]].expand(len(steps))))))
    names = [f"{step:+.2f}" for step in steps.tolist()]
    subtitle = "one number of the right capsule changed by so much, all others kept"
    plots.save(pictures.tiles("What the numbers of a capsule mean", subtitle, lines, names), out, "dimensions")

    matrix = pictures.confusion_matrix(label.numpy(), guess.numpy(), 10)
    title = f"CapsNet: {int((label != guess).sum())} mistakes in {len(test):,} test digits"
    plots.save(pictures.confusion_picture(title, "rows: what it is", matrix, images.classes), out, "confusion")


def _grey(drawn: Tensor) -> np.ndarray:
    return np.asarray((drawn.squeeze(1) * 255).round().to(torch.uint8).numpy())


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, in the order of SETTINGS."""
    lines = [
        "| network | parameters | epochs | accuracy | 95 % | asked for | margin loss | squared error drawn "
        "(class mean) | CPU minutes |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, setting in SETTINGS.items():
        for row in (r for r in rows if r["name"] == name):
            drawn = f"{row['drawn_mse']:.4f} ({row['class_mean_mse']:.4f})" if "drawn_mse" in row else ""
            loss = f"{row['margin']:.4f}" if "margin" in row else ""
            missed = "" if row["accuracy"] >= setting.at_least else " (missed)"
            lines.append(
                f"| {setting.label} | {row['parameters']:,} | {row['epochs']} | {row['accuracy']:.4f} "
                f"| {row['low']:.4f}–{row['high']:.4f} | {setting.at_least:.3f}{missed} | {loss} | {drawn} "
                f"| {row['cpu_minutes']} |"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, train what is missing, write the table to standard output."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", type=Path, help="folder of the four idx files")
    parser.add_argument("--models", nargs="+", choices=SETTINGS, default=["lenet", "capsnet", "capsnet_1"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--out", type=Path, default=Path("mnist_runs"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    images = sources.mnist(options.source)
    file = options.out / "results.json"
    for seed in options.seeds:
        for name in options.models:
            rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
            if any(row["name"] == name and row["seed"] == seed for row in rows):
                continue
            folder = options.out / f"{name}.{seed}"
            row, model, scores = run(name, images, seed=seed, folder=folder, progress=sys.stderr.isatty())
            np.save(options.out / f"{name}.{seed}.npy", scores)
            if name in ("capsnet", "capsnet_full") and seed == options.seeds[0] and plots.installed():
                draw(model, images, scores, options.out)
            rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
            file.write_text(json.dumps([*rows, row], indent=1) + "\n", encoding="utf-8")
    rows = json.loads(file.read_text(encoding="utf-8"))
    sys.stdout.write(table(rows) + "\n")


if __name__ == "__main__":
    main()
