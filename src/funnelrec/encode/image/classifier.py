"""A network of this folder as it is trained and shipped: pixels in, logits out; the normalisation travels with it.

model = Classifier(ResNet(num_classes=2, in_channels=1), mean=(0.5,), std=(0.25,))
model(batch)                     # batch.image uint8 [B, C, H, W] -> logits [B, K]
model.freeze("layer1", "bn1")    # these parts no longer learn, nor do their norms count
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from funnelrec.core.batch import Batch

__all__ = ["Classifier", "pixel_statistics"]


def pixel_statistics(pixels: UInt8[Tensor, "N C H W"], most: int = 10_000) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of the first `most` pictures, in 0..1."""
    x = pixels[:most].float() / 255
    return x.mean((0, 2, 3)).tolist(), x.std((0, 2, 3)).clamp(min=1e-3).tolist()


class Classifier(nn.Module):
    """`network` (anything with maps, pool and head) behind (pixels / 255 - mean) / std."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(s > 0 for s in std):
            raise ValueError(f"mean and std need one number a channel, std above 0, received {mean} and {std}")
        self.network: Any = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))
        self.frozen: tuple[str, ...] = ()

    def content(self, pixels: UInt8[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """What the network reads, channels last in memory: convolutions are fastest so."""
        x = pixels.to(self.mean.dtype, memory_format=torch.channels_last)
        return x.mul(1 / (255 * self.std)).sub_(self.mean / self.std)

    def encode(self, pixels: UInt8[Tensor, "B C H W"]) -> Float[Tensor, "B D"]:
        """The vectors that the last layer reads."""
        vector: Tensor = self.network.pool(self.network.maps(self.content(pixels)))
        return vector

    def forward(self, batch: Batch) -> Float[Tensor, "B K"]:
        """Logits of `batch.image`."""
        logits: Tensor = self.network(self.content(batch.image))
        return logits

    def freeze(self, *parts: str) -> None:
        """These parts of the network, and only these, stop learning; "" is all of it.

        Their norms use the statistics they have and no longer gather any, in training mode too: a frozen weight in
        front of a norm that moves is not frozen. Raises ValueError for a part there is not.
        """
        for part in parts:
            if part and not any(n == part or n.startswith(f"{part}.") for n, _ in self.network.named_modules()):
                known = ", ".join(name for name, _ in self.network.named_children())
                raise ValueError(f"{type(self.network).__name__} has no part '{part}'; its parts are {known}")
        self.frozen = parts
        self.network.requires_grad_(True)
        for part in parts:
            self.network.get_submodule(part).requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Classifier:
        """As every module, but for the frozen parts."""
        super().train(mode)
        for part in self.frozen:
            self.network.get_submodule(part).eval()
        return self
