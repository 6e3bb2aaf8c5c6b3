"""Networks by the names that papers use: "resnet18", "densenet121", "vgg16", "alexnet", "lenet"."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import nn

from funnelrec.encode.image.classifier import Classifier

__all__ = ["NAMES", "build", "load_classifier", "save_classifier"]

WEIGHTS, FACTS = "model.safetensors", "encoder.json"

_DENSE = {121: (6, 12, 24, 16), 169: (6, 12, 32, 32), 201: (6, 12, 48, 32)}
NAMES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lenet": ("lenet", "LeNet", {}),
    "alexnet": ("alexnet", "AlexNet", {}),
    **{f"vgg{d}": ("vgg", "VGG", {"depth": d}) for d in (11, 13, 16, 19)},
    **{f"vgg{d}_bn": ("vgg", "VGG", {"depth": d, "batch_norm": True}) for d in (11, 13, 16, 19)},
    **{f"resnet{d}": ("resnet", "ResNet", {"depth": d}) for d in (18, 34, 50, 101, 152)},
    **{f"densenet{d}": ("densenet", "DenseNet", {"layers": layers}) for d, layers in _DENSE.items()},
}  #: name -> file, class, arguments
SMALL_SIDE = 64  #: pixels up to which the first layers keep every place


def build(
    name: str, *, size: int, in_channels: int = 3, num_classes: int = 1000, width: int | None = None
) -> nn.Module:
    """A new network for pictures of `size` pixels; `width` is its number of first maps (a DenseNet's is twice its
    growth), the published one unless given. Raises ValueError for an unknown name."""
    if name not in NAMES:
        known = ", ".join(n for n in NAMES if not re.search(r"_bn|1[13]|19$|34|152|169|201", n))
        raise ValueError(f"the networks are {known} and their sizes, received '{name}'")
    file, kind, arguments = NAMES[name]
    chosen: dict[str, Any] = {**arguments, "in_channels": in_channels, "num_classes": num_classes}
    if file != "lenet":
        chosen["stem"] = "cifar" if size <= SMALL_SIDE else "imagenet"
    if width is not None:
        chosen |= {"growth": max(width // 2, 1)} if file == "densenet" else {"width": width}
        if file in ("vgg", "alexnet"):
            chosen["hidden"] = 64 * width  # 4,096 at the published width of 64
    made: nn.Module = getattr(importlib.import_module(f"funnelrec.encode.image.{file}"), kind)(**chosen)
    return made


def save_classifier(folder: Path | str, model: Classifier, facts: Mapping[str, Any]) -> Path:
    """Write model.safetensors and encoder.json; `facts` holds what `build` needs ("name", "size", "in_channels",
    "num_classes", "width"), the classes, and what else is to be kept."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / WEIGHTS)
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    text = json.dumps({"format": 1, **facts, "sha256": digest}, indent=1)
    (folder / FACTS).write_text(text + "\n", encoding="utf-8")
    return folder


def load_classifier(folder: Path | str) -> tuple[Classifier, dict[str, Any]]:
    """What `save_classifier` wrote, in eval mode, with its facts. Raises ValueError for a damaged folder."""
    folder = Path(folder)
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        data = (folder / WEIGHTS).read_bytes()
        if hashlib.sha256(data).hexdigest() != facts["sha256"]:
            raise ValueError(f"{WEIGHTS} was changed after it was written")
        arguments = {key: facts[key] for key in ("size", "in_channels", "num_classes", "width")}
        network = build(facts["name"], **arguments)
        channels = facts["in_channels"]
        model = Classifier(network, [0.0] * channels, [1.0] * channels)
        model.load_state_dict(load(data))
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder} holds no encoder: {error}; make it again with funnelrec finetune") from error
    return model.eval(), facts
