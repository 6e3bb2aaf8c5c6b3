"""Augmentations: small vectorised functions of whole batches of pictures, uint8 [B, C, H, W] in and out.

    augment = Augment(crop=4, flip=True, cutout=8)
    ImageExamples(images, rows, augment=augment)

Each draws from the generator that it is given and from nothing else, each picture has numbers of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor

__all__ = ["Augment", "affine", "crop", "cutout", "flip", "jitter"]


def crop(
    pictures: UInt8[Tensor, "B C H W"], padding: int, generator: torch.Generator, side: int = 0
) -> UInt8[Tensor, "B C h w"]:
    """A window anywhere in the picture padded with zeros, of the picture's size or of `side` x `side` pixels."""
    b, c, height, width = pictures.shape
    h, w = (side, side) if side else (height, width)
    top = torch.randint(0, height + 2 * padding - h + 1, (b, 1), generator=generator)
    left = torch.randint(0, width + 2 * padding - w + 1, (b, 1), generator=generator)
    rows = (top + torch.arange(h)).view(b, 1, h, 1)
    columns = (left + torch.arange(w)).view(b, 1, 1, w)
    padded = F.pad(pictures, (padding,) * 4)
    return padded[torch.arange(b).view(b, 1, 1, 1), torch.arange(c).view(1, c, 1, 1), rows, columns]


def flip(pictures: UInt8[Tensor, "B C H W"], generator: torch.Generator) -> UInt8[Tensor, "B C H W"]:
    """Half of the pictures mirrored left to right."""
    mirrored = torch.rand(len(pictures), generator=generator) < 0.5
    return torch.where(mirrored.view(-1, 1, 1, 1), pictures.flip(3), pictures)


def cutout(pictures: UInt8[Tensor, "B C H W"], size: int, generator: torch.Generator) -> UInt8[Tensor, "B C H W"]:
    """A grey square around a random point (DeVries and Taylor 2017, arXiv:1708.04552); it may reach over the edge."""
    b, _, height, width = pictures.shape
    y = torch.randint(0, height, (b, 1), generator=generator) - torch.arange(height)  # (B, H)
    x = torch.randint(0, width, (b, 1), generator=generator) - torch.arange(width)  # (B, W)
    low, high = -(size // 2), (size - 1) // 2
    hole = ((y >= low) & (y <= high)).unsqueeze(2) & ((x >= low) & (x <= high)).unsqueeze(1)  # (B, H, W)
    return pictures.masked_fill(hole.unsqueeze(1), 127)


def jitter(
    pictures: UInt8[Tensor, "B C H W"],
    brightness: float,
    contrast: float,
    saturation: float,
    generator: torch.Generator,
) -> UInt8[Tensor, "B C H W"]:
    """Light, contrast and colour each times a factor within 1 ± its argument; saturation needs three channels."""
    b = len(pictures)
    light, spread, colour = 1 + (2 * torch.rand(3, b, 1, 1, 1, generator=generator) - 1) * torch.tensor(
        [brightness, contrast, saturation]
    ).view(3, 1, 1, 1, 1)
    x: Tensor = pictures.float() * light
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + (x - mean) * spread
    if pictures.shape[1] == 3 and saturation:
        grey = (x * x.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
        x = grey + (x - grey) * colour
    return x.round_().clamp_(0, 255).to(torch.uint8)


def affine(
    pictures: UInt8[Tensor, "B C H W"],
    degrees: int | float,
    zoom: tuple[float, float],
    shift: float,
    generator: torch.Generator,
) -> UInt8[Tensor, "B C H W"]:
    """Turned by up to ± `degrees`, scaled by a factor within `zoom`, shifted by up to ± `shift` of the size."""
    b, c, height, width = pictures.shape
    u = torch.rand(4, b, generator=generator)
    angle = (2 * u[0] - 1) * math.radians(degrees)
    scale = 1 / (zoom[0] + (zoom[1] - zoom[0]) * u[1])
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    matrix = torch.stack([cos, -sin, (2 * u[2] - 1) * 2 * shift, sin, cos, (2 * u[3] - 1) * 2 * shift], 1)
    grid = F.affine_grid(matrix.view(b, 2, 3), [b, c, height, width], align_corners=False)
    seen = F.grid_sample(pictures.float(), grid, align_corners=False)
    return seen.round_().clamp_(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Augment:
    """The steps that are wanted, in a fixed order; a step whose number is 0 is left out.

    degrees, zoom, shift: of `affine`. crop: padding. window: side of the
    crop, 0 for the whole size. cutout: side of the square. brightness, contrast, saturation: of
    `jitter`.
    """

    degrees: int | float = 0.0
    zoom: tuple[float, float] = (1.0, 1.0)
    shift: float = 0.0
    crop: int = 0
    window: int = 0
    flip: bool = False
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    cutout: int = 0

    def __call__(self, pictures: UInt8[Tensor, "B C H W"], generator: torch.Generator) -> UInt8[Tensor, "B C h w"]:
        if self.degrees or self.shift or self.zoom != (1.0, 1.0):
            pictures = affine(pictures, self.degrees, self.zoom, self.shift, generator)
        if self.crop or self.window:
            pictures = crop(pictures, self.crop, generator, self.window)
        if self.flip:
            pictures = flip(pictures, generator)
        if self.brightness or self.contrast or self.saturation:
            pictures = jitter(pictures, self.brightness, self.contrast, self.saturation, generator)
        if self.cutout:
            pictures = cutout(pictures, self.cutout, generator)
        return pictures
