"""Transfer: what a network has learnt elsewhere, used for a small set of pictures, around any encoder.

| function        | what it does                                                                                   |
|-----------------|------------------------------------------------------------------------------------------------|
| `load_weights`  | a public checkpoint (safetensors) into a network; another number of channels or classes is met |
| `features`      | each picture's vector, once, by a network that does not learn                                  |
| `fit_probe`     | a linear classifier on vectors, its L2 chosen on the validation rows                           |
| `train`         | all or some of the layers, rates of their own for some, rare classes weighted                  |
| `unfreeze`      | `train` in steps from the last layers to the first                                             |
| `predict`       | logits, averaged over augmented views if wanted                                                |

Feature extraction is `features` + `fit_probe`; fine-tuning `load_weights` + `unfreeze` or `train`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from funnelrec.data.batches import Batches, counter_generator
from funnelrec.data.images import ImageExamples, Images
from funnelrec.encode.image.classifier import Classifier
from funnelrec.learn.fit import FitResult, fit
from funnelrec.learn.losses import CrossEntropy, Loss
from funnelrec.learn.schedules import Cosine

__all__ = [
    "Probe",
    "Training",
    "class_weights",
    "features",
    "fit_names",
    "fit_probe",
    "load_weights",
    "predict",
    "train",
    "unfreeze",
]

CHUNK = 256
Augmentation = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Training:
    """How `train` trains; the rate rises over the first `warmup` of the steps and falls as a cosine.

    balance: how far rare classes are weighted up, 0 not at all, 1 until each class weighs the same. lr_factors: as of
    `fit`, named as in the network ("layer1": 0.1).
    """

    epochs: int = 10
    lr: float = 2e-3
    batch_size: int = 128
    weight_decay: float = 0.05
    warmup: float = 0.2
    label_smoothing: float = 0.0
    balance: float = 0.0
    augment: Augmentation | None = None
    freeze: tuple[str, ...] = ()
    lr_factors: Mapping[str, float] | None = None
    bf16: bool = True
    clip_norm: float | None = 5.0
    seed: int = 0
    progress: bool = False


def class_weights(labels: Int[Tensor, "N"], classes: int, power: float = 1.0) -> tuple[float, ...]:
    """(N / (K · rows of the class)) ** power, what makes all classes weigh the same at power 1. -1 is no class."""
    count = torch.bincount(labels[labels >= 0], minlength=classes).clamp(min=1).double()
    return tuple(((count.sum() / (classes * count)) ** power).tolist())


def train(
    model: Classifier,
    images: Images,
    rows: Int[Tensor, "rows"],
    how: Training,
    *,
    loss: Loss | None = None,
    validate: Callable[[], Mapping[str, float]] | None = None,
    metric: str | None = None,
    folder: Path | str | None = None,
) -> FitResult:
    """Train `model` in place on some rows; `loss` is a weighted cross-entropy unless another is given."""
    model.freeze(*how.freeze)
    examples = ImageExamples(images, rows, augment=how.augment)
    batches = Batches(examples, how.batch_size, shuffle=True, seed=how.seed, drop_last=len(rows) >= how.batch_size)
    steps = how.epochs * len(batches)
    if loss is None:
        weights = class_weights(images.labels[rows], len(images.classes), how.balance) if how.balance else None
        loss = CrossEntropy(label_smoothing=how.label_smoothing, class_weights=weights)
    factors = {f"network.{part}": factor for part, factor in (how.lr_factors or {}).items() if part not in how.freeze}
    return fit(
        model,
        batches,
        loss,
        epochs=how.epochs,
        lr=how.lr,
        weight_decay=how.weight_decay,
        lr_factors=factors or None,
        clip_norm=how.clip_norm,
        schedule=Cosine(max(steps, 2), warmup=min(int(how.warmup * steps), steps - 1)),
        validate=validate,
        metric=metric,
        folder=folder,
        seed=how.seed,
        bf16=how.bf16,
        progress=how.progress,
    )


def unfreeze(
    model: Classifier,
    images: Images,
    rows: Int[Tensor, "rows"],
    how: Training,
    stages: Sequence[tuple[Sequence[str], int, float]],
    *,
    validate: Callable[[], Mapping[str, float]] | None = None,
    metric: str | None = None,
) -> list[FitResult]:
    """`train` once for each stage: (parts that stay frozen, epochs, factor of the learning rate).

    The usual order: all but the head frozen, then the last stage free, then everything, each at a smaller rate.
    """
    results = []
    for frozen, epochs, factor in stages:
        stage = replace(how, freeze=tuple(frozen), epochs=epochs, lr=how.lr * factor)
        results.append(train(model, images, rows, stage, validate=validate, metric=metric))
    model.freeze()
    model.eval()
    return results


@torch.no_grad()
def predict(
    model: Classifier,
    images: Images,
    rows: Int[Tensor, "rows"],
    *,
    augment: Augmentation | None = None,
    views: int = 1,
    seed: int = 0,
    bf16: bool = False,
) -> Float[Tensor, "rows K"]:
    """Logits of some rows; of several `views` the log of the mean probability, the first view unchanged."""
    if views < 1 or (views > 1 and augment is None):
        raise ValueError(f"views is at least 1, and more need augment=, received {views}")
    model.eval()
    parts = []
    for start in range(0, len(rows), CHUNK):
        pixels = images.pixels[rows[start : start + CHUNK]]
        total: Tensor | None = None
        for view in range(views):
            seen = augment(pixels, counter_generator(seed, start, view)) if augment is not None and view else pixels
            with torch.autocast(pixels.device.type, torch.bfloat16, enabled=bf16):
                logits = model.network(model.content(seen)).float()
            total = logits if views == 1 else _add(total, F.log_softmax(logits, 1).exp())
        assert total is not None
        parts.append(total if views == 1 else (total / views).log())
    return torch.cat(parts) if parts else torch.empty(0, len(images.classes))


def _add(total: Tensor | None, one: Tensor) -> Tensor:
    return one if total is None else total + one


@torch.no_grad()
def features(model: Classifier, images: Images, rows: Int[Tensor, "rows"]) -> Float[Tensor, "rows D"]:
    """The vector of each row; the model is in eval mode and unchanged."""
    model.eval()
    return torch.cat([model.encode(images.pixels[part]).float() for part in torch.split(rows, CHUNK)])


@dataclass(frozen=True)
class Probe:
    """Logits x W + b of standardised vectors."""

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor
    l2: float

    def logits(self, x: Float[Tensor, "n D"]) -> Float[Tensor, "n K"]:
        """Logits of the classes."""
        return (x - self.mean) / self.std @ self.weight + self.bias


def fit_probe(
    x: Float[Tensor, "n D"],
    y: Int[Tensor, "n"],
    valid_x: Float[Tensor, "m D"],
    valid_y: Int[Tensor, "m"],
    *,
    classes: int,
    l2s: Sequence[float] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0),
    weights: Sequence[float] | None = None,
) -> Probe:
    """The L2-regularised logistic regression with the least loss on the validation rows among the strengths `l2s`."""
    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
    scale = None if weights is None else x.new_tensor(weights)
    best, best_loss = None, float("inf")
    for l2 in sorted(l2s, reverse=True):
        probe = _logistic((x - mean) / std, y, classes, l2, scale, best)
        probe = Probe(mean, std, probe.weight, probe.bias, l2)
        loss = F.cross_entropy(probe.logits(valid_x), valid_y, scale).item()
        if loss < best_loss:
            best, best_loss = probe, loss
    if best is None:
        raise ValueError("no probe could be fitted: the vectors are not finite; train their encoder again")
    return best


def _logistic(x: Tensor, y: Tensor, classes: int, l2: float, scale: Tensor | None, start: Probe | None) -> Probe:
    """Minimise the mean cross-entropy + l2 / 2 · ‖W‖² by L-BFGS; convex, so the start changes only the time."""
    weight = torch.zeros(x.shape[1], classes) if start is None else start.weight.clone()
    bias = torch.zeros(classes) if start is None else start.bias.clone()
    weight.requires_grad_()
    bias.requires_grad_()
    solver = torch.optim.LBFGS([weight, bias], max_iter=200, tolerance_change=1e-8, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        solver.zero_grad()
        loss: Tensor = F.cross_entropy(x @ weight + bias, y, scale) + l2 / 2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    solver.step(objective)  # type: ignore[no-untyped-call]
    zero = torch.zeros(x.shape[1])
    return Probe(zero, zero + 1, weight.detach(), bias.detach(), l2)


def load_weights(network: nn.Module, path: Path | str) -> list[str]:
    """Read a checkpoint of torchvision's or timm's names into `network`; the names of what stays as it was.

    A head of another number of classes stays new. One input channel where the file has three: its filters are summed,
    which is what three equal channels would give. Raises ValueError when anything else is missing, superfluous or of
    another shape: that file belongs to another network.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        given = load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is no safetensors file: {error}; convert the checkpoint first") from error
    try:
        fitted, kept = fit_names(network, given)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    network.load_state_dict(fitted)
    return kept


