"""Item pictures: encoded once, kept by bytes and encoder."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from funnelrec.encode.image import items
from funnelrec.encode.image.classifier import Classifier
from funnelrec.encode.image.items import picture_vectors
from funnelrec.encode.image.named import build, save_classifier


def encoder(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    network = build("resnet18", size=28, in_channels=3, num_classes=2, width=4)
    facts = {"name": "resnet18", "size": 28, "in_channels": 3, "num_classes": 2, "width": 4, "classes": ["a", "b"]}
    return save_classifier(folder, Classifier(network, [0.5] * 3, [0.2] * 3), facts)


def picture(value: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (40, 30), (value, 255 - value, 9)).save(out, "PNG")
    return out.getvalue()


def test_each_picture_is_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c.png").write_bytes(picture(30))
    column = [picture(10), picture(200), None, b"broken", str(tmp_path / "c.png"), picture(10), "gone.png"]
    folder = encoder(tmp_path / "e")
    first = picture_vectors(column, folder, tmp_path / "cache")
    assert first.shape == (7, 32)
    assert not first[[2, 3, 6]].any()
    assert np.array_equal(first[0], first[5])
    assert not np.allclose(first[0], first[1])

    seen: list[int] = []
    encode = items._encode
    monkeypatch.setattr(items, "_encode", lambda model, pixels: seen.append(len(pixels)) or encode(model, pixels))
    assert np.array_equal(picture_vectors(column, folder, tmp_path / "cache"), first)
    assert seen == []
    picture_vectors([picture(10), picture(11)], folder, tmp_path / "cache")
    assert seen == [1]
    other = picture_vectors(column, encoder(tmp_path / "f", seed=1), tmp_path / "cache")
    assert seen == [1, 3]
    assert not np.allclose(other[0], first[0])
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(b"damaged")
    assert np.allclose(picture_vectors(column, folder, tmp_path / "cache"), first, atol=1e-6)
    assert picture_vectors([], folder, tmp_path / "cache").shape == (0, 32)
