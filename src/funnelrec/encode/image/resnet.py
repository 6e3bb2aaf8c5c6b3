"""ResNet: layers that add to what they read.

Paper: He, Zhang, Ren, Sun. Deep residual learning for image recognition. CVPR 2016. arXiv:1512.03385.
Idea:  a block learns what to add to its input, so a block that has nothing to say is the identity, and depth costs
    nothing to train.

| paper                   | here                                                                               |
|-------------------------|------------------------------------------------------------------------------------|
| Eq. (1) y = F(x) + x    | relu(F(x) + x)                                                                     |
| Eq. (2) y = F(x) + W x  | W: 1 x 1 filters with the stride, and a norm, where size or width change (option B) |
| Eq. (3) basic block     | F = norm(conv3 relu(norm(conv3 x)))                          depth 18, 34           |
| Eq. (4) bottleneck      | F = norm(conv1 relu(norm(conv3 relu(norm(conv1 x)))))        depth 50, 101, 152     |
| Eq. (5) the end         | y = fc(mean over places)                                                           |

Differs: the stride of a bottleneck is in its 3 x 3 filter; the last norm of each block starts at scale 0, so that the
    network starts as the identity (Goyal et al. 2017, arXiv:1706.02677). Names and shapes are torchvision's and timm's
    (ResNet-18: 11,689,512 parameters, 50: 25,557,032). stem "cifar": 3 x 3 filters, no stride, no pooling.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from funnelrec.core.config import keeps_config
from funnelrec.core.nn.convolution import begin, check_picture_arguments, small_pictures

__all__ = ["ResNet"]

LAYERS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class _Basic(nn.Module):
    """Two 3 x 3 convolutions.   Eq. (3)"""

    expansion = 1

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.downsample(x))  # Eq. (1), (2)


class _Bottleneck(nn.Module):
    """Narrow, 3 x 3, wide again.   Eq. (4)"""

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = _shortcut(channels, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        return torch.relu(self.bn3(self.conv3(y)) + self.downsample(x))  # Eq. (1), (2)


def _shortcut(channels: int, width: int, stride: int) -> nn.Module:
    if stride == 1 and channels == width:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))


@keeps_config
class ResNet(nn.Module):
    """Pictures to `num_classes` logits; 0 gives the vector before. `width`: maps of the first layer."""

    head_name = "fc"

    def __init__(
        self,
        *,
        depth: int = 18,
        in_channels: int = 3,
        num_classes: int = 1000,
        width: int = 64,
        stem: str = "imagenet",
    ) -> None:
        super().__init__()
        check_picture_arguments(in_channels, num_classes, width)
        if depth not in LAYERS:
            raise ValueError(f"a ResNet has a depth of {', '.join(map(str, LAYERS))}, received {depth}")
        small = small_pictures(stem)
        self.conv1 = nn.Conv2d(in_channels, width, *((3, 1, 1) if small else (7, 2, 3)), bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        block: type[_Basic] | type[_Bottleneck] = _Basic if depth < 50 else _Bottleneck
        channels = width
        for stage, count in enumerate(LAYERS[depth]):
            stride = 1 if stage == 0 else 2
            blocks: list[nn.Module] = []
            for n in range(count):
                blocks.append(block(channels, width << stage, stride if n == 0 else 1))
                channels = (width << stage) * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.num_features = channels
        self.fc = nn.Linear(channels, num_classes) if num_classes else nn.Identity()
        begin(self)
        for part in self.modules():
            if isinstance(part, _Basic | _Bottleneck):
                nn.init.zeros_((part.bn2 if isinstance(part, _Basic) else part.bn3).weight)

    def maps(self, content: Float[Tensor, "B C H W"]) -> Float[Tensor, "B M h w"]:
        """The last maps that still say where."""
        x: Tensor = self.maxpool(torch.relu(self.bn1(self.conv1(content))))
        for stage in range(1, 5):
            x = self.get_submodule(f"layer{stage}")(x)
        return x

    def pool(self, maps: Float[Tensor, "B M h w"]) -> Float[Tensor, "B D"]:
        """Maps to the vector that the last layer reads."""
        return maps.mean((2, 3))  # (B, D)

    def head(self, vector: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]:
        """Logits of the classes."""
        logits: Tensor = self.fc(vector)  # (B, K)   Eq. (5)
        return logits

    def forward(self, content: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Pictures, floating, normalised, to logits (or vectors when there are no classes)."""
        return self.head(self.pool(self.maps(content)))
