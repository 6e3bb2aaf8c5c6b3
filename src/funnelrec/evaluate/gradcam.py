"""Grad-CAM: the places of a picture that speak for a class.

Selvaraju et al. Grad-CAM: visual explanations from deep networks via gradient-based localization. ICCV 2017.

    a_m = mean over places of ∂ y_class / ∂ A_m          Eq. (1), A the last maps
    L   = relu(Σ_m a_m A_m)                              Eq. (2)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["grad_cam"]


def grad_cam(network: Any, content: Float[Tensor, "B C H W"], classes: Int[Tensor, "B"]) -> Float[Tensor, "B H W"]:
    """Heat in 0..1 for the logit of `classes`, at the size of the pictures; all 0 where nothing speaks for the class.

    `network` has maps, pool and head (encode/image). Its weights receive no gradient and its mode is kept.
    """
    with torch.no_grad():
        maps = network.maps(content)
    maps = maps.detach().requires_grad_()
    with torch.enable_grad():
        logits = network.head(network.pool(maps))
        chosen = logits.gather(1, classes.unsqueeze(1)).sum()  # a sum: each picture depends on its own maps alone
        (slope,) = torch.autograd.grad(chosen, maps)
    weight = slope.mean((2, 3), keepdim=True)  # (B, M, 1, 1)   Eq. (1)
    heat = torch.relu((weight * maps.detach()).sum(1, keepdim=True))  # (B, 1, h, w)   Eq. (2)
    heat = F.interpolate(heat, size=content.shape[2:], mode="bilinear", align_corners=False).squeeze(1)
    scaled: Tensor = heat / heat.amax((1, 2), keepdim=True).clamp(min=torch.finfo(heat.dtype).tiny)
    return scaled
