"""Parts of convolutional networks: how they begin, and the first layers for small and large pictures."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["begin", "check_picture_arguments", "small_pictures"]


def begin(model: nn.Module) -> None:
    """Convolutions from N(0, 2 / fan-out) (He et al. 2015, arXiv:1502.01852, Eq. (14)), norms at 1 and 0."""
    for part in model.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.BatchNorm2d):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Linear) and part.bias is not None:
            with torch.no_grad():
                part.bias.zero_()


def small_pictures(stem: str) -> bool:
    """Whether `stem` is the one for pictures of 28 to 64 pixels. Raises ValueError for a stem there is not."""
    if stem not in ("imagenet", "cifar"):
        raise ValueError(f"stem is 'imagenet' (224 pixels) or 'cifar' (28 to 64 pixels), received '{stem}'")
    return stem == "cifar"


def check_picture_arguments(in_channels: int, num_classes: int, width: int) -> None:
    """Raises ValueError where a network cannot be built."""
    if in_channels < 1 or num_classes < 0 or width < 1:
        raise ValueError(
            "in_channels and width are at least 1 and num_classes at least 0 (0: vectors, no logits), received "
            f"{in_channels}, {width} and {num_classes}"
        )
