"""WCL on MNIST: 8,000 digits without labels, then 100 labels; against instance contrast and an untrained encoder.

Run:      python recipes/encode/image/wcl.py FOLDER_OF_THE_IDX_FILES [--seeds 0 1 2] [--out FOLDER]
Hardware: 1 CPU core, 2 GB
Expected: WCL at least 10 points above the untrained encoder and not below instance contrast; docs/images.md

LeNet-5 up to its 84 numbers, heads of 128 and 64, batches of 256, 15 epochs of AdamW. The probe is a logistic
regression on the standardised vectors of 10 labelled digits a class, mean of 10 draws; the 20 nearest of the 8,000 vote
for `20-NN`. Purity: the share of pairs with one weak label that are the same digit, in batches of 256 of test digits
(of raw pixels: about .65).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from funnelrec.data.augment import Augment
from funnelrec.data.batches import Batches
from funnelrec.data.images import ImageExamples, Images
from funnelrec.data.sources import images as sources
from funnelrec.encode.image.classifier import pixel_statistics
from funnelrec.encode.image.wcl import WCL
from funnelrec.learn.contrast import WeakContrast, purity
from funnelrec.learn.fit import fit
from funnelrec.learn.schedules import Cosine
from funnelrec.learn.transfer import fit_probe

METHODS = {"random": "untrained encoder", "instance": "instance contrast", "wcl": "WCL"}
CHANGE = Augment(degrees=15, zoom=(0.8, 1.2), shift=0.08, brightness=0.4, contrast=0.4, cutout=8)
BATCH, EPOCHS, UNLABELLED, TEST, DRAWS = 256, 15, 8000, 2000, 10


@torch.no_grad()
def encode(model: WCL, images: Images, rows: Tensor, loss: WeakContrast) -> Tensor:
    """Vectors of some rows."""
    model.eval()
    return torch.cat([model(loss.content(images.pixels[part])) for part in torch.split(rows, 500)])


@torch.no_grad()
def weak_label_purity(model: WCL, images: Images, rows: Tensor, loss: WeakContrast) -> float:
    """Mean purity of batches of BATCH rows."""
    model.eval()
    found = []
    for part in torch.split(rows, BATCH):
        if len(part) == BATCH:
            v = model.heads(loss.content(images.pixels[part]))[1]
            found.append(purity(model.weak_labels(v), images.labels[part])[0])
    return statistics.mean(found)


def probe(x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor) -> float:
    """Mean accuracy of logistic regressions on 10 labels a class."""
    scores = []
    for draw in range(DRAWS):
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(draw))
        rows = torch.cat([order[y[order] == k][:10] for k in range(10)])
        fitted = fit_probe(x[rows], y[rows], x[rows], y[rows], classes=10, l2s=(0.01,))
        scores.append(float((fitted.logits(test_x).argmax(1) == test_y).double().mean()))
    return statistics.mean(scores)


def neighbours_vote(x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor) -> float:
    """Accuracy of the vote of the 20 nearest by cosine."""
    similar = F.normalize(test_x, dim=1) @ F.normalize(x, dim=1).T
    votes = F.one_hot(y[similar.topk(20, 1).indices], 10).sum(1)
    return float((votes.argmax(1) == test_y).double().mean())


def run(method: str, images: Images, seed: int, *, progress: bool = False) -> dict[str, Any]:
    """Train one encoder without labels and measure it."""
    generator = torch.Generator().manual_seed(seed)
    rows = images.rows(0)[torch.randperm(60_000, generator=generator)[:UNLABELLED]]
    test = images.rows(2)[torch.randperm(10_000, generator=generator)[:TEST]]
    mean, std = pixel_statistics(images.pixels)
    loss = WeakContrast(tuple(mean), tuple(std), weak=1.0 if method == "wcl" else 0.0)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = WCL()
    seconds = 0.0
    if method != "random":
        examples = ImageExamples(images, rows, augment=CHANGE, views=2)
        batches = Batches(examples, BATCH, shuffle=True, seed=seed, drop_last=True)
        steps = EPOCHS * len(batches)
        schedule = Cosine(steps, warmup=steps // 10)
        result = fit(
            model, batches, loss, epochs=EPOCHS, lr=3e-3, weight_decay=1e-4, schedule=schedule, seed=seed,
            progress=progress,
        )  # fmt: skip
        seconds = result.seconds
    x, test_x = encode(model, images, rows, loss), encode(model, images, test, loss)
    y, test_y = images.labels[rows], images.labels[test]
    return {
        "method": method,
        "seed": seed,
        "probe": probe(x, y, test_x, test_y),
        "neighbours": neighbours_vote(x, y, test_x, test_y),
        "purity": weak_label_purity(model, images, test, loss),
        "seconds": round(seconds),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: mean ± deviation over seeds."""
    lines = [
        "| encoder | probe, 100 labels | 20-NN | weak-label purity | seeds | seconds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for method, label in METHODS.items():
        own = [row for row in rows if row["method"] == method]
        if own:
            cells = []
            for key in ("probe", "neighbours", "purity"):
                values = [row[key] for row in own]
                spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.3f}{spread}")
            seconds = round(statistics.mean(row["seconds"] for row in own))
            lines.append(f"| {label} | {' | '.join(cells)} | {len(own)} | {seconds} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, train what is missing, write the table to standard output."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", type=Path, help="folder of the four idx files")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=Path, default=Path("wcl_runs"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    images = sources.mnist(options.source)
    file = options.out / "results.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    for seed in options.seeds:
        for method in options.methods:
            if not any(row["method"] == method and row["seed"] == seed for row in rows):
                rows.append(run(method, images, seed, progress=sys.stderr.isatty()))
                file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(table(rows) + "\n")


if __name__ == "__main__":
    main()
