"""`funnelrec finetune`: pictures and labels in, a trained classifier and a report of what it is worth out.

The test rows are looked at once, at the end. Temperature and threshold come from the validation rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from funnelrec.data.augment import Augment
from funnelrec.data.images import Images, split_rows
from funnelrec.data.sources import images as sources
from funnelrec.encode.image.classifier import Classifier, pixel_statistics
from funnelrec.encode.image.named import build, save_classifier
from funnelrec.evaluate import pictures, plots
from funnelrec.evaluate.classification import Verdict, choose_threshold, softmax, softmax_temperature, verdict
from funnelrec.evaluate.gradcam import grad_cam
from funnelrec.evaluate.significance import Interval
from funnelrec.learn.transfer import Training, features, fit_probe, load_weights, predict, train, unfreeze

__all__ = ["FineTuning", "finetune", "read_pictures"]

HEADS = ("fc", "fc3", "classifier")
SLOW = 0.1  #: the rate of a body that has learnt elsewhere, as a share of the head's
SHOWN = 8  #: pictures in a line
SAID = {"auc": "AUC", "accuracy": "accuracy", "ece": "ECE"}


@dataclass(frozen=True)
class FineTuning:
    """How. `weights`: a public checkpoint; without one the network starts from nothing. `frozen`: only the head, a
    logistic regression on the vectors, learns. `flip`: mirrored pictures are as good. `views`: of each test picture."""

    encoder: str = "resnet18"
    width: int | None = None
    weights: Path | None = None
    frozen: bool = False
    epochs: int = 15
    batch_size: int = 64
    lr: float = 2e-3
    flip: bool = False
    balance: float = 1.0
    views: int = 4
    seed: int = 0
    progress: bool = True

    @property
    def augment(self) -> Augment:
        """Small turns, shifts and changes of light; no mirroring unless it is asked for."""
        return Augment(degrees=10, zoom=(0.9, 1.1), shift=0.05, flip=self.flip, brightness=0.15, contrast=0.15)


def read_pictures(source: Path, *, size: int, grey: bool, bad: str, to: Path, columns: dict[str, str | None]) -> Images:
    """A folder of classes, a CSV table, or a MedMNIST file, by what `source` is."""
    if bad not in ("skip", "refuse", "use"):
        raise ValueError(f"faulty files: skip, refuse or use, received '{bad}'")
    options: dict[str, Any] = {"size": size, "channels": 1 if grey else 3, "faults": bad, "to": to}
    if source.suffix == ".npz":
        return sources.medmnist(source)
    if source.suffix == ".csv":
        return sources.from_csv(source, **options, **columns)  # type: ignore[arg-type]
    return sources.from_folder(source, **options)


def finetune(images: Images, out: Path, how: FineTuning) -> dict[str, float]:
    """Train on `images`, write the classifier and its report to `out`; the test figures.

    Raises ValueError when there are fewer than two classes or too few pictures.
    """
    if len(images.classes) < 2:
        raise ValueError(f"there is one class only, {images.classes[0]}; a classifier needs two or more")
    rows, valid, test = split_rows(images, seed=how.seed)
    model = _network(images, how)
    _learn(model, images, rows, valid, how)
    views: dict[str, Any] = {"augment": how.augment, "views": how.views}
    valid_logits = predict(model, images, valid, **views).numpy()
    test_logits = predict(model, images, test, **views).numpy()
    valid_y, test_y = images.labels[valid].numpy(), images.labels[test].numpy()
    temperature = softmax_temperature(valid_y, valid_logits)
    two = len(images.classes) == 2
    threshold = choose_threshold(valid_y, softmax(valid_logits, temperature)[:, 1]) if two else 0.5
    before = verdict(test_y, softmax(test_logits))
    after = verdict(test_y, softmax(test_logits, temperature), threshold)
    numbers = {**after.numbers(), "ece_before": before.ece, "temperature": temperature, "threshold": threshold}
    size, channels = images.pixels.shape[2], images.pixels.shape[1]
    facts = {
        "name": how.encoder, "size": size, "in_channels": channels, "num_classes": len(images.classes),
        "width": how.width, "classes": list(images.classes), "temperature": temperature, "threshold": threshold,
    }  # fmt: skip
    save_classifier(out, model, facts)
    sizes = [len(rows), len(valid), len(test)]
    clean = {key: None if math.isnan(value) else value for key, value in numbers.items()}
    text = json.dumps({"test": clean, "rows": sizes, "skipped": [f.name for f in images.faults]}, indent=1)
    (out / "metrics.json").write_text(text + "\n", encoding="utf-8")
    drawn = plots.installed()
    (out / "report.md").write_text(_report(images, how, sizes, before, after, numbers, drawn), encoding="utf-8")
    if drawn:
        _draw(model, images, test, before, after, out)
    return numbers


def _network(images: Images, how: FineTuning) -> Classifier:
    size, channels = images.pixels.shape[2], images.pixels.shape[1]
    with torch.random.fork_rng():
        torch.manual_seed(how.seed)
        network = build(how.encoder, size=size, in_channels=channels, num_classes=len(images.classes), width=how.width)
    if how.weights is not None:
        load_weights(network, how.weights)
    return Classifier(network, *pixel_statistics(images.pixels))


def _learn(model: Classifier, images: Images, rows: Tensor, valid: Tensor, how: FineTuning) -> None:
    """The head on vectors that stay; or the head and then everything; or everything from nothing."""
    training = Training(
        how.epochs, how.lr, how.batch_size, balance=how.balance, label_smoothing=0.05, augment=how.augment,
        seed=how.seed, progress=how.progress,
    )  # fmt: skip
    body = [n for n, part in model.network.named_children() if n not in HEADS and list(part.parameters())]
    if how.frozen:
        x = [features(model, images, part) for part in (rows, valid)]
        y = [images.labels[part] for part in (rows, valid)]
        probe = fit_probe(x[0], y[0], x[1], y[1], classes=len(images.classes))
        head = model.network.get_submodule(model.network.head_name)
        with torch.no_grad():  # the probe's standardisation goes into the layer's weights
            head.weight.copy_((probe.weight / probe.std[:, None]).T)
            head.bias.copy_(probe.bias - (probe.mean / probe.std) @ probe.weight)
    elif how.weights is None:
        train(model, images, rows, training)
    else:
        first = max(1, how.epochs // 6)
        slowly = Training(**{**vars(training), "lr_factors": dict.fromkeys(body, SLOW)})
        unfreeze(model, images, rows, slowly, [(body, first, 1.0), ((), max(1, how.epochs - first), 1.0)])
    model.freeze()
    model.eval()


def _report(
    images: Images, how: FineTuning, sizes: Sequence[int], before: Verdict, after: Verdict, numbers: dict[str, float],
    drawn: bool,
) -> str:  # fmt: skip
    start = "from nothing" if how.weights is None else f"from {how.weights.name}"
    learnt = "only the head learns" if how.frozen else "all layers learn"
    lines = [
        f"# {how.encoder}, {start}, {learnt}",
        "",
        f"{sizes[0]:,} pictures to learn from, {sizes[1]:,} to validate, {sizes[2]:,} to test"
        + (", no patient in two of them." if images.group is not None else "."),
        f"Classes: {', '.join(images.classes)}"
        + (f"; '{images.classes[1]}' is the positive one." if len(images.classes) == 2 else "."),
        "",
        "| on the test pictures | value | 95 % |",
        "|---|---:|---:|",
        _line("AUC" if len(images.classes) == 2 else "AUC, mean of one against the rest", after.auc),
        _line("accuracy", after.accuracy),
        f"| balanced accuracy | {after.balanced:.4f} | |",
    ]
    for name, value in (("sensitivity", after.sensitivity), ("specificity", after.specificity)):
        lines += [] if value is None else [_line(name, value)]
    lines += [
        f"| log loss | {after.log_loss:.4f} | |",
        f"| Brier score | {after.brier:.4f} | |",
        f"| ECE before calibration | {before.ece:.4f} | |",
        f"| ECE after, T = {numbers['temperature']:.2f} | {after.ece:.4f} | |",
        "",
        "Temperature" + (f" and threshold ({numbers['threshold']:.3f})" if len(images.classes) == 2 else "")
        + " are the validation pictures'. They help the test pictures only as far as these are of the same kind.",
    ]  # fmt: skip
    if drawn:
        lines += ["", *(f"![{name}]({name}.png)" for name in ("confusion", "reliability", "gradcam"))]
    if images.faults:
        lines += ["", "| file | fault | why | what was done |", "|---|---|---|---|"]
        done = {"skip": "skipped", "use": "used"}
        lines += [f"| {f.name} | {f.kind} | {f.reason} | {done[f.action]} |" for f in images.faults]
    return "\n".join(lines) + "\n"


def _line(name: str, value: Interval) -> str:
    interval = "" if math.isnan(value.low) else f"{value.low:.4f} to {value.high:.4f}"
    return f"| {name} | {value.mean:.4f} | {interval} |"


def _draw(model: Classifier, images: Images, test: Tensor, before: Verdict, after: Verdict, out: Path) -> None:
    labels = images.labels[test].numpy()
    matrix = pictures.confusion_matrix(labels, after.predicted, len(images.classes))
    title = f"{int((after.predicted != labels).sum()):,} mistakes in {len(labels):,} pictures"
    plots.save(pictures.confusion_picture(title, "the test pictures", matrix, images.classes), out, "confusion")
    curves = {"as trained": before.reliability, "after calibration": after.reliability}
    plots.save(plots.reliability_diagram("Do the probabilities come true?", curves), out, "reliability")
    rows = []
    for kind, right in (("right", True), ("wrong", False)):
        for number, name in enumerate(images.classes[:6]):
            chosen = np.nonzero((labels == number) & ((after.predicted == labels) == right))[0][:SHOWN]
            if len(chosen):
                pixels = images.pixels[test[torch.from_numpy(chosen)]]
                taken = torch.from_numpy(after.predicted[chosen])
                heat = grad_cam(model.network, model.content(pixels), taken).float().numpy()
                rows.append((f"{name}, {kind}", np.asarray(pixels.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy())))
                rows.append(("what spoke for it", pictures.overlay(pixels.numpy(), heat)))
    subtitle = "test pictures, and the places that speak for what they were taken for (Grad-CAM)"
    plots.save(pictures.tiles("Where the network looks", subtitle, rows, inch=0.8), out, "gradcam")


def say(numbers: dict[str, float], out: Path) -> None:
    """One line on standard output."""
    figures = ", ".join(f"{label} {numbers[name]:.3f}" for name, label in SAID.items())
    Console(highlight=False, soft_wrap=True).print(f"{figures} on the test pictures; report in {out / 'report.md'}")
