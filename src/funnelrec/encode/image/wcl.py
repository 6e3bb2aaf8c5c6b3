"""WCL: pictures learnt without labels, by contrast with weak labels that the pictures give one another.

Paper: Zheng, Wang, You, Qian, Zhang, Wang, Xu. Weakly supervised contrastive learning. ICCV 2021. arXiv:2110.04770.
Idea:  instance contrast pushes all other pictures away, those of the same class too. So link each picture to its
    nearest neighbour; what hangs together is taken for a class, and a second head is trained to keep it together.

| paper                                      | here                                                              |
|--------------------------------------------|-------------------------------------------------------------------|
| Eq. (1) instance loss                      | learn/contrast.py, `instance_contrast` of head g                  |
| Eq. (2) A_ij = 1 if j = nn(i) or i = nn(j) | `weak_labels`: the edges of the graph                             |
| Eq. (3) y = connected component            | `weak_labels`: the least index that can be reached                |
| Eq. (4), (5) supervised contrast, swapped  | learn/contrast.py, `supervised_contrast` of head φ, with the      |
|                                            | labels of the other view                                          |
| Section 3.4 KNN multi-crop                 | learn/contrast.py, `NearExamples`; off unless batches hold `near` |

Differs: for pictures of 28 to 64 pixels on one machine, so nothing is gathered over devices; the optimiser is `fit`'s.
    Use batches of 256 or more: in small ones a picture's nearest neighbour is of another class too often.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from funnelrec.core.config import keeps_config
from funnelrec.encode.image.named import build

__all__ = ["WCL"]


def _head(features: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(features, hidden), nn.BatchNorm1d(hidden), nn.ReLU(),
        nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.ReLU(),
        nn.Linear(hidden, out),
    )  # fmt: skip


@keeps_config
class WCL(nn.Module):
    """An encoder (a name of encode/image/named.py) with the two heads that train it.

    hidden: width of the heads' layers. embedding_dim: of their output. After training only `forward` is used.
    """

    def __init__(
        self,
        *,
        encoder: str = "lenet",
        size: int = 28,
        in_channels: int = 1,
        width: int | None = None,
        hidden: int = 128,
        embedding_dim: int = 64,
    ) -> None:
        super().__init__()
        encoding: Any = build(encoder, size=size, in_channels=in_channels, num_classes=0, width=width)
        self.encoder = encoding
        self.num_features: int = encoding.num_features
        self.instance = _head(self.num_features, hidden, embedding_dim)  # g
        self.weak = _head(self.num_features, hidden, embedding_dim)  # φ

    def heads(self, content: Float[Tensor, "B C H W"]) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B D"]]:
        """What g and φ make of the pictures, of length 1."""
        h = self.encoder(content)
        return F.normalize(self.instance(h).float(), dim=1), F.normalize(self.weak(h).float(), dim=1)

    @staticmethod
    @torch.no_grad()
    def weak_labels(v: Float[Tensor, "B D"]) -> Int[Tensor, "B"]:
        """The connected component of each picture in the graph of nearest neighbours: the least row in it.

        Every component has at least two members, so every picture has a positive. They mean nothing beyond this batch.
        """
        if len(v) < 2:
            raise ValueError(f"weak labels need a batch of at least 2 pictures, received {len(v)}; use drop_last=True")
        nearest = (v @ v.T).fill_diagonal_(-torch.inf).argmax(1)  # Eq. (2)
        label = torch.arange(len(v), device=v.device)
        while True:  # Eq. (3)
            least = torch.minimum(label, label[nearest])
            least = least.scatter_reduce(0, nearest, least, "amin")
            least = least[least]  # where the least row found so far has come to: halves the rounds
            if torch.equal(least, label):
                return label
            label = least

    def forward(self, content: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D"]:
        """Vectors of pictures, floating, normalised."""
        vectors: Tensor = self.encoder(content)
        return vectors
