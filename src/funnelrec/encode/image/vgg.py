"""VGG: nothing but 3 x 3 filters and halving.

Paper: Simonyan, Zisserman. Very deep convolutional networks for large-scale image recognition. ICLR 2015.
    arXiv:1409.1556.
Idea:  two 3 x 3 filters in a row see what one 5 x 5 sees, with fewer weights and a ReLU more; so stack them.

| paper               | here                                                                     |
|---------------------|--------------------------------------------------------------------------|
| Eq. (1) table 1     | maps = five blocks of relu(conv 3 x 3), each halved by a maximum of 2 x 2 |
| Eq. (2) FC-4096 x 2 | v = drop relu(W drop relu(W maps))                                       |
| Eq. (3) FC-1000     | y = W v                                                                  |

Differs: parameter names and shapes are torchvision's (VGG-16: 138,357,544 parameters with 1,000 classes), `batch_norm`
    as in its vgg16_bn. stem "cifar": the two linear layers read the mean of the maps, and the last halving is left out
    for pictures under 32 pixels.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from funnelrec.core.config import keeps_config
from funnelrec.core.nn.convolution import begin, check_picture_arguments, small_pictures

__all__ = ["VGG"]

BLOCKS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


@keeps_config
class VGG(nn.Module):
    """Pictures to `num_classes` logits; 0 gives the vector before. `depth` 11, 13, 16 or 19; `width`: first maps."""

    head_name = "classifier.6"

    def __init__(
        self,
        *,
        depth: int = 16,
        in_channels: int = 3,
        num_classes: int = 1000,
        width: int = 64,
        hidden: int = 4096,
        dropout: float = 0.5,
        batch_norm: bool = False,
        stem: str = "imagenet",
    ) -> None:
        super().__init__()
        check_picture_arguments(in_channels, num_classes, width)
        if depth not in BLOCKS:
            raise ValueError(f"a VGG has a depth of {', '.join(map(str, BLOCKS))}, received {depth}")
        side = 1 if small_pictures(stem) else 7
        self.num_features = hidden
        layers: list[nn.Module] = []
        channels = in_channels
        for block, count in enumerate(BLOCKS[depth]):
            maps = width * min(2**block, 8)
            for _ in range(count):
                layers.append(nn.Conv2d(channels, maps, 3, padding=1))
                layers += [nn.BatchNorm2d(maps)] if batch_norm else []
                layers.append(nn.ReLU())
                channels = maps
            layers.append(nn.MaxPool2d(2, ceil_mode=side == 1))
        self.features = nn.Sequential(*layers[:-1])  # Eq. (1)
        self.shrink = nn.Sequential(layers[-1], nn.AdaptiveAvgPool2d(side))
        self.classifier = nn.Sequential(
            nn.Linear(channels * side * side, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_classes) if num_classes else nn.Identity(),
        )
        begin(self)

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
