"""LeNet, AlexNet, VGG, ResNet, DenseNet: published sizes, public names, and what their equations promise."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from funnelrec import zoo
from funnelrec.core.contracts import Encoder
from funnelrec.encode.image.alexnet import AlexNet
from funnelrec.encode.image.densenet import DenseNet
from funnelrec.encode.image.lenet import LeNet
from funnelrec.encode.image.resnet import ResNet
from funnelrec.encode.image.vgg import VGG

PUBLISHED = [
    ("lenet", {}, 61_706),
    ("alexnet", {}, 61_100_840),
    ("vgg", {}, 138_357_544),
    ("vgg", {"batch_norm": True}, 138_365_992),
    ("resnet", {"depth": 18}, 11_689_512),
    ("resnet", {"depth": 34}, 21_797_672),
    ("resnet", {"depth": 50}, 25_557_032),
    ("resnet", {"depth": 101}, 44_549_160),
    ("resnet", {"depth": 152}, 60_192_808),
    ("densenet", {}, 7_978_856),
    ("densenet", {"layers": (6, 12, 32, 32)}, 14_149_480),
    ("densenet", {"layers": (6, 12, 48, 32)}, 20_013_928),
]


@pytest.mark.parametrize(("name", "arguments", "published"), PUBLISHED)
def test_as_many_parameters_as_published(name: str, arguments: dict[str, Any], published: int) -> None:
    with torch.device("meta"):
        network = zoo.load(f"encode/image/{name}")(**arguments)
    assert sum(p.numel() for p in network.parameters()) == published


def small(name: str, **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "lenet": {"in_channels": 3},
        "alexnet": {"width": 4, "hidden": 16, "stem": "cifar"},
        "vgg": {"depth": 11, "width": 4, "hidden": 16, "stem": "cifar", "batch_norm": True},
        "resnet": {"width": 4, "stem": "cifar"},
        "densenet": {"layers": (2, 2, 2), "growth": 4, "stem": "cifar"},
    }[name]
    torch.manual_seed(0)
    return zoo.load(f"encode/image/{name}")(**{"num_classes": 5, **arguments, **changes}).eval()


@pytest.mark.parametrize("name", ["lenet", "alexnet", "vgg", "resnet", "densenet"])
@pytest.mark.parametrize("size", [28, 32])
def test_logits_and_vectors_of_small_pictures(name: str, size: int) -> None:
    network, pictures = small(name), torch.randn(3, 3, size, size)
    assert network(pictures).shape == (3, 5)
    assert torch.equal(network(pictures), network.head(network.pool(network.maps(pictures))))
    vectors = small(name, num_classes=0)
    assert isinstance(vectors, Encoder)
    assert vectors(pictures).shape == (3, network.num_features)
    assert torch.allclose(network(pictures[:1]), network(pictures)[:1], atol=1e-6)


@pytest.mark.parametrize(
    ("network", "maps"),
    [
        (AlexNet(width=4, hidden=8, num_classes=3), (13, 16)),
        (VGG(depth=11, width=2, hidden=8, num_classes=3), (14, 16)),
        (ResNet(width=4, num_classes=3), (7, 32)),
        (ResNet(depth=50, width=4, num_classes=3), (7, 128)),
        (DenseNet(layers=(2, 2, 2, 2), growth=4, num_classes=3), (7, 16)),
    ],
)
def test_large_pictures(network: Any, maps: tuple[int, int]) -> None:
    found = network.eval().maps(torch.randn(1, 3, 224, 224))
    assert found.shape == (1, maps[1], maps[0], maps[0])
    assert network(torch.randn(1, 3, 224, 224)).shape == (1, 3)


def test_a_block_that_begins_adds_nothing() -> None:
    network = small("resnet")
    block = network.layer1[1]
    x = torch.rand(2, 4, 8, 8)  # not negative, so the last ReLU keeps it
    assert torch.equal(block(x), x)
    nn.init.ones_(block.bn2.weight)
    assert not torch.equal(block(x), x)


def test_dense_layers_read_everything_before_them() -> None:
    with torch.device("meta"):
        parts = dict(DenseNet().features.named_children())
    reads = [parts[f"denseblock{n}"][0].conv1.in_channels for n in (1, 2, 3, 4)]
    leaves = [parts[f"transition{n}"].conv.in_channels for n in (1, 2, 3)]
    assert (reads, leaves) == ([64, 128, 256, 512], [256, 512, 1024])
    assert parts["norm5"].num_features == 1024
    network = small("densenet")
    block, x = network.features.denseblock1, torch.randn(1, 8, 6, 6)
    assert torch.equal(block(x)[:, :8], x)  # what was read is passed on


def test_shortcuts_are_only_where_shapes_change() -> None:
    network = small("resnet")
    assert [isinstance(getattr(network, f"layer{n}")[0].downsample, nn.Identity) for n in (1, 2, 3, 4)] == [
        True, False, False, False,
    ]  # fmt: skip
    assert isinstance(small("resnet", depth=50).layer1[0].downsample, nn.Sequential)


def test_one_channel_reads_as_three_equal_ones() -> None:
    colour, grey = small("resnet"), small("resnet", in_channels=1)
    state = colour.state_dict()
    state["conv1.weight"] = state["conv1.weight"].sum(1, keepdim=True)
    grey.load_state_dict(state)
    picture = torch.randn(2, 1, 32, 32)
    assert torch.allclose(grey(picture), colour(picture.expand(-1, 3, -1, -1)), atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResNet(depth=20), "a ResNet has a depth of 18, 34, 50, 101, 152, received 20"),
        (lambda: VGG(depth=18), "a VGG has a depth of 11, 13, 16, 19, received 18"),
        (
            lambda: ResNet(stem="small"),
            "or 'cifar' (28 to 64 pixels), received 'small'",
        ),
        (lambda: LeNet(num_classes=-1), "num_classes at least 0"),
        (lambda: DenseNet(compression=0.0), "compression lies in (0, 1]"),
    ],
)
def test_what_cannot_be_built(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_lenet_names_the_sizes_it_reads() -> None:
    pictures: Tensor = torch.zeros(1, 1, 64, 64)
    with pytest.raises(ValueError, match=r"28 x 28 or 32 x 32 pixels, received \[64, 64\]; use resnet"):
        LeNet()(pictures)
