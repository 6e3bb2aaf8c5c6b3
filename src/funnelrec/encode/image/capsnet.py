"""CapsNet: groups of neurons whose length says that something is there and whose direction says how.

Paper: Sabour, Frosst, Hinton. Dynamic routing between capsules. NIPS 2017. arXiv:1710.09829.
Idea:  a part (primary capsule) predicts the whole (digit capsule) that it belongs to; wholes on which many predictions
    agree get more of them. The capsule of the right class must hold enough to draw the picture again.

| paper                                     | here                                                            |
|-------------------------------------------|-----------------------------------------------------------------|
| Eq. (1) v = |s|²/(1+|s|²) · s/|s|         | core/nn/capsule.py, squash                                      |
| Eq. (2) s_j = Σ_i c_ij û_j|i, û = W_ij u_i | votes [B, I, J, D], W [I, J, D, d]; core/nn/capsule.py, route   |
| Eq. (3) c_i = softmax_j b_ij              | over the J digit capsules, logits of each picture by itself     |
| Eq. (4) margin loss                       | learn/margin.py                                                 |
| Section 4.1 reconstruction                | all capsules but one set to 0, 512, 1024, pixels by a sigmoid   |

Differs: logits pass no gradient before the last iteration (`detach`; same values). No bias in the digit capsules.
    Squash and routing in float32. 8,215,568 parameters for 28 x 28 pictures and ten classes, 6,804,224 of them before
    the decoder.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from funnelrec.core.config import keeps_config
from funnelrec.core.nn.capsule import route, squash

__all__ = ["CapsNet"]


@keeps_config
class CapsNet(nn.Module):
    """Pictures in 0..1 to the lengths of `num_classes` capsules, each between 0 and 1; they need not sum to 1.

    width: maps of the first layer. capsule_types: kinds of primary capsules of 8 numbers. embedding_dim: numbers of a
    digit capsule. hidden: the decoder's layers, none for no reconstruction.
    """

    def __init__(
        self,
        *,
        size: int = 28,
        in_channels: int = 1,
        num_classes: int = 10,
        width: int = 256,
        capsule_types: int = 32,
        embedding_dim: int = 16,
        hidden: Sequence[int] = (512, 1024),
        iterations: int = 3,
        detach: bool = True,
    ) -> None:
        super().__init__()
        side = (size - 8 - 9) // 2 + 1
        if side < 1:
            raise ValueError(f"two layers of 9 x 9 filters need pictures of at least 17 pixels, received {size}")
        self.iterations, self.detach, self.types = iterations, detach, capsule_types
        self.shape = (in_channels, size, size)
        self.num_features = num_classes * embedding_dim
        self.conv1 = nn.Conv2d(in_channels, width, 9)
        self.primary = nn.Conv2d(width, 8 * capsule_types, 9, stride=2)
        self.votes = nn.Parameter(torch.empty(capsule_types * side * side, num_classes, embedding_dim, 8))
        nn.init.normal_(self.votes, std=0.1)
        layers: list[nn.Module] = []
        last = num_classes * embedding_dim
        for units in hidden:
            layers += [nn.Linear(last, units), nn.ReLU()]
            last = units
        self.decoder = nn.Sequential(*layers, nn.Linear(last, in_channels * size * size)) if hidden else None

    def primary_capsules(self, content: Float[Tensor, "B C H W"]) -> Float[Tensor, "B I d"]:
        """One capsule of 8 numbers for each type and place."""
        maps = self.primary(torch.relu(self.conv1(content)))  # (B, 8·types, h, w)
        capsules = maps.unflatten(1, (self.types, 8)).permute(0, 1, 3, 4, 2).flatten(1, 3)  # (B, types·h·w, 8)
        return squash(capsules.float())  # Eq. (1)

    def capsules(self, content: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K D"]:
        """The digit capsules."""
        u = self.primary_capsules(content)  # (B, I, 8)
        i, k, d, _ = self.votes.shape
        votes = torch.bmm(u.transpose(0, 1), self.votes.flatten(1, 2).transpose(1, 2))  # (I, B, K·D)
        votes = votes.transpose(0, 1).reshape(len(u), i, k, d).float()  # (B, I, K, D)   Eq. (2)
        with torch.autocast(content.device.type, enabled=False):
            return route(votes, iterations=self.iterations, detach=self.detach)  # (B, K, D)   Eq. (2), (3)

    def decode(self, capsules: Float[Tensor, "B K D"], label: Int[Tensor, "B"]) -> Float[Tensor, "B C H W"]:
        """The picture drawn from the capsule of class `label` alone, in 0..1."""
        if self.decoder is None:
            raise ValueError("this network has no decoder: build it with hidden=(512, 1024)")
        chosen = F.one_hot(label, capsules.shape[1]).unsqueeze(2).to(capsules.dtype)  # (B, K, 1)
        drawn = torch.sigmoid(self.decoder((capsules * chosen).flatten(1)).float())
        return drawn.view(-1, *self.shape)

    def forward(self, content: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Lengths of the digit capsules."""
        lengths: Tensor = torch.linalg.vector_norm(self.capsules(content), dim=2)
        return lengths
