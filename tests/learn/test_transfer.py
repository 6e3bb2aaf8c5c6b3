"""Transfer: public names, frozen parts that do not move, probes, and what is averaged."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from funnelrec.data.augment import Augment
from funnelrec.data.images import Images
from funnelrec.encode.image.classifier import Classifier, pixel_statistics
from funnelrec.encode.image.named import build
from funnelrec.learn.transfer import (
    Training,
    class_weights,
    features,
    fit_names,
    fit_probe,
    load_weights,
    predict,
    train,
    unfreeze,
)

Named = Iterator[tuple[str, tuple[int, ...]]]


def norm(name: str, n: int) -> Named:
    for part in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.{part}", (n,)
    yield f"{name}.num_batches_tracked", ()


def linear(name: str, out: int, into: int) -> Named:
    yield f"{name}.weight", (out, into)
    yield f"{name}.bias", (out,)


def resnet(depth: int) -> Named:
    """Names and shapes as torchvision and timm publish them, written down from their files, not from our code."""
    blocks = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}[depth]
    wide = 1 if depth < 50 else 4
    yield "conv1.weight", (64, 3, 7, 7)
    yield from norm("bn1", 64)
    into = 64
    for stage, count in enumerate(blocks, start=1):
        w = 32 << stage
        for block in range(count):
            at = f"layer{stage}.{block}"
            kernels = [(w, into, 3), (w, w, 3)] if wide == 1 else [(w, into, 1), (w, w, 3), (4 * w, w, 1)]
            for number, (out, read, side) in enumerate(kernels, start=1):
                yield f"{at}.conv{number}.weight", (out, read, side, side)
                yield from norm(f"{at}.bn{number}", out)
            if block == 0 and (into != w * wide):
                yield f"{at}.downsample.0.weight", (w * wide, into, 1, 1)
                yield from norm(f"{at}.downsample.1", w * wide)
            into = w * wide
    yield from linear("fc", 1000, into)


def vgg16(timm: bool = False) -> Named:
    into = 3
    places = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    for place, out in zip(places, (64, 64, 128, 128, 256, 256, 256, *[512] * 6), strict=True):
        yield f"features.{place}.weight", (out, into, 3, 3)
        yield f"features.{place}.bias", (out,)
        into = out
    if timm:
        yield "pre_logits.fc1.weight", (4096, 512, 7, 7)
        yield "pre_logits.fc1.bias", (4096,)
        yield "pre_logits.fc2.weight", (4096, 4096, 1, 1)
        yield "pre_logits.fc2.bias", (4096,)
        yield from linear("head.fc", 1000, 4096)
    else:
        yield from linear("classifier.0", 4096, 25088)
        yield from linear("classifier.3", 4096, 4096)
        yield from linear("classifier.6", 1000, 4096)


def alexnet() -> Named:
    shapes = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3), 10: (256, 256, 3, 3)}
    for place, shape in shapes.items():
        yield f"features.{place}.weight", shape
        yield f"features.{place}.bias", shape[:1]
    yield from linear("classifier.1", 4096, 9216)
    yield from linear("classifier.4", 4096, 4096)
    yield from linear("classifier.6", 1000, 4096)


def densenet121(old: bool = False) -> Named:
    dot = "." if old else ""
    yield "features.conv0.weight", (64, 3, 7, 7)
    yield from norm("features.norm0", 64)
    n = 64
    for block, count in enumerate((6, 12, 24, 16), start=1):
        for layer in range(1, count + 1):
            at = f"features.denseblock{block}.denselayer{layer}"
            yield from norm(f"{at}.norm{dot}1", n)
            yield f"{at}.conv{dot}1.weight", (128, n, 1, 1)
            yield from norm(f"{at}.norm{dot}2", 128)
            yield f"{at}.conv{dot}2.weight", (32, 128, 3, 3)
            n += 32
        if block < 4:
            yield from norm(f"features.transition{block}.norm", n)
            yield f"features.transition{block}.conv.weight", (n // 2, n, 1, 1)
            n //= 2
    yield from norm("features.norm5", n)
    yield from linear("classifier", 1000, n)


PUBLIC = {
    **{f"resnet{depth}": (f"resnet{depth}", lambda depth=depth: resnet(depth)) for depth in (18, 34, 50, 101, 152)},
    "vgg16": ("vgg16", vgg16),
    "vgg16 of timm": ("vgg16", lambda: vgg16(timm=True)),
    "alexnet": ("alexnet", alexnet),
    "densenet121": ("densenet121", densenet121),
    "densenet121, old names": ("densenet121", lambda: densenet121(old=True)),
}


@pytest.mark.parametrize("file", PUBLIC)
def test_public_checkpoints_fit_name_by_name(file: str) -> None:
    name, listing = PUBLIC[file]
    with torch.device("meta"):
        given = {key: torch.empty(shape) for key, shape in listing()}
        network, other = build(name, size=224), build(name, size=224, num_classes=3, in_channels=1)
        fitted, kept = fit_names(network, given)
        assert kept == []
        assert set(fitted) == set(network.state_dict())
        head = [key for key, _ in other.named_parameters() if key.startswith(other.head_name)]  # type: ignore[operator]
        assert fit_names(other, given)[1] == head
        dropped = dict(list(given.items())[1:])
        with pytest.raises(ValueError, match="is missing; this file belongs to another network"):
            fit_names(network, dropped)
        with pytest.raises(ValueError, match=r"it also holds more\.weight"):
            fit_names(network, {**given, "more.weight": torch.empty(1)})


def narrow(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return build("resnet18", size=28, **{"width": 4, "num_classes": 5, "in_channels": 3, **changes})


def test_a_file_gives_the_same_logits(tmp_path: Path) -> None:
    source = narrow().eval()
    with torch.no_grad():
        source.layer1[0].bn1.running_mean.add_(0.3)  # type: ignore[operator, union-attr, index]
    save_file(source.state_dict(), tmp_path / "net.safetensors")
    torch.manual_seed(9)
    same = build("resnet18", size=28, width=4, num_classes=5).eval()
    assert load_weights(same, tmp_path / "net.safetensors") == []
    x = torch.randn(2, 1, 28, 28)
    assert torch.equal(same(x.expand(-1, 3, -1, -1)), source(x.expand(-1, 3, -1, -1)))

    grey = narrow(in_channels=1, num_classes=5).eval()
    load_weights(grey, tmp_path / "net.safetensors")
    assert torch.allclose(grey(x), source(x.expand(-1, 3, -1, -1)), atol=1e-5)

    two = narrow(num_classes=2)
    before = two.fc.weight.clone()  # type: ignore[union-attr, operator]
    assert load_weights(two, tmp_path / "net.safetensors") == ["fc.weight", "fc.bias"]
    assert torch.equal(two.fc.weight, before)  # type: ignore[union-attr, arg-type]
    with pytest.raises(ValueError, match=re.escape("conv1.weight has the shape [4, 3, 3, 3], not [8, 3, 3, 3]")):
        load_weights(narrow(width=8), tmp_path / "net.safetensors")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match="no safetensors file"):
        load_weights(two, tmp_path / "text")


def films(n: int = 96, classes: int = 2) -> Images:
    """Noise with a bright patch whose place is the class."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 90, (n, 1, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.arange(n) % classes
    for row, label in enumerate(labels.tolist()):
        pixels[row, 0, 4 + 8 * label : 11 + 8 * label, 8:16] += 140
    return Images(pixels, labels, tuple("abc"[:classes]))