def fit_names(network: nn.Module, given: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """`given` under the names and in the shapes of `network`, as `load_weights` says; and what was not taken."""
    own = network.state_dict()
    found = {_own_name(name): tensor for name, tensor in given.items()}
    head = f"{getattr(network, 'head_name', '')}."
    first = next(name for name, part in network.named_modules() if isinstance(part, nn.Conv2d))
    fitted, kept = {}, []
    for name, tensor in own.items():
        loaded = found.get(name)
        if loaded is not None and name == f"{first}.weight" and loaded.shape[1] != tensor.shape[1]:
            loaded = _channels(loaded, tensor.shape[1])
        if loaded is not None and name.startswith("classifier.") and loaded.dim() == 4:
            loaded = loaded.flatten(1)  # timm keeps VGG's linear layers as convolutions
        wrong = loaded is None or loaded.shape != tensor.shape
        if wrong and (name.startswith(head) or name.endswith("num_batches_tracked")):
            kept += [name] if name.startswith(head) else []
            loaded, wrong = tensor, False
        if loaded is None or wrong:
            what = "is missing" if loaded is None else f"has the shape {list(loaded.shape)}, not {list(tensor.shape)}"
            raise ValueError(f"{name} {what}; this file belongs to another network than {_named(network)}")
        fitted[name] = loaded.to(tensor.dtype)
    surplus = sorted(name for name in set(found) - set(own) if not name.startswith(head))
    if surplus:
        raise ValueError(f"it also holds {surplus[0]}; this file belongs to another network than {_named(network)}")
    return fitted, kept


_TIMM = (("pre_logits.fc1.", "classifier.0."), ("pre_logits.fc2.", "classifier.3."), ("head.fc.", "classifier.6."))


def _own_name(name: str) -> str:
    """The name here of a parameter of torchvision or timm."""
    for theirs, own in _TIMM:
        if name.startswith(theirs):
            return own + name.removeprefix(theirs)
    # DenseNet's older files number the parts of a layer after a dot: norm.1, conv.2
    return re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.(\d)", r"\1\2", name)


def _channels(weight: Tensor, channels: int) -> Tensor:
    """First filters for another number of channels: their sum for one, else repeated and scaled."""
    if channels == 1:
        return weight.sum(1, keepdim=True)
    given = weight.shape[1]
    repeated = weight.repeat(1, -(-channels // given), 1, 1)[:, :channels]
    return repeated * (given / channels)


def _named(network: Any) -> str:
    return f"{type(network).__name__}({getattr(network, 'config', '')})"
