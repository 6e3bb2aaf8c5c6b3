"""CapsNet: its size, its routing, its losses."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from funnelrec.core.batch import Batch
from funnelrec.core.nn.capsule import squash
from funnelrec.data.batches import Batches
from funnelrec.data.images import ImageExamples, Images
from funnelrec.encode.image.capsnet import CapsNet
from funnelrec.learn.fit import fit
from funnelrec.learn.margin import MarginLoss, margin

TINY: dict[str, Any] = {"width": 8, "capsule_types": 2, "hidden": (16,), "num_classes": 3, "embedding_dim": 4}


def tiny(**changes: Any) -> CapsNet:
    torch.manual_seed(0)
    return CapsNet(**{**TINY, **changes}).eval()


def test_as_many_parameters_as_published() -> None:
    with torch.device("meta"):
        full, bare = CapsNet(), CapsNet(hidden=())
    assert sum(p.numel() for p in full.parameters()) == 8_215_568
    assert sum(p.numel() for p in bare.parameters()) == 6_804_224


def test_lengths_are_below_one_and_a_picture_stands_alone() -> None:
    network, pictures = tiny(), torch.rand(5, 1, 28, 28)
    lengths = network(pictures)
    assert lengths.shape == (5, 3)
    assert bool((lengths >= 0).all())
    assert bool((lengths < 1).all())
    assert torch.allclose(network(pictures[2:3]), lengths[2:3], atol=1e-6)


def test_a_capsule_is_eight_maps_at_one_place() -> None:
    network, pictures = tiny(), torch.rand(1, 1, 28, 28)
    maps = network.primary(torch.relu(network.conv1(pictures)))  # (1, 16, 6, 6)
    capsules = network.primary_capsules(pictures)  # (1, 72, 8)
    type_, row, column = 1, 4, 2
    expected = squash(maps[0, 8 * type_ : 8 * type_ + 8, row, column])
    assert torch.allclose(capsules[0, type_ * 36 + row * 6 + column], expected)


def test_one_iteration_is_the_squashed_mean_of_the_votes() -> None:
    network, pictures = tiny(iterations=1), torch.rand(2, 1, 28, 28)
    u = network.primary_capsules(pictures)
    votes = torch.einsum("bik,ijdk->bijd", u, network.votes)
    assert torch.allclose(network.capsules(pictures), squash(votes.sum(1) / 3), atol=1e-6)


def test_detaching_changes_gradients_and_no_value() -> None:
    free, held, pictures = tiny(detach=False), tiny(), torch.rand(2, 1, 28, 28)
    assert torch.equal(free(pictures), held(pictures))
    for network in (free, held):
        network(pictures).sum().backward()
    assert not torch.allclose(free.votes.grad, held.votes.grad)  # type: ignore[arg-type]


def test_margin_by_hand() -> None:
    label = torch.tensor([3])
    right = torch.full((1, 10), 0.1)
    right[0, 3] = 0.9
    assert margin(right, label).item() == 0
    assert margin(torch.zeros(1, 10), label).item() == pytest.approx(0.81)
    assert margin(torch.ones(1, 10), label).item() == pytest.approx(0.5 * 9 * 0.81)


def test_only_the_capsule_of_the_label_draws() -> None:
    network = tiny()
    capsules = torch.randn(2, 3, 4)
    label = torch.tensor([1, 2])
    drawn = network.decode(capsules, label)
    changed = capsules.clone()
    changed[0, [0, 2]] += 1
    changed[1, :2] += 1
    assert torch.equal(network.decode(changed, label), drawn)
    assert not torch.equal(network.decode(capsules + 1, label), drawn)
    with pytest.raises(ValueError, match="no decoder"):
        tiny(hidden=()).decode(capsules, label)


def test_the_reconstruction_is_a_sum_over_pixels() -> None:
    network = tiny()
    batch = Batch(image=torch.randint(0, 256, (4, 1, 28, 28), dtype=torch.uint8), label=torch.tensor([0, 1, 2, 0]))
    content = batch.image.float() / 255
    drawn = network.decode(network.capsules(content), batch.label)
    extra = MarginLoss()(network, batch) - MarginLoss(reconstruction=0.0)(network, batch)
    assert extra.item() == pytest.approx(0.0005 * 784 * (drawn - content).square().mean().item(), rel=1e-3)


def test_it_learns_where_a_bar_lies() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 60, (240, 1, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.arange(240) % 3
    for row, label in enumerate(labels.tolist()):
        pixels[row, 0, 4 + 8 * label : 8 + 8 * label] = 255
    network = tiny()
    examples = ImageExamples(Images(pixels, labels, ("top", "middle", "bottom")))
    fit(network, Batches(examples, 40, shuffle=True), MarginLoss(), epochs=6, lr=5e-3, progress=False)
    assert (network(pixels.float() / 255).argmax(1) == labels).double().mean() > 0.95


def test_pictures_that_are_too_small() -> None:
    with pytest.raises(ValueError, match=re.escape("at least 17 pixels, received 16")):
        CapsNet(size=16)