def classifier(images: Images) -> Classifier:
    network = narrow(in_channels=1, num_classes=len(images.classes))
    return Classifier(network, *pixel_statistics(images.pixels))


HOW = Training(epochs=3, lr=5e-3, batch_size=16, bf16=False)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_what_is_frozen_does_not_move_nor_do_its_norms() -> None:
    images = films()
    model, rows = classifier(images), torch.arange(96)
    body = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")
    before = state(model.network)
    train(model, images, rows, Training(**{**vars(HOW), "freeze": body}))
    after = state(model.network)
    moved = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"fc"}
    train(model, images, rows, HOW)  # the control: everything moves once it is free
    moved = {name.partition(".")[0] for name in before if not torch.equal(before[name], state(model.network)[name])}
    assert moved == {"fc", *body}
    with pytest.raises(ValueError, match="no part 'layer9'; its parts are conv1, bn1"):
        model.freeze("layer9")


def test_gradual_unfreezing_learns_and_leaves_nothing_frozen() -> None:
    images = films()
    model = classifier(images)
    how = Training(**{**vars(HOW), "lr_factors": {"layer1": 0.1}, "balance": 1.0, "batch_size": 8})
    stages = [
        (("conv1", "bn1", "layer1", "layer2", "layer3", "layer4"), 1, 1.0),
        (("conv1", "bn1", "layer1"), 1, 1.0),
        ((), 10, 1.0),
    ]
    results = unfreeze(model, images, torch.arange(64), how, stages)
    assert len(results) == 3
    assert all(p.requires_grad for p in model.parameters())
    logits = predict(model, images, torch.arange(64, 96))
    assert (logits.argmax(1) == images.labels[64:]).double().mean() > 0.9


def test_slow_parts_move_less() -> None:
    images, moved = films(), []
    for factor in (1.0, 0.01):
        model = classifier(images)
        before = state(model.network)["layer1.0.conv1.weight"]
        train(model, images, torch.arange(96), Training(**{**vars(HOW), "lr_factors": {"layer1": factor}}))
        moved.append(float((state(model.network)["layer1.0.conv1.weight"] - before).norm()))
    assert moved[1] < 0.2 * moved[0]


def test_a_probe_finds_a_linear_rule_and_validation_chooses_l2() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 6, generator=generator) * torch.tensor([1.0, 1, 1, 1, 9, 0.01])
    y = (x[:, 0] - x[:, 1] > 0).long()
    probe = fit_probe(x[:300], y[:300], x[300:], y[300:], classes=2)
    assert (probe.logits(x[300:]).argmax(1) == y[300:]).double().mean() > 0.97
    noise = torch.randint(0, 2, (600,), generator=generator)
    assert fit_probe(x[:60], noise[:60], x[300:], noise[300:], classes=2).l2 == 1.0


def test_views_are_averaged_as_probabilities() -> None:
    images = films(8)
    model, rows = classifier(images).eval(), torch.arange(8)
    plain = predict(model, images, rows)
    assert torch.equal(predict(model, images, rows, augment=Augment(), views=1), plain)
    same = predict(model, images, rows, augment=Augment(), views=3)  # nothing is changed
    assert torch.allclose(same.exp(), plain.softmax(1), atol=1e-6)
    with pytest.raises(ValueError, match="more need augment="):
        predict(model, images, rows, views=2)
    vectors = features(model, images, rows)
    assert torch.allclose(model.network.head(vectors), plain, atol=1e-6)


def test_rare_classes_weigh_more() -> None:
    labels = torch.tensor([0] * 30 + [1] * 10 + [-1] * 5)
    assert class_weights(labels, 2) == pytest.approx((40 / 60, 2.0))
    assert class_weights(labels, 2, 0.0) == (1.0, 1.0)
