"""LeNet-5: two convolutions and three linear layers, the network that read cheques.

Paper: LeCun, Bottou, Bengio, Haffner. Gradient-based learning applied to document recognition. Proceedings of the IEEE
    1998.
Idea:  small filters that are the same everywhere, then halving the picture, twice; what is left goes to an MLP.

| paper              | here                                                             |
|--------------------|------------------------------------------------------------------|
| Eq. (1) C1, S2     | x ← pool(relu(conv1 x))        6 maps, 5 x 5                     |
| Eq. (2) C3, S4     | x ← pool(relu(conv2 x))        16 maps, 5 x 5                    |
| Eq. (3) C5, F6     | v = relu(fc2 relu(fc1 x))      120 and 84 units                  |
| Eq. (4) output     | y = fc3 v                                                        |

Differs: ReLU and maximum for tanh and trained means; every map of C3 sees all of S2; linear output for RBF units.
    61,706 parameters with ten classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from funnelrec.core.config import keeps_config
from funnelrec.core.nn.convolution import begin, check_picture_arguments

__all__ = ["LeNet"]


@keeps_config
class LeNet(nn.Module):
    """Pictures of 32 x 32 (28 x 28 gets two pixels of margin) to `num_classes` logits; 0 gives the 84 numbers before.

    `width` multiplies nothing but the maps: 6 · width and 16 · width.
    """

    head_name = "fc3"

    def __init__(self, *, in_channels: int = 1, num_classes: int = 10, width: int = 1) -> None:
        super().__init__()
        check_picture_arguments(in_channels, num_classes, width)
        self.num_features = 84
        self.conv1 = nn.Conv2d(in_channels, 6 * width, 5)
        self.conv2 = nn.Conv2d(6 * width, 16 * width, 5)
        self.fc1 = nn.Linear(16 * width * 25, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes) if num_classes else nn.Identity()
        begin(self)

    def maps(self, content: Float[Tensor, "B C H W"]) -> Float[Tensor, "B M h w"]:
        """The last maps that still say where."""
        if content.shape[-1] == 28:
            content = F.pad(content, (2, 2, 2, 2))
        if content.shape[-2:] != (32, 32):
            raise ValueError(f"LeNet reads 28 x 28 or 32 x 32 pixels, received {list(content.shape[-2:])}; use resnet")
        x = F.max_pool2d(torch.relu(self.conv1(content)), 2)  # (B, 6, 14, 14)   Eq. (1)
        return torch.relu(self.conv2(x))  # (B, 16, 10, 10)   Eq. (2)

    def pool(self, maps: Float[Tensor, "B M h w"]) -> Float[Tensor, "B D"]:
        """Maps to the vector that the last layer reads."""
        x = F.max_pool2d(maps, 2).flatten(1)  # (B, 400)
        return torch.relu(self.fc2(torch.relu(self.fc1(x))))  # (B, 84)   Eq. (3)

    def head(self, vector: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]:
        """Logits of the classes."""
        logits: Tensor = self.fc3(vector)  # (B, K)   Eq. (4)
        return logits

    def forward(self, content: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Pictures, floating, normalised, to logits (or vectors when there are no classes)."""
        return self.head(self.pool(self.maps(content)))
