"""CIFAR-10 from JPEG files: narrow networks on one CPU core, 45,000 pictures to learn from and 5,000 to test on.

Run:      python recipes/encode/image/cifar10.py TRAIN_TAR_OR_FOLDER [--models resnet vgg …] [--out FOLDER]
Hardware: 1 CPU core with AVX-512 and bfloat16, 3 GB
Expected: one seed: ResNet-18 .853 in 16 minutes of processor time, VGG-16 .804 in 5, DenseNet .804 in 25, AlexNet .766
          in 5, LeNet .609 in 1; the bands of SETTINGS lie below

The 5,000 pictures are drawn with seed 0, equally many of each class; nothing is chosen on them: the last epoch counts.
Training: AdamW, the rate up over a fifth of the steps and down as a cosine, shifts of up to 4 pixels and mirroring,
labels smoothed by 0.1, bfloat16 arithmetic on channels-last tensors. A finished run is not repeated, a stopped one goes
on. The files are JPEG of quality 75, so figures lie below those published for the original pictures.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from funnelrec import zoo
from funnelrec.data.augment import Augment
from funnelrec.data.images import Images
from funnelrec.data.sources import images as sources
from funnelrec.encode.image.classifier import Classifier, pixel_statistics
from funnelrec.evaluate.significance import bootstrap_interval
from funnelrec.learn.transfer import Training, predict, train


@dataclass(frozen=True)
class Setting:
    """A network, how long it learns, and the accuracy that it must reach."""

    network: str
    arguments: Mapping[str, Any]
    epochs: int
    at_least: float
    lr: float = 4e-3
    label: str = ""


SMALL = {"num_classes": 10, "stem": "cifar"}
SETTINGS = {
    "resnet": Setting("resnet", {**SMALL, "depth": 18, "width": 16}, 20, 0.85, label="ResNet-18, width 16"),
    "vgg": Setting(
        "vgg", {**SMALL, "width": 16, "hidden": 128, "dropout": 0.2, "batch_norm": True}, 12, 0.80,
        label="VGG-16, width 16, batch norm",
    ),
    "densenet": Setting(
        "densenet", {**SMALL, "layers": (4, 4, 4), "growth": 12}, 12, 0.78, label="DenseNet-BC, k = 12"
    ),
    "alexnet": Setting(
        "alexnet", {**SMALL, "width": 24, "hidden": 256, "dropout": 0.2}, 10, 0.70, 2e-3, "AlexNet, width 24"
    ),
    "lenet": Setting("lenet", {"in_channels": 3, "num_classes": 10}, 10, 0.50, 2e-3, "LeNet-5"),
}  # fmt: skip
HOW = Training(batch_size=128, weight_decay=0.05, label_smoothing=0.1, augment=Augment(crop=4, flip=True))


def split(labels: Tensor, test_per_class: int = 500) -> tuple[Tensor, Tensor]:
    """Rows to train and to test on, equally many of each class among the latter, drawn with seed 0."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=generator)
    test = torch.cat([order[labels[order] == k][:test_per_class] for k in torch.unique(labels)])
    train_rows = torch.ones(len(labels), dtype=torch.bool).index_fill(0, test, False)
    return torch.nonzero(train_rows).squeeze(1), test.sort().values


def run(
    name: str, images: Images, *, seed: int = 0, folder: Path | None = None, progress: bool = False
) -> dict[str, Any]:
    """Train one network and test it; `model` of the result is the classifier. A stopped run goes on from `folder`."""
    setting = SETTINGS[name]
    rows, test = split(images.labels)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = zoo.load(f"encode/image/{setting.network}")(**setting.arguments)
    model = Classifier(network, *pixel_statistics(images.pixels))
    started = time.process_time()
    how = replace(HOW, epochs=setting.epochs, lr=setting.lr, seed=seed, progress=progress)
    result = train(model, images, rows, how, folder=folder)
    hits = (predict(model, images, test, bf16=True).argmax(1) == images.labels[test]).double().numpy()
    interval = bootstrap_interval(np.asarray(hits))
    return {
        "name": name,
        "seed": seed,
        "parameters": sum(p.numel() for p in network.parameters()),
        "epochs": how.epochs,
        "accuracy": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "cpu_minutes": round((time.process_time() - started) / 60, 1),
        "minutes": round(result.seconds / 60, 1),
        "model": model,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, in the order of SETTINGS."""
    lines = [
        "| network | parameters | epochs | accuracy | 95 % | asked for | CPU minutes |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, setting in SETTINGS.items():
        for row in (r for r in rows if r["name"] == name):
            missed = "" if row["accuracy"] >= setting.at_least else " (missed)"
            lines.append(
                f"| {setting.label} | {row['parameters']:,} | {row['epochs']} | {row['accuracy']:.4f} "
                f"| {row['low']:.4f}–{row['high']:.4f} | {setting.at_least:.2f}{missed} | {row['cpu_minutes']} |"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, train what is missing, write the table to standard output."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", type=Path, help="train.tar.zst, or a folder of CLASS/id.jpg")
    parser.add_argument("--models", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("cifar10_runs"), help="results, weights, decoded pictures")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    decoded = options.out / "pixels"
    try:
        images = Images.open(decoded)
    except ValueError:
        images = sources.cifar10(options.source, to=decoded)
    file = options.out / "results.json"
    for name in options.models:
        rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        if any(row["name"] == name and row["seed"] == options.seed for row in rows):
            continue
        folder = options.out / f"{name}.{options.seed}"
        row = run(name, images, seed=options.seed, folder=folder, progress=sys.stderr.isatty())
        model = row.pop("model")
        weights = {key: tensor.contiguous() for key, tensor in model.network.state_dict().items()}
        save_file(weights, options.out / f"{name}.{options.seed}.safetensors")
        file.write_text(json.dumps([*rows, row], indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(table(json.loads(file.read_text(encoding="utf-8"))) + "\n")


if __name__ == "__main__":
    main()
