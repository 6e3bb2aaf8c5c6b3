"""WCL: the graph, the losses, and a picture-less planted answer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from funnelrec.core.batch import Batch
from funnelrec.data.images import Images
from funnelrec.encode.image.wcl import WCL
from funnelrec.learn.contrast import NearExamples, WeakContrast, instance_contrast, purity, supervised_contrast


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_components_by_hand() -> None:
    # on a circle, degrees: 0 and 10 find each other, 25 finds 10; 100 and 104 find each other; 180 finds 104
    angles = torch.tensor([0.0, 10, 25, 100, 104, 180]) * math.pi / 180
    v = torch.stack([angles.cos(), angles.sin()], 1)
    assert WCL.weak_labels(v).tolist() == [0, 0, 0, 3, 3, 3]


def test_a_long_chain_is_one_component() -> None:
    angles = torch.cumsum(torch.linspace(0.001, 0.02, 100).flip(0), 0)  # each is nearest to the next
    v = torch.stack([angles.cos(), angles.sin()], 1).double()
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    assert WCL.weak_labels(v[order]).unique().tolist() == [0]


@pytest.mark.parametrize("b", [2, 3, 64, 257])
def test_nobody_is_alone_and_order_does_not_matter(b: int) -> None:
    v = unit(b, 8)
    labels = WCL.weak_labels(v)
    assert int(torch.bincount(labels)[labels].min()) >= 2
    order = torch.randperm(b, generator=torch.Generator().manual_seed(1))
    again = WCL.weak_labels(v[order])
    same, mixed = labels[order].unsqueeze(0) == labels[order].unsqueeze(1), again.unsqueeze(0) == again.unsqueeze(1)
    assert torch.equal(same, mixed)
    with pytest.raises(ValueError, match="at least 2 pictures, received 1"):
        WCL.weak_labels(v[:1])


def test_clusters_far_apart_are_never_joined() -> None:
    centres = torch.eye(8)[torch.arange(64) % 8]
    v = F.normalize(centres + 0.05 * torch.randn(64, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    assert purity(WCL.weak_labels(v), torch.arange(64) % 8)[0] == 1.0
    assert purity(WCL.weak_labels(unit(64, 8)), torch.arange(64) % 8)[0] < 0.4  # the control


def test_losses_by_hand() -> None:
    same = torch.ones(6, 1)
    assert supervised_contrast(same, torch.zeros(6, dtype=torch.int64)).item() == pytest.approx(math.log(5))
    basis = torch.eye(8)
    expected = math.log(1 + (2 * 8 - 2) * math.exp(-10))
    assert instance_contrast(basis, basis, 0.1).item() == pytest.approx(expected, rel=1e-3)
    z = unit(6, 4)  # pairs (0, 3), (1, 4), (2, 5) as components of their own: NT-Xent
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    assert supervised_contrast(z, labels).item() == pytest.approx(instance_contrast(z[:3], z[3:]).item(), rel=1e-5)
    alone = supervised_contrast(z, torch.arange(6))
    assert alone.item() == 0.0


def batch(**more: torch.Tensor) -> Batch:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 8, 1, 28, 28), generator=generator, dtype=torch.uint8)
    return Batch(image=pixels[0], image2=pixels[1], **more)


def model() -> WCL:
    torch.manual_seed(0)
    return WCL(hidden=16, embedding_dim=8)


class Heads:
    """What `WeakContrast` asks of a model, with vectors that are given."""

    weak_labels = staticmethod(WCL.weak_labels)

    def heads(self, content: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return unit(16, 4), unit(16, 4, seed=1)


def test_labels_are_those_of_the_other_view() -> None:
    z, v = Heads().heads(torch.empty(0))
    one, two = WCL.weak_labels(v[:8]), WCL.weak_labels(v[8:])
    swapped = (supervised_contrast(v[:8], two) + supervised_contrast(v[8:], one)) / 2
    own = (supervised_contrast(v[:8], one) + supervised_contrast(v[8:], two)) / 2
    found = WeakContrast((0.1,), (0.3,))(Heads(), batch()) - instance_contrast(z[:8], z[8:])
    assert found.item() == pytest.approx(swapped.item(), rel=1e-5)
    assert found.item() != pytest.approx(own.item(), rel=0.05)  # the control: the same view's labels would show


def test_weights_reach_the_right_head() -> None:
    for weak, touched in ((0.0, False), (1.0, True)):
        network = model()
        WeakContrast((0.1,), (0.3,), weak=weak)(network, batch()).backward()
        assert network.instance[0].weight.grad is not None
        assert (network.weak[0].weight.grad is not None) == touched


def test_neighbours_are_positives_too() -> None:
    network, loss = model().eval(), WeakContrast((0.1,), (0.3,))
    plain = loss(network, batch()).item()
    assert loss(network, batch(near=batch().image)).item() > plain
    vectors = torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1], [0.1, 0.9]])
    assert NearExamples.nearest(vectors, 1).squeeze(1).tolist() == [1, 0, 3, 2]
    images = Images(
        torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 1, 4, 4), torch.zeros(4).long(), ("a",)
    )

    def keep(pixels: torch.Tensor, generator: Any) -> torch.Tensor:
        return pixels

    examples = NearExamples(images, torch.arange(4), NearExamples.nearest(vectors, 1), augment=keep, small=keep)
    got = examples.gather(torch.tensor([0, 3]), torch.Generator())
    assert got.near[:, 0, 0, 0].tolist() == [1, 2]
