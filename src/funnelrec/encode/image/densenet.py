"""DenseNet: every layer reads all layers before it.

Paper: Huang, Liu, van der Maaten, Weinberger. Densely connected convolutional networks. CVPR 2017. arXiv:1608.06993.
Idea:  a layer adds a few maps to a common store and reads the whole of it, so nothing is computed twice and gradients
    reach every layer directly; few parameters suffice.

| paper                                     | here                                                            |
|-------------------------------------------|-----------------------------------------------------------------|
| Eq. (1) x_l = x_{l-1} + H(x_{l-1})        | ResNet, for comparison                                          |
| Eq. (2) x_l = H_l([x_0, …, x_{l-1}])      | H: norm, relu, conv1 to 4k maps, norm, relu, conv3 to k (BC)     |
| Eq. (3) transition, compression θ         | norm, relu, conv1 to θ·m maps, mean of 2 x 2                    |
| Eq. (4) the end                           | y = classifier(mean over places of relu(norm(maps)))            |

Differs: nothing in shape; `layers` (6, 12, 24, 16) is DenseNet-121, 7,978,856 parameters with 1,000 classes, under
    torchvision's and timm's names. stem "cifar": 3 x 3 filters to 2k maps, no stride, no pooling, as in Section 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from funnelrec.core.config import keeps_config
from funnelrec.core.nn.convolution import begin, check_picture_arguments, small_pictures

__all__ = ["DenseNet"]


class _DenseLayer(nn.Module):
    """k new maps from all that there are.   Eq. (2)"""

    def __init__(self, channels: int, growth: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(torch.relu(self.norm1(x)))
        y = self.conv2(torch.relu(self.norm2(y)))
        return torch.cat([x, F.dropout(y, self.dropout, self.training)], 1)  # (B, M + k, h, w)


class _Transition(nn.Module):
    """Fewer maps of half the size.   Eq. (3)"""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(torch.relu(self.norm(x))), 2)


@keeps_config
class DenseNet(nn.Module):
    """Pictures to `num_classes` logits; 0 gives the vector before. `growth`: k, the maps that a layer adds."""

    head_name = "classifier"

    def __init__(
        self,
        *,
        layers: Sequence[int] = (6, 12, 24, 16),
        in_channels: int = 3,
        num_classes: int = 1000,
        growth: int = 32,
        compression: float = 0.5,
        dropout: float = 0.0,
        stem: str = "imagenet",
    ) -> None:
        super().__init__()
        check_picture_arguments(in_channels, num_classes, growth)
        if not layers or min(layers) < 1 or not 0 < compression <= 1:
            raise ValueError(
                f"layers are counts of at least 1 and compression lies in (0, 1], received {layers} and {compression}"
            )
        small, channels = small_pictures(stem), 2 * growth
        first = nn.Conv2d(in_channels, channels, *((3, 1, 1) if small else (7, 2, 3)), bias=False)
        self.features = nn.Sequential()
        self.features.add_module("conv0", first)
        if not small:
            self.features.add_module("norm0", nn.BatchNorm2d(channels))
            self.features.add_module("relu0", nn.ReLU())
            self.features.add_module("pool0", nn.MaxPool2d(3, 2, 1))
        for number, count in enumerate(layers, start=1):
            block = nn.Sequential()
            for layer in range(1, count + 1):
                block.add_module(f"denselayer{layer}", _DenseLayer(channels, growth, dropout))
                channels += growth
            self.features.add_module(f"denseblock{number}", block)
            if number < len(layers):
                out = int(channels * compression)
                self.features.add_module(f"transition{number}", _Transition(channels, out))
                channels = out
        self.features.add_module(f"norm{len(layers) + 1}", nn.BatchNorm2d(channels))
        self.num_features = channels
        self.classifier = nn.Linear(channels, num_classes) if num_classes else nn.Identity()
        begin(self)

    def maps(self, content: Float[Tensor, "B C H W"]) -> Float[Tensor, "B M h w"]:
        """The last maps that still say where."""
        return torch.relu(self.features(content))

    def pool(self, maps: Float[Tensor, "B M h w"]) -> Float[Tensor, "B D"]:
        """Maps to the vector that the last layer reads."""
        return maps.mean((2, 3))  # (B, D)

    def head(self, vector: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]:
        """Logits of the classes."""
        logits: Tensor = self.classifier(vector)  # (B, K)   Eq. (4)
        return logits

    def forward(self, content: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Pictures, floating, normalised, to logits (or vectors when there are no classes)."""
        return self.head(self.pool(self.maps(content)))
