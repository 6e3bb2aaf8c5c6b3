"""AlexNet: five convolutions, three linear layers, dropout.

Paper: Krizhevsky. One weird trick for parallelizing convolutional neural networks. 2014. arXiv:1404.5997, after
    Krizhevsky, Sutskever, Hinton. ImageNet classification with deep convolutional neural networks. NIPS 2012.
Idea:  LeNet made wide and deep, with ReLU so that it trains, and dropout so that its 58 million linear weights do not
    learn the pictures by heart.

| paper                 | here                                                                          |
|-----------------------|-------------------------------------------------------------------------------|
| Eq. (1) layers 1 to 5 | maps = pool relu conv: 64 @ 11, 192 @ 5, 384, 256, 256 @ 3; pools 3, stride 2  |
| Eq. (2) layers 6, 7   | v = relu(W relu(W drop(maps)))               4,096 units each                  |
| Eq. (3) layer 8       | y = W v                                                                       |

Differs: one tower of the 2014 widths, no local response normalisation; the parameter names are torchvision's
    (61,100,840 parameters with 1,000 classes). stem "cifar": the first filters are 5 x 5 without a stride and `hidden`
    reads 3 x 3 maps, for pictures of 28 to 64 pixels.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from funnelrec.core.config import keeps_config
from funnelrec.core.nn.convolution import check_picture_arguments, small_pictures

__all__ = ["AlexNet"]


@keeps_config
class AlexNet(nn.Module):
    """Pictures to `num_classes` logits; 0 gives the vector before. `width`: maps of the first layer."""

    head_name = "classifier.6"

    def __init__(
        self,
        *,
        in_channels: int = 3,
        num_classes: int = 1000,
        width: int = 64,
        hidden: int = 4096,
        dropout: float = 0.5,
        stem: str = "imagenet",
    ) -> None:
        super().__init__()
        check_picture_arguments(in_channels, num_classes, width)
        small = small_pictures(stem)
        side = 3 if small else 6
        first = nn.Conv2d(in_channels, width, 5, padding=2) if small else nn.Conv2d(in_channels, width, 11, 4, 2)
        self.num_features = hidden
        self.features = nn.Sequential(  # Eq. (1)
            first,
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(width, 3 * width, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(3 * width, 6 * width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(6 * width, 4 * width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(4 * width, 4 * width, 3, padding=1),
            nn.ReLU(),
        )
        self.shrink = nn.Sequential(nn.MaxPool2d(3, 2), nn.AdaptiveAvgPool2d(side))
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(4 * width * side * side, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, num_classes) if num_classes else nn.Identity(),
        )

    def maps(self, content: Float[Tensor, "B C H W"]) -> Float[Tensor, "B M h w"]:
        """The last maps that still say where."""
        maps: Tensor = self.features(content)
        return maps

    def pool(self, maps: Float[Tensor, "B M h w"]) -> Float[Tensor, "B D"]:
        """Maps to the vector that the last layer reads."""
        vector: Tensor = self.classifier[:-1](torch.flatten(self.shrink(maps), 1))  # (B, D)   Eq. (2)
        return vector

    def head(self, vector: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]:
        """Logits of the classes."""
        logits: Tensor = self.classifier[-1](vector)  # (B, K)   Eq. (3)
        return logits

    def forward(self, content: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Pictures, floating, normalised, to logits (or vectors when there are no classes)."""
        return self.head(self.pool(self.maps(content)))
