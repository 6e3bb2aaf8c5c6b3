"""Contrastive losses of pictures: instances (SimCLR), labels (SupCon), weak labels (WCL, encode/image/wcl.py).

examples = ImageExamples(images, rows, augment=augment, views=2)
fit(WCL(), Batches(examples, 256, shuffle=True, drop_last=True), WeakContrast(mean, std), epochs=15)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from funnelrec.core.batch import Batch
from funnelrec.data.images import ImageExamples, Images

__all__ = ["NearExamples", "WeakContrast", "instance_contrast", "purity", "supervised_contrast"]


def instance_contrast(
    one: Float[Tensor, "B D"], two: Float[Tensor, "B D"], temperature: float = 0.1
) -> Float[Tensor, ""]:
    """NT-Xent (Chen et al. 2020, Eq. (1)): of 2B - 1 other vectors, all of length 1, each finds its other view."""
    z = torch.cat([one, two])  # (2B, D)
    similar = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    other = torch.arange(len(z), device=z.device).roll(len(one))
    return F.cross_entropy(similar, other)


def supervised_contrast(
    v: Float[Tensor, "B D"],
    labels: Int[Tensor, "B"],
    temperature: float = 0.1,
    others: Float[Tensor, "B D"] | None = None,
) -> Float[Tensor, ""]:
    """- mean over positives of log softmax (Khosla et al. 2020, Eq. (2)); positives have the same label.

    Rows are compared among themselves, each without itself, or with `others`, rows of the same labels (then each with
    its own too). A row without a positive counts nothing.
    """
    similar = v @ (v if others is None else others).T / temperature  # (B, B)
    same = labels.unsqueeze(0) == labels.unsqueeze(1)
    if others is None:
        itself = torch.eye(len(v), dtype=torch.bool, device=v.device)
        similar, same = similar.masked_fill(itself, -torch.inf), same & ~itself
    log_p = similar.log_softmax(1).masked_fill(~same, 0.0)  # (B, B)
    count = same.sum(1)
    each = -log_p.sum(1) / count.clamp(min=1)
    return each.sum() / (count > 0).sum().clamp(min=1)


@dataclass(frozen=True)
class WeakContrast:
    """Instance contrast plus `weak` times the swapped supervised contrast, of a `WCL` on `image` and `image2`.

    mean, std: of the pixels, in 0..1, a number a channel. weak 0 is SimCLR. Where the batch has `near`, pictures of
    each row's neighbours (KNN multi-crop), they are positives too.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    temperature: float = 0.1
    weak: float = 1.0

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        views = [self.content(pixels) for pixels in (batch.image, batch.image2)]
        z, v = model.heads(torch.cat(views))  # (2B, D) each
        b = batch.size
        loss = instance_contrast(z[:b], z[b:], self.temperature)
        if not self.weak:
            return loss
        labels = [model.weak_labels(part.detach()) for part in (v[:b], v[b:])]
        swapped = (
            (  # the labels of one view teach the other: its own neighbours are near already
                supervised_contrast(v[:b], labels[1], self.temperature)
                + supervised_contrast(v[b:], labels[0], self.temperature)
            )
            / 2
        )
        if "near" in batch:
            near = model.heads(self.content(batch.near))[1]
            swapped = swapped + supervised_contrast(v[:b], labels[1], self.temperature, near)
        return loss + self.weak * swapped

    def content(self, pixels: Tensor) -> Tensor:
        """What the encoder reads."""
        x = pixels.float() / 255
        return (x - x.new_tensor(self.mean).view(1, -1, 1, 1)) / x.new_tensor(self.std).view(1, -1, 1, 1)


def purity(weak: Int[Tensor, "B"], true: Int[Tensor, "B"]) -> tuple[float, float]:
    """Of all pairs with one weak label the share of the same class; and the pairs' share of all of one class."""
    pair = (weak.unsqueeze(0) == weak.unsqueeze(1)).fill_diagonal_(False)
    same = (true.unsqueeze(0) == true.unsqueeze(1)).fill_diagonal_(False)
    both = float((pair & same).sum())
    return both / max(float(pair.sum()), 1.0), both / max(float(same.sum()), 1.0)


class NearExamples(ImageExamples):
    """`ImageExamples` of two views with `near`: a low-resolution crop of one of each row's K nearest pictures.

    neighbours: int64 [rows, K], numbers of rows of this object, found once an epoch from the stored vectors. small:
    (pictures, generator) -> pictures, the crop.
    """

    def __init__(
        self,
        images: Images,
        rows: Int[Tensor, "n"],
        neighbours: Int[Tensor, "n K"],
        *,
        augment: Callable[[Tensor, torch.Generator], Tensor],
        small: Callable[[Tensor, torch.Generator], Tensor],
    ) -> None:
        super().__init__(images, rows, augment=augment, views=2)
        self.neighbours = neighbours
        self.small = small

    def gather(self, index: Int[Tensor, "B"], generator: torch.Generator | None) -> Batch:
        """As of `ImageExamples`, and `near`."""
        batch = super().gather(index, generator)
        choices = self.neighbours[index]  # (B, K)
        which = torch.randint(choices.shape[1], (len(index), 1), generator=generator)
        pixels = self.images.pixels[self.rows[choices.gather(1, which).squeeze(1)]]
        return batch.replace(near=pixels if generator is None else self.small(pixels, generator))

    @staticmethod
    def nearest(vectors: Float[Tensor, "n D"], k: int = 4) -> Int[Tensor, "n k"]:
        """The k other rows of largest cosine, in chunks."""
        unit = F.normalize(vectors, dim=1)
        found = []
        for start in range(0, len(unit), 1024):
            similar = unit[start : start + 1024] @ unit.T
            own = torch.arange(start, start + len(similar))
            similar[own - start, own] = -torch.inf
            found.append(similar.topk(k, 1).indices)
        return torch.cat(found)
