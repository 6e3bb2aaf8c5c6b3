"""Networks by the names that papers use: "resnet18", "densenet121", "vgg16", "alexnet", "lenet"."""

from __future__ import annotations

import importlib
import re
from typing import Any

from torch import nn

__all__ = ["NAMES", "build"]

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
