"""Margin loss and masked reconstruction: what trains a capsule network (encode/image/capsnet.py).

    fit(CapsNet(), batches, MarginLoss(), epochs=10)

Sabour, Frosst, Hinton 2017, Eq. (4) and Section 4.1:

    L_k = T_k max(0, m⁺ - |v_k|)² + λ (1 - T_k) max(0, |v_k| - m⁻)²,   summed over the classes
    L   = Σ_k L_k + w Σ_pixels (drawn - picture)²,                     mean over the batch
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from funnelrec.core.batch import Batch

__all__ = ["MarginLoss", "margin"]


def margin(
    lengths: Float[Tensor, "B K"],
    label: Int[Tensor, "B"],
    *,
    present: float = 0.9,
    absent: float = 0.1,
    down: float = 0.5,
) -> Float[Tensor, "B"]:
    """Eq. (4) of each row: m⁺, m⁻ and λ are `present`, `absent` and `down`."""
    own = F.one_hot(label, lengths.shape[1]).to(lengths.dtype)
    short = own * torch.relu(present - lengths).square()
    long = (1 - own) * torch.relu(lengths - absent).square()
    return (short + down * long).sum(1)


@dataclass(frozen=True)
class MarginLoss:
    """Mean margin loss of a `CapsNet` on `batch.image` (uint8) and `batch.label`, plus its reconstruction error.

    reconstruction: w; the capsule of the true class draws. The error is a sum over pixels, so 0.0005 is 0.392 of a mean
    over 784. The authors' code divides the margins by 20 and keeps w, which is as much as w = 0.01 here.
    """

    reconstruction: float = 0.0005
    present: float = 0.9
    absent: float = 0.1
    down: float = 0.5

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        content = batch.image.float() / 255
        capsules = model.capsules(content)  # (B, K, D)
        lengths = torch.linalg.vector_norm(capsules, dim=2)
        loss = margin(lengths, batch.label, present=self.present, absent=self.absent, down=self.down).mean()
        if self.reconstruction and model.decoder is not None:
            drawn = model.decode(capsules, batch.label)
            loss = loss + self.reconstruction * (drawn - content).square().sum((1, 2, 3)).mean()
        return loss
