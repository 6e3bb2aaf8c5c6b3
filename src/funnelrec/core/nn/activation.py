"""Activations that learn: PReLU per channel and Dice, and the masked batch statistics that Dice stands on.

Channels are always the last axis. `mask` (True = real) keeps padded positions out of the batch statistics.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

__all__ = ["Activation", "Dice", "MaskedBatchNorm", "PReLU", "activation"]

Activation = Literal["relu", "prelu", "dice", "gelu", "tanh", "sigmoid", "identity"]


class MaskedBatchNorm(nn.Module):
    """Batch normalisation over the real positions of `[*, C]`.

    Training uses the statistics of the batch and moves the running ones; evaluation uses the running ones. A batch
    without any real position changes nothing.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, *, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.momentum = momentum
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(
        self, x: Float[Tensor, "*shape C"], mask: Bool[Tensor, "*shape"] | None = None
    ) -> Float[Tensor, "*shape C"]:
        """(x - mean) / √(variance + eps), times weight plus bias where there are any."""
        flat = x.reshape(-1, x.shape[-1])  # (P, C)
        if self.training and (mask is not None or flat.shape[0] < 2):
            centred, var = self._statistics(flat, None if mask is None else mask.reshape(-1))
            flat = centred * torch.rsqrt(var + self.eps)
            if self.weight is not None and self.bias is not None:
                flat = flat * self.weight + self.bias
        else:
            flat = F.batch_norm(
                flat,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                training=self.training,
                momentum=self.momentum,
                eps=self.eps,
            )
        return flat.reshape(x.shape)

    def _statistics(self, flat: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """x minus the mean over the real rows, and their biased variance; moves the running statistics (unbiased)."""
        real = flat.new_ones(flat.shape[0]) if mask is None else mask.to(flat.dtype)  # (P,)
        count = real.sum()
        share = real / count.clamp(min=1)
        mean = share @ flat  # (C,)
        centred = flat - mean  # (P, C)
        var = share @ centred.square()  # (C,)
        with torch.no_grad():
            step = self.momentum * (count > 0)
            self.running_mean.lerp_(mean, step)
            # one row has no unbiased variance: its mean counts, its variance does not
            unbiased = var * count / (count - 1).clamp(min=1)
            self.running_var.lerp_(unbiased, self.momentum * (count > 1))
        return centred, var


class Dice(nn.Module):
    """Dice, Eq. (9) of DIN (arXiv:1706.06978): f(s) = p·s + (1 - p)·α·s with p = σ((s - E[s]) / √(Var[s] + ε)).

    E and Var are per channel, of the real positions of the batch in training and moving averages in evaluation;
    α is learned per channel.
    """

    def __init__(self, channels: int, *, alpha: float = 0.0, eps: float = 1e-8) -> None:
        super().__init__()
        self.norm = MaskedBatchNorm(channels, eps=eps, affine=False)
        self.alpha = nn.Parameter(torch.full((channels,), alpha))

    def forward(
        self, x: Float[Tensor, "*shape C"], mask: Bool[Tensor, "*shape"] | None = None
    ) -> Float[Tensor, "*shape C"]:
        """The same shape; `mask` only chooses what enters the statistics."""
        p = torch.sigmoid(self.norm(x, mask))
        return x * (self.alpha + (1 - self.alpha) * p)


class PReLU(nn.Module):
    """max(0, x) + α·min(0, x), α learned for every channel of the last axis (torch's own looks at axis 1)."""

    def __init__(self, channels: int, *, alpha: float = 0.25) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((channels,), alpha))

    def forward(self, x: Float[Tensor, "*shape C"]) -> Float[Tensor, "*shape C"]:
        """The same shape."""
        return F.prelu(x.reshape(-1, x.shape[-1]), self.alpha).view(x.shape)


def activation(name: str, channels: int) -> nn.Module:
    """The activation called `name` for `channels` channels on the last axis."""
    if name == "prelu":
        return PReLU(channels)
    if name == "dice":
        return Dice(channels)
    plain: dict[str, type[nn.Module]] = {
        "relu": nn.ReLU,
        "gelu": nn.GELU,
        "tanh": nn.Tanh,
        "sigmoid": nn.Sigmoid,
        "identity": nn.Identity,
    }
    if name not in plain:
        raise ValueError(f"activation must be one of {', '.join(sorted([*plain, 'prelu', 'dice']))}, received {name!r}")
    return plain[name]()
